# SPDX-License-Identifier: Apache-2.0
"""A narrow OPT with eleven layers, so that layers.1 and layers.10 both exist, and its trace, made once a session.

200 neurons are no multiple of 16: the last block of neurons is short.
"""

from __future__ import annotations

import dataclasses
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import onnx
import onnxruntime

from shadowc.checkpoint.opt import EMBEDDING, HEAD, OptFacts, config_dict
from shadowc.emit.records import groups, materialise
from shadowc.pipeline import run_passes, schedule
from shadowc.sparsity.predictor import Predictor
from shadowc.spec import oracle
from shadowc.spec.options import Style
from shadowc.spec.program import Program, SparsityPlan
from shadowc.trace.export import load_program, trace
from shadowc.trace.program_io import to_model

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

FACTS = OptFacts("deep", 11, 64, 4, 16, ffn=200, vocab=96, positions=48, bos=2, eos=2, pad=1)
NORMS_LAST = dataclasses.replace(FACTS, name="last", layers=3, norm_first=False, projected=32)
"""The form of opt-350m: each norm behind its block, embeddings narrower than hidden states, no norm before the head."""
BLOCK, WIDTH = 16, 32


@cache
def model(facts: OptFacts = FACTS) -> OPTForCausalLM:
    """Random weights, large enough that every head and neuron moves the logits; do not change it."""
    import torch
    from transformers import OPTConfig, OPTForCausalLM

    with torch.random.fork_rng():
        made = OPTForCausalLM(OPTConfig(**config_dict(facts), attn_implementation="eager")).eval()
    generator = torch.Generator().manual_seed(7)
    for name, parameter in made.requires_grad_(False).named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("norm.weight"):
            parameter.copy_(1 + 0.2 * noise)
        else:
            parameter.copy_(noise * (0.3 if name.endswith(".bias") else 0.15))
    return made


@cache
def predictor(block: int = BLOCK, style: Style = "shadow", facts: OptFacts = FACTS) -> Predictor:
    """Random networks and, for blocks, random orders of the neurons."""
    return Predictor.dummy(facts, block, WIDTH, seed=3, style=style)


def plan(block: int = BLOCK, **changes: object) -> SparsityPlan:
    return SparsityPlan(**{"width_heads": WIDTH, "width_neurons": WIDTH, "block": block, "scope": "global", **changes})


class Tensors:
    """A TensorSource: the model's weights and the predictor's."""

    def __init__(self, block: int = BLOCK, style: Style = "shadow", facts: OptFacts = FACTS) -> None:
        self.values = {name: value.numpy() for name, value in model(facts).state_dict().items()}
        self.values.setdefault(HEAD, self.values[EMBEDDING])
        self.values |= {f"predictor.{name}": value for name, value in predictor(block, style, facts).tensors().items()}

    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.values))

    def tensor(self, name: str) -> np.ndarray:
        return self.values[name]


@cache
def _trace_bytes(facts: OptFacts) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        trace(facts, Path(folder) / "trace.onnx")
        return (Path(folder) / "trace.onnx").read_bytes()


def traced(sparsity: SparsityPlan | None = None, facts: OptFacts = FACTS) -> Program:
    """A fresh program of the trace."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.onnx"
        path.write_bytes(_trace_bytes(facts))
        program = load_program(path, facts)
    program.plan = sparsity
    return program


def compiled(
    sparsity: SparsityPlan | None = None,
    *,
    weights: str = "fp32",
    until: str = "",
    skip_zeros: bool = False,
    facts: OptFacts = FACTS,
) -> Program:
    """A fresh program after the whole schedule, or after the pass `until`."""
    program = traced(sparsity, facts)
    steps = schedule(target="cpu", weights=weights, skip_zeros=skip_zeros, sparse=sparsity is not None)
    if not until:
        run_passes(program, steps)
        return program
    for step in steps:
        step.apply(program)
        if step.name == until:
            return program
    raise KeyError(until)


def filled(program: Program, source: Tensors) -> onnx.ModelProto:
    """The program's graph with its weights, runnable in stock ONNX Runtime."""
    made = to_model(program)
    for names in groups(program.weights):
        arrays = materialise(program.weights, source, names)
        made.graph.initializer.extend(onnx.numpy_helper.from_array(arrays[name], name) for name in names)
    inputs = [value for value in made.graph.input if value.name not in program.weights]
    del made.graph.input[:]
    made.graph.input.extend(inputs)
    return oracle.attach(made)


class Decoder:
    """Feeds a graph piece by piece, with a cache of fixed capacity that starts as NaN."""

    def __init__(self, graph: onnx.ModelProto, batch: int, capacity: int = 16) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 3, 1
        self.session = onnxruntime.InferenceSession(
            graph.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self.outputs = [value.name for value in self.session.get_outputs()]
        self.inputs = {value.name: value.type for value in self.session.get_inputs()}
        self.reset(batch, capacity)

    def reset(self, batch: int, capacity: int = 16) -> None:
        shape = (batch, FACTS.heads, capacity, FACTS.head_size)
        types = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        caches = {name: types[kind] for name, kind in self.inputs.items() if name.startswith("past_key_values.")}
        self.cache = {name: np.full(shape, np.nan, dtype) for name, dtype in caches.items()}

    def __call__(self, ids_BS: np.ndarray, mask_BP: np.ndarray, **dials: np.ndarray) -> dict[str, np.ndarray]:
        feeds = {"input_ids": ids_BS, "attention_mask": mask_BP, **self.cache, **dials}
        found = dict(zip(self.outputs, self.session.run(None, feeds), strict=True))
        self.cache = {name: found[name.replace("past_key_values", "present")] for name in self.cache}
        return found


def dials(heads: float | list[float], neurons: float | list[float] | None = None, tail: int = -1) -> dict:
    """The run-time inputs of a sparse graph."""
    neurons = heads if neurons is None else neurons
    return {
        "density_heads": np.atleast_1d(np.array(heads, np.float32)),
        "density_neurons": np.atleast_1d(np.array(neurons, np.float32)),
        "sparse_tail": np.array([tail], np.int64),
    }


def padded_batch(tokens: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """Two rows of ids and their mask; the second starts with three pads."""
    ids_BS = np.random.default_rng(3).integers(4, FACTS.vocab, (2, tokens))
    mask_BS = np.ones((2, tokens), np.int64)
    mask_BS[1, :3], ids_BS[1, :3] = 0, FACTS.pad
    return ids_BS, mask_BS


def torch_logits(ids_BS: np.ndarray, mask_BS: np.ndarray, facts: OptFacts = FACTS) -> np.ndarray:
    """What transformers computes for all tokens at once."""
    import torch

    with torch.no_grad():
        out = model(facts)(input_ids=torch.from_numpy(ids_BS), attention_mask=torch.from_numpy(mask_BS))
    return out.logits.numpy()
