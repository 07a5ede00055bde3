# SPDX-License-Identifier: Apache-2.0
"""Turn a training run into a folder that transformers loads: fp16 weights, config, tokenizer.

In: the folder of a run. Out: model.safetensors, config.json, generation_config.json, tokenizer.json,
tokenizer_config.json and special_tokens_map.json, named and laid out as the published OPT checkpoints are.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer

import opt_model
import run_state
from tokens import SPECIAL


def export(run: Path, out: Path, shape: opt_model.Shape, *, early: bool = False) -> None:
    """Write the folder; `early` takes the state of a run that has not had its decay phase."""
    tensors, progress = run_state.load_state(run / (run_state.STATE if early else run_state.FINAL))
    params = {name: tensors[name] for name in opt_model.init_params(shape, 0)}
    out.mkdir(parents=True, exist_ok=True)
    with run_state.replacing(out / "model.safetensors") as beside:
        save_file(opt_model.to_hf(params, torch.float16), beside, {"format": "pt"})
    text = {
        "config.json": opt_model.hf_config(shape),
        "generation_config.json": _generation_config(),
        "tokenizer_config.json": _tokenizer_config(shape),
        "special_tokens_map.json": _special_tokens(),
    }
    for name, content in text.items():
        with run_state.replacing(out / name) as beside:
            beside.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    Tokenizer.from_file(str(run / run_state.TOKENIZER)).save(str(out / "tokenizer.json"), pretty=False)
    size = (out / "model.safetensors").stat().st_size
    sys.stderr.write(f"{out}: step {progress.step}, {size / 1e6:.1f} MB of weights\n")


def _special_tokens() -> dict[str, str]:
    end = SPECIAL[opt_model.EOS_ID]
    pad, unknown = SPECIAL[opt_model.PAD_ID], SPECIAL[opt_model.UNK_ID]
    return {"bos_token": end, "eos_token": end, "pad_token": pad, "unk_token": unknown}


def _tokenizer_config(shape: opt_model.Shape) -> dict[str, object]:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": shape.positions,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        **_special_tokens(),
    }


def _generation_config() -> dict[str, object]:
    return {
        "bos_token_id": opt_model.EOS_ID,
        "eos_token_id": opt_model.EOS_ID,
        "pad_token_id": opt_model.PAD_ID,
    }


def main() -> None:
    """Export a run."""
    parser = argparse.ArgumentParser(description="Export a training run as a Hugging Face folder.")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--early", action="store_true", help="take the state before the decay phase")
    a = parser.parse_args()
    export(a.run, a.out, opt_model.Shape(), early=a.early)


if __name__ == "__main__":
    main()
