# SPDX-License-Identifier: Apache-2.0
"""Writes the files of an engine for TensorRT: weights, graphs, plans, plugins.

Both plans take the weights as inputs, so that the builder never sees them: it needs the same memory and time for
every size of model, and a device holds one copy for both.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.checkpoint.opt import EMBEDDING, POSITIONS
from shadowc.emit.target import EmitResult
from shadowc.emit.tensorrt.builder import BuildRequest, BuildResult, build_plan, plugin_operators
from shadowc.emit.tensorrt.checks import Tools, sizes_of, tools_of
from shadowc.emit.tensorrt.interface import Plan, Sizes, describe
from shadowc.emit.tensorrt.memory import free_bytes, host_bytes, host_note
from shadowc.emit.weights import DEVICE_ALIGNMENT, Placement, nbytes, write_weights
from shadowc.pipeline import ACTIVATIONS
from shadowc.spec.errors import InternalError
from shadowc.spec.manifest import WEIGHTS_FILE, BytesPart, PlanPart, PluginPart, TensorRtPart, WeightPart
from shadowc.spec.ops import DOMAIN, VERSION
from shadowc.spec.progress import NullProgress, Progress

if TYPE_CHECKING:
    from shadowc.spec.options import CompileOptions
    from shadowc.spec.program import Program, TensorSource, WeightRecipe

PLANS: tuple[Plan, ...] = ("decode", "prefill")
_RECORD_KINDS = ("ffn_rows", "ffn_scales", "attention_rows", "attention_scales")


def emit_tensorrt(
    programs: Mapping[str, Program],
    source: TensorSource,
    staging: Path,
    *,
    options: CompileOptions,
    progress: Progress | None = None,
) -> EmitResult:
    """Write weights.bin, both graphs, both plans and the plugin libraries.

    Args:
        programs: the final graphs "decode" and "prefill".
        source: every tensor that the recipes name.
        staging: an existing folder.
        options: target, weights, limits and compute capabilities.
        progress: told about the memory that it takes, about bytes of weights, then about steps of the builder.

    Raises:
        SetupError: the builder or the plugin is missing, or the builder refused.
        InputError: weights are too large for float16, or the limits do not fit the model.
        UnsupportedError: the kernels do not handle the model's shape.
    """
    from shadowc.trace.program_io import write_model

    progress = progress or NullProgress()
    tools = tools_of(options)
    sizes = sizes_of(options, programs["decode"].facts)
    recipes = shared_recipes(programs)
    note = host_note(recipes)
    needed, free = host_bytes(recipes), free_bytes()
    progress.note(f"memory may run out: {note}" if 0 < free < needed else note, needed=needed, free=free)
    places, weights_entry = write_weights(staging / WEIGHTS_FILE, recipes, source, progress, alignment=DEVICE_ALIGNMENT)
    plans: dict[Plan, PlanPart] = {}
    built: dict[Plan, BuildResult] = {}
    for name in PLANS:
        plans[name] = describe(programs[name], name, sizes)
        write_model(programs[name], staging / plans[name].onnx)
        operators = plugin_operators(programs[name].graph.nodes)
        with progress.stage(f"build {name}"):
            built[name] = build_plan(
                BuildRequest(tools.bindings, tools.plugin, staging, plans[name], operators, tools.capabilities, note),
                progress,
            )
            progress.note(
                plans[name].file, bytes=built[name].bytes, seconds=round(built[name].seconds, 2),
                peak_bytes=built[name].peak_bytes,
            )  # fmt: skip
    registered = built["decode"].registered
    part = _part(options, tools, sizes, plans, places, recipes, _copy_plugins(tools, staging, registered))
    return EmitResult(
        files={WEIGHTS_FILE: weights_entry},
        bytes_per_token=_bytes_per_token(programs["decode"]),
        ops={DOMAIN: VERSION},
        tensorrt=part,
        build={str(name): result for name, result in built.items()},
    )


def shared_recipes(programs: Mapping[str, Program]) -> dict[str, WeightRecipe]:
    """The weights of all graphs; those with the same name must be made in the same way.

    Raises:
        InternalError: two graphs would need two versions of one weight.
    """
    recipes: dict[str, WeightRecipe] = {}
    for program in programs.values():
        for name, recipe in program.weights.items():
            if recipes.setdefault(name, recipe) != recipe:
                raise InternalError(f"the graphs want {name} as {recipes[name]} and as {recipe}")
    return recipes


def _bytes_per_token(program: Program) -> BytesPart:
    """As emit/cpu counts; the LM head reads the whole embedding, the embedding itself one row."""
    parts = {"lm_head": nbytes(program.weights[EMBEDDING]), "predictor": 0, "other": 0, "records": 0}
    for name, recipe in program.weights.items():
        size = nbytes(recipe)
        if recipe.kind.startswith(_RECORD_KINDS):
            parts["records"] += size
        elif name.startswith("predictor."):
            parts["predictor"] += size
        else:
            parts["other"] += size // recipe.shape[0] if name in (EMBEDDING, POSITIONS) else size
    return BytesPart(**parts)


def _copy_plugins(tools: Tools, staging: Path, operators: tuple[str, ...]) -> tuple[PluginPart, ...]:
    """The library that the plans were built with, and its self-registering twin if there is one."""
    parts = []
    for path in plugin_files(tools.plugin):
        shutil.copyfile(path, staging / path.name)
        parts.append(PluginPart(file=path.name, registers_itself=path != tools.plugin, operators=operators))
    return tuple(parts)


def plugin_files(plugin: Path) -> tuple[Path, ...]:
    """The plugin, and behind it its self-registering twin if there is one."""
    twin = plugin.with_name(f"{plugin.stem}_auto.so")
    return (plugin, twin) if twin.is_file() else (plugin,)


def _part(
    options: CompileOptions,
    tools: Tools,
    sizes: Sizes,
    plans: dict[Plan, PlanPart],
    places: Mapping[str, Placement],
    recipes: Mapping[str, WeightRecipe],
    plugins: tuple[PluginPart, ...],
) -> TensorRtPart:
    table = tuple(
        WeightPart(
            name=name, dtype=recipes[name].dtype, shape=recipes[name].shape,  # type: ignore[arg-type]
            offset=place.offset, bytes=place.length,
        )
        for name, place in places.items()
    )  # fmt: skip
    return TensorRtPart(
        family=tools.bindings.family,
        library_version=tools.bindings.version,
        activations=ACTIVATIONS[options.weights],
        max_batch=sizes.max_batch,
        max_context=sizes.max_context,
        chunk=sizes.chunk,
        compute_capabilities=tools.built_for,
        portable_above=tools.portable_above,
        plans=plans,
        plugins=plugins,
        weights=table,
    )
