# SPDX-License-Identifier: Apache-2.0
"""What of a compile's options can be refused before any work, all of it at once."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shadowc.spec.errors import InputError, ShadowcError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from shadowc.spec.options import CompileOptions


def check_options(options: CompileOptions, out: Path) -> None:
    """Refuse options that no engine can be compiled with, and an output folder that cannot be written.

    Args:
        options: what is asked for.
        out: where the engine is to lie.

    Raises:
        ShadowcError: of the kind of the only problem; of several an InputError that lists them.
    """
    problems: list[ShadowcError] = []
    for check in _checks(options, out):
        try:
            check()
        except ShadowcError as error:
            problems.append(error)
    if len(problems) == 1:
        raise problems[0]
    if problems:
        texts = [problem.message for problem in problems]
        raise InputError("the options cannot be used: " + "; ".join(texts), hint=problems[0].hint, problems=texts)


def _checks(options: CompileOptions, out: Path) -> list[Callable[[], object]]:
    from shadowc.emit.folder import check_replaceable
    from shadowc.emit.target import TARGETS
    from shadowc.pipeline import check_choice
    from shadowc.runtime.session import check_ort
    from shadowc.sparsity.calibration import check_data
    from shadowc.sparsity.criteria import find_criterion, require_trainable

    checks: list[Callable[[], object]] = [
        lambda: options.density,
        lambda: check_choice(options.target, options.weights),
        lambda: find_criterion(options.collect.criterion),
        lambda: check_replaceable(out),
        lambda: _check_writable(out),
        lambda: _check_dump(options, out),
        lambda: _check_mask(options),
        lambda: _check_style(options),
        check_ort,
        *(TARGETS[options.target].checks(options) if options.target in TARGETS else ()),
    ]
    if options.predictor == "train":
        checks.append(lambda: require_trainable(name := options.collect.criterion, find_criterion(name).per))
    if options.predictor == "train" and options.load_format == "auto":
        checks.append(lambda: check_data(options.collect.data))
    return checks


def _check_writable(out: Path, flag: str = "--out") -> None:
    """The first folder that exists above the output must take new entries."""
    try:
        above = next(path for path in out.absolute().parents if path.exists())
    except OSError:  # check_replaceable has said it
        return
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise InputError(f"cannot write to {above}; nothing was written", hint=f"choose another folder with {flag}")


def _check_mask(options: CompileOptions) -> None:
    if options.refresh and options.mask == "token":
        raise InputError(
            f"--refresh {options.refresh} has no effect with --mask token: every token makes its own mask",
            hint="--mask sequence, or leave --refresh out",
        )
    if options.mask == "sequence" and options.target != "cpu":
        raise UnsupportedError(
            f"target {options.target} makes a mask for every token, a mask per sequence is for target cpu",
            hint="--mask token, or --target cpu",
        )


def _check_style(options: CompileOptions) -> None:
    """What a predictor for each layer cannot do; a predictor's folder says of which style it is."""
    from shadowc.sparsity.predictor import style_in
    from shadowc.sparsity.styles import check_select, check_style, scope_of

    if options.predictor == "none":
        return
    style = options.train.style if options.predictor == "train" else style_in(options.predictor)
    check_style(style, options)
    check_select(options)
    scope_of(style, options.scope, options.select)


def _check_dump(options: CompileOptions, out: Path) -> None:
    from shadowc.pipeline import REPORT_FILE, foreign_to_a_dump

    dump = options.dump_passes
    if dump is None:
        return
    if dump.exists() and not dump.is_dir():
        raise InputError(f"--dump-passes {dump} is a file, expected a folder", hint="name another folder")
    above, inside = out.absolute(), dump.absolute()
    if inside == above or above in inside.parents:
        raise InputError(f"--dump-passes {dump} lies inside the engine folder {out}", hint="name another folder")
    foreign = foreign_to_a_dump(dump)
    if foreign:
        raise InputError(
            f"--dump-passes {dump} holds files that are no dump: {', '.join(foreign[:3])}", hint="name another folder"
        )
    _check_writable(dump / REPORT_FILE, "--dump-passes")
