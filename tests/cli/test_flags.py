# SPDX-License-Identifier: Apache-2.0
"""The flags of every command are frozen in flags.txt: scripts depend on them.

A wanted change: SHADOWC_UPDATE_GOLDEN=1 pytest tests/cli/test_flags.py, then review the difference as code.
"""

from __future__ import annotations

import inspect
import os
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Literal, Union, get_args, get_origin, get_type_hints

import pytest
import typer
from typer.testing import CliRunner

from shadowc.cli import flags
from shadowc.cli.app import COMMANDS, app
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.manifest import SparsityPart
from shadowc.spec.options import CollectOptions, CompileOptions, TrainOptions

GOLDEN = Path(__file__).with_name("flags.txt")


def parameters(
    function: Callable[..., None],
) -> Iterator[tuple[str, inspect.Parameter, object, typer.models.ParameterInfo]]:
    """Name, parameter, bare type and typer's description of everything that a command takes."""
    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if hints[name] is typer.Context:  # typer's own, no flag
            continue
        bare, info = get_args(hints[name])
        yield name, parameter, bare, info


def type_word(kind: object) -> str:
    """The same word on every Python version: `str`, `Path | None`, `fp32|int8`."""
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if isinstance(kind, types.UnionType) or get_origin(kind) is Union:
        return " | ".join(type_word(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"{type_word(get_args(kind)[0])} ..."
    return "None" if kind is type(None) else kind.__name__


def described() -> str:
    """One line per argument and flag, in the order of the help text."""
    lines = []
    for command, function, _ in COMMANDS:
        lines.append(f"shadowc {command}")
        for _, parameter, bare, info in parameters(function):
            names = (info.default, *(info.param_decls or ()))  # inside Annotated the first name lands in `default`
            flag = " ".join(part for part in names if isinstance(part, str)) or str(info.metavar)
            needed = parameter.default is inspect.Parameter.empty
            lines.append(f"  {flag}  ({type_word(bare)})  {'required' if needed else parameter.default}")
    return "\n".join(lines) + "\n"


UNSET = ("weights", "compute_capability", "neuron_block", "exempt")


def defaults(command: str) -> dict[str, object]:
    function = next(function for name, function, _ in COMMANDS if name == command)
    return {name: parameter.default for name, parameter, _, _ in parameters(function)}


def test_flags_are_those_of_the_golden_file() -> None:
    if os.environ.get("SHADOWC_UPDATE_GOLDEN"):
        GOLDEN.write_text(described(), encoding="utf-8")
    assert described() == GOLDEN.read_text(encoding="utf-8")


def test_every_command_has_a_help_line_and_a_word_for_interrupts() -> None:
    assert len(COMMANDS) == 11
    for name, function, kept in COMMANDS:
        assert function.__doc__, name
        assert kept, name


def test_defaults_of_compile_are_those_of_the_options() -> None:
    found = defaults("compile")
    options = CompileOptions(model="opt-mini")
    for part in (options, options.collect, options.train):
        for name in type(part).model_fields.keys() & found.keys() - {"model", "out", "dump_passes", *UNSET}:
            assert found[name] == getattr(part, name), name
    assert {found[name] for name in UNSET} == {None}  # the options choose: weights by the target, blocks by the style


def test_layers_are_read_from_a_list_and_anything_else_is_named() -> None:
    assert flags.layers_of(None) == ()
    assert flags.layers_of("1, 23") == (1, 23)
    for text in ("1,x", "", "-1", "1.5"):
        with pytest.raises(InputError, match="a list of layers was expected"):
            flags.layers_of(text)


@pytest.mark.parametrize(("target", "weights"), [("cpu", "fp32"), ("tensorrt-rtx", "fp16"), ("tensorrt", "fp16")])
def test_weights_that_nobody_chose_are_the_targets_default(target: str, weights: str) -> None:
    for given in ({}, {"weights": None}):
        assert CompileOptions(model="opt-mini", target=target, **given).weights == weights


@pytest.mark.parametrize(("command", "options"), [("collect", CollectOptions()), ("train", TrainOptions())])
def test_defaults_of_stage_commands_are_those_of_the_options(
    command: str, options: CollectOptions | TrainOptions
) -> None:
    found = defaults(command)
    shared = type(options).model_fields.keys() & found.keys() - UNSET
    assert shared
    assert {name: found[name] for name in shared} == {name: getattr(options, name) for name in shared}


PLAN = SparsityPart(mask="token", scope="global", head_density=0.4, neuron_density=0.3, neuron_block=16)


@pytest.mark.parametrize("command", ["run", "bench", "bisect", "eval"])
@pytest.mark.parametrize("threads", [0, 1025, 100_000])
def test_threads_are_1_to_1024(command: str, threads: int, tmp_path: Path) -> None:
    prompt = ["a prompt"] if command == "run" else []
    result = CliRunner().invoke(app, [command, str(tmp_path), *prompt, "--threads", str(threads)])
    assert result.exit_code == 2
    assert "Invalid value for '--threads'" in result.output  # the rest is typer's, and no two versions say it alike


def test_density_flag_sets_both_kinds() -> None:
    assert flags.density_of(0.25, None, None, PLAN) == Density(0.25, 0.25)


def test_one_kind_keeps_the_engines_own_share_of_the_other() -> None:
    assert flags.density_of(None, None, 0.2, PLAN) == Density(0.4, 0.2)
    assert flags.density_of(None, 0.2, None, PLAN) == Density(0.2, 0.3)


def test_no_density_flag_means_the_engines_own() -> None:
    assert flags.density_of(None, None, None, PLAN) is None


def test_density_with_a_single_share_is_refused() -> None:
    with pytest.raises(InputError, match="together with a flag for one of them"):
        flags.density_of(0.5, 0.5, None, PLAN)


def test_list_of_densities_takes_pairs() -> None:
    assert flags.densities_of("1, 0.5/0.2") == (Density(1, 1), Density(0.5, 0.2))


@pytest.mark.parametrize("text", ["", "half", "0.5,,1", "0.5/x"])
def test_list_of_densities_refuses_what_is_no_number(text: str) -> None:
    with pytest.raises(InputError, match="a density was expected"):
        flags.densities_of(text)


@pytest.mark.parametrize("text", ["1.5", "-0.1", "nan", "0.5/2"])
def test_list_of_densities_refuses_what_is_no_share(text: str) -> None:
    with pytest.raises(InputError, match="from 0 to 1") as caught:
        flags.densities_of(text)
    assert caught.value.hint == "for example --densities 1,0.5,0.5/0.2"  # eval, bench, inspect: they have this flag


def test_option_values_out_of_range_are_all_listed() -> None:
    with pytest.raises(InputError) as caught:
        flags.checked(TrainOptions, {"neuron_block": 0, "epochs": 0}, "train")
    assert len(caught.value.problems) == 2
    assert "--neuron-block" in caught.value.problems[0]


def test_a_value_of_a_list_is_refused_by_the_flag_that_takes_the_list() -> None:
    with pytest.raises(InputError) as caught:
        flags.checked(CompileOptions, {"model": "opt-mini", "exempt": (0,)}, "compile")
    assert caught.value.problems[0].startswith("--exempt: ")


@pytest.mark.parametrize("command", ["train", "compile"])
def test_option_values_that_do_not_go_together_are_told_without_a_flag(command: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    what = ["--model", "opt-mini", "--out", str(out), "--style", "shadow", "--labels", "graded"]
    result = CliRunner().invoke(app, [command, *what])
    assert result.exit_code == 2
    lines = result.stderr.splitlines()
    assert lines[1].strip().startswith("- style shadow cannot learn labels graded")
    assert lines[-1] == f"next: shadowc {command} --help lists what each flag takes"
