# SPDX-License-Identifier: Apache-2.0
"""Engine folders made from the handmade graph, for the tests of emit and runtime."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from shadowc.checkpoint.opt import EMBEDDING, HEAD, OptFacts
from shadowc.emit import folder as engine_folder
from shadowc.emit.target import FIXED, target
from shadowc.passes import fix_mask
from shadowc.spec.density import Density
from shadowc.spec.manifest import EngineManifest, SparsityPart
from shadowc.spec.options import WEIGHTS, CompileOptions
from tests.conftest import TINY
from tests.emit import handmade

if TYPE_CHECKING:
    from transformers import OPTForCausalLM

BLOCK = 16
DENSITY = Density(0.5, 0.5)
KINDS = WEIGHTS["cpu"]


def tiny_facts() -> OptFacts:
    return OptFacts.from_config({**TINY, "model_type": "opt"}, "opt-tiny")


def tensors(model: OPTForCausalLM, block: int = BLOCK) -> handmade.Tensors:
    values = {name: value.numpy() for name, value in model.state_dict().items()}
    values.setdefault(HEAD, values[EMBEDDING])
    return handmade.Tensors({**values, **handmade.predictor_tensors(tiny_facts(), block)})


def write_kinds(parent: Path, model: OPTForCausalLM, tokenizer: Path) -> dict[str, Path]:
    """Engine folders in `parent` by kind: one of every type of weights, dense, and sequence (fp32)."""
    made = {name: parent / f"{name}.engine" for name in (*KINDS, "dense", "sequence")}
    for weights in KINDS:
        write_engine(made[weights], model, tokenizer=tokenizer, weights=weights)
    write_engine(made["dense"], model, tokenizer=tokenizer, sparse=False)
    write_engine(made["sequence"], model, tokenizer=tokenizer, mask="sequence")
    return made


def write_engine(
    out: Path,
    model: OPTForCausalLM,
    *,
    tokenizer: Path | None = None,
    weights: str = "fp32",
    sparse: bool = True,
    skip_zeros: bool = True,
    mask: Literal["token", "sequence"] = "token",
    eos: int | None = None,
) -> EngineManifest:
    """A complete engine folder at `out`; `eos` replaces the end token so that rows can end early."""
    facts = tiny_facts() if eos is None else replace(tiny_facts(), eos=eos)
    names = ("model", FIXED) if mask == "sequence" else ("model",)
    programs = {
        name: handmade.build(facts, block=BLOCK, weights=weights, sparse=sparse, skip_zeros=skip_zeros)
        for name in names
    }
    if mask == "sequence":
        fix_mask.apply(programs[FIXED])
    with engine_folder.staged(out) as staging:
        options = CompileOptions(model="tiny", head_density=DENSITY.heads, neuron_density=DENSITY.neurons, mask=mask)
        emitted = target("cpu").emit(programs, tensors(model), staging, options=options)
        part = engine_folder.model_part(facts, "tiny")
        engine_folder.add_companions(staging, part, tokenizer)
        if sparse:
            rng = np.random.default_rng(5)
            shapes = (facts.predicted_layers, facts.heads), (facts.predicted_layers, facts.ffn // BLOCK)
            rankings = tuple(rng.random(shape, np.float32) for shape in shapes)
            engine_folder.write_controls(staging, {"static": (rankings[0], rankings[1])})
        manifest = EngineManifest(
            producer={"shadowc": "test"},
            target="cpu",
            weights=weights,  # type: ignore[arg-type]  # one of KINDS
            ops=emitted.ops,
            model=part,
            sparsity=SparsityPart(
                mask=mask,
                scope="global",
                head_density=DENSITY.heads,
                neuron_density=DENSITY.neurons,
                neuron_block=BLOCK,
            )
            if sparse
            else None,
            bytes_per_token=emitted.bytes_per_token,
            parity={},
            build_key="test",
            files=engine_folder.file_entries(staging, emitted.files),
        )
        engine_folder.write_manifest(staging, manifest)
    return manifest
