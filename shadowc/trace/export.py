# SPDX-License-Identifier: Apache-2.0
"""The trace: transformers' own OPTForCausalLM becomes an ONNX graph that holds no weights.

In: the facts of a model. Out: an ONNX file of about 100 kB a layer, whose parameters are graph inputs under the
checkpoint's names and whose nodes are called `scope#index`, the scope being the module they were traced in
(GraphSurgeon drops node metadata, so the scope has to live in the name). The bytes depend on the facts and on the
versions of torch, transformers and onnxscript only.

Time: about 1.2 s a layer, most of it torch's arithmetic on symbolic sizes; with fixed sizes it would be a third, but
then sizes of the example would hide in the graph.

Letters: B batch, S new tokens, T cached tokens, P = T + S, H heads, D head size.
"""

from __future__ import annotations

import ast
import contextlib
import gc
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shadowc.checkpoint.opt import EMBEDDING, HEAD, OptFacts, config_dict, parameter_shapes
from shadowc.spec.errors import InternalError
from shadowc.spec.program import Program, WeightRecipe

if TYPE_CHECKING:
    import onnx_ir
    import torch

OPSET = 20
_SCOPES = "pkg.torch.onnx.name_scopes"
_NO_SCOPE = "_empty_nn_module_stack_from_metadata_hook"
_CHATTY = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
# Example sizes: all different, so that no two dimensions are mistaken for one; none is 0 or 1, which would be fixed.
_BATCH, _NEW, _CACHED = 2, 3, 5


def trace(facts: OptFacts, out: Path) -> None:
    """Write the weightless graph of the model to `out`.

    Raises:
        InternalError: the exporter's result is not what the passes are written for (opset, parameters, scopes).
    """
    import onnx_ir

    with _quiet(), _without_collector():
        model = _export(facts)
        _parameters_become_inputs(model)
        _optimise(model)
    if model.opset_imports.get("") != OPSET:
        raise InternalError(f"the exporter wrote opset {model.opset_imports.get('')}, the passes expect {OPSET}")
    _name_nodes(model)
    _name_dimensions(model, facts)
    _forget_origins(model)
    onnx_ir.save(model, out)


def load_program(path: Path, facts: OptFacts) -> Program:
    """Read a trace; every parameter gets a `copy` recipe under its own name.

    Raises:
        InternalError: the trace does not belong to these facts.
    """
    import onnx
    import onnx_graphsurgeon as gs

    graph = gs.import_onnx(onnx.load(path))
    shapes = parameter_shapes(facts)
    shapes[HEAD] = shapes[EMBEDDING]
    found = {value.name: tuple(value.shape) for value in graph.inputs if value.name in shapes}
    # the tied weight is one tensor under one of its two names
    missing = sorted(name for name in shapes.keys() - found.keys() if name not in (HEAD, EMBEDDING))
    if HEAD not in found and EMBEDDING not in found:
        missing.append(EMBEDDING)
    if missing:
        raise InternalError(f"the trace lacks {len(missing)} parameters of {facts.name}, for example {missing[0]}")
    for name, shape in sorted(found.items()):
        if shape != shapes[name]:
            raise InternalError(f"{name} is {list(shape)} in the trace, {list(shapes[name])} in {facts.name}")
    weights = {name: WeightRecipe("copy", (name,), shapes[name]) for name in sorted(found)}
    return Program(graph=graph, facts=facts, weights=weights)


def cache_names(layers: int, prefix: str) -> list[str]:
    """Names of the cache tensors in graph order; the prefix is past_key_values or present, as in onnxruntime-genai."""
    return [f"{prefix}.{layer}.{kind}" for layer in range(layers) for kind in ("key", "value")]


def _export(facts: OptFacts) -> onnx_ir.Model:
    """Export the model on the meta device: shapes and no values, whatever the model's size."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM
    from transformers.cache_utils import DynamicCache

    class Step(OPTForCausalLM):  # type: ignore[misc]  # a subclass, so that module scopes are parameter names
        """One call with a cache that comes in and goes out as plain tensors."""

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: Any) -> Any:
            cache = DynamicCache()
            for layer, (key, value) in enumerate(past):
                cache.update(key, value, layer)
            out = super().forward(
                input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True
            )
            return out.logits, [(layer.keys, layer.values) for layer in out.past_key_values.layers]

    with torch.device("meta"):
        model = Step(OPTConfig(**config_dict(facts))).eval()
        ids_BS = torch.ones(_BATCH, _NEW, dtype=torch.long)
        mask_BP = torch.ones(_BATCH, _CACHED + _NEW, dtype=torch.long)
        cached = (_BATCH, facts.heads, _CACHED, facts.head_size)
        past = [(torch.zeros(cached), torch.zeros(cached)) for _ in range(facts.layers)]
    free = torch.export.Dim.DYNAMIC
    caches = [({0: free, 2: free}, {0: free, 2: free}) for _ in range(facts.layers)]
    program = torch.onnx.export(
        model,
        (ids_BS, mask_BP, past),
        input_names=["input_ids", "attention_mask", *cache_names(facts.layers, "past_key_values")],
        output_names=["logits", *cache_names(facts.layers, "present")],
        dynamic_shapes=({0: free, 1: free}, {0: free, 1: free}, caches),
        opset_version=OPSET,
        dynamo=True,
        optimize=False,
        verbose=False,
    )
    if program is None:
        raise InternalError(f"torch.onnx.export returned no program for {facts.name}")
    return program.model


def _parameters_become_inputs(model: onnx_ir.Model) -> None:
    """A parameter is an initialiser whose value is a torch tensor; it has no data on the meta device."""
    import torch

    graph = model.graph
    for name, value in list(graph.initializers.items()):
        if isinstance(getattr(value.const_value, "raw", None), torch.Tensor):
            del graph.initializers[name]
            value.const_value = None
            graph.inputs.append(value)


def _optimise(model: onnx_ir.Model) -> None:
    """Fold shape arithmetic and drop dead code; one round is enough for what the exporter writes."""
    from onnxscript import optimizer

    optimizer.optimize(model, num_iterations=1, onnx_shape_inference=False)


def _name_nodes(model: onnx_ir.Model) -> None:
    for index, node in enumerate(model.graph):
        # a Python list: [outer module, ..., innermost module, name of the traced operation]
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        scope = scopes[-2] if len(scopes) > 1 else ""
        node.name = f"{'' if scope == _NO_SCOPE else scope}#{index}"


def _name_dimensions(model: onnx_ir.Model, facts: OptFacts) -> None:
    """Give torch's symbols (s77, s70, ...) the letters of this project; sizes derived from several get no name."""
    import onnx_ir

    letters: dict[str, str] = {}
    axes = {"input_ids": "BS", "attention_mask": "BP"}
    axes |= dict.fromkeys(cache_names(facts.layers, "past_key_values"), "BHTD")
    for value in model.graph.inputs:
        for letter, size in zip(axes.get(value.name or "", ""), value.shape or (), strict=False):
            if isinstance(size, onnx_ir.SymbolicDim) and size.value is not None:
                letters.setdefault(size.value, letter)
    values = [*model.graph.inputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.shape is not None:
            value.shape = onnx_ir.Shape(
                size if isinstance(size, int) else letters.get(size.value or "") for size in value.shape
            )


def _forget_origins(model: onnx_ir.Model) -> None:
    """Remove stack traces and file names: they would make the bytes depend on the machine."""
    model.metadata_props.clear()
    model.doc_string = None
    graph = model.graph
    graph.metadata_props.clear()
    for value in (*graph.inputs, *graph.initializers.values()):
        value.metadata_props.clear()
    for node in graph:
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings, log lines and prints (onnxscript 0.6) from the user; its errors are exceptions."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Pause the cycle collector: walking the ever larger graphs costs a sixth of the time, for 40 MB at 24 layers."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
