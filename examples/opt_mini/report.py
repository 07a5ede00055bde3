# SPDX-License-Identifier: Apache-2.0
"""Judge an exported opt-mini on the held-out texts, beside Kneser-Ney: writes report.json.

In: the exported folder, the texts, the log of the run, the result of `kneser_ney.py`. Out: bits per byte by
source, the share of zeros behind each ReLU, and a short loss curve. Every document starts with `</s>`; windows
of 512 ids move by 256, and a token is scored in the first window that holds it, so each byte counts once and,
but for the start of a document, is seen behind at least 256 ids. `</s>` itself is not scored. Kneser-Ney is
scored on the same tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import OPTForCausalLM

import opt_model
import run_state
from tokens import Ids

BATCH = 4
CURVE_POINTS = 12


class ReluZeros:
    """Counts the zeros behind the ReLU of each layer, and in how many tokens each neuron fires."""

    def __init__(self, model: OPTForCausalLM) -> None:
        """Hook the first matrix of each FFN; its output is what the ReLU sees."""
        layers = model.model.decoder.layers
        self.fired = [torch.zeros(model.config.ffn_dim, dtype=torch.int64) for _ in layers]
        self.tokens = 0
        self.scored: Tensor | None = None  # [B, T]: which positions are counted, set before each call
        for fired, layer in zip(self.fired, layers, strict=True):
            layer.fc1.register_forward_hook(self._hook(fired))

    def _hook(self, fired: Tensor) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            assert self.scored is not None
            fired.add_((output.view(-1, output.shape[-1]) > 0)[self.scored.flatten()].sum(dim=0))

        return count

    def shares(self) -> dict[str, list[float]]:
        """Return by layer: the mean share of zeros, and the share of neurons that never fired."""
        zeros = [1 - float(fired.sum()) / (self.tokens * len(fired)) for fired in self.fired]
        dead = [float((fired == 0).float().mean()) for fired in self.fired]
        return {"zeros": [round(z, 4) for z in zeros], "neurons_never_active": [round(d, 4) for d in dead]}


def windows(ids: Ids, length: int, stride: int) -> Iterator[tuple[Tensor, int]]:
    """Yield windows of a document and the place in each of the first id to be scored."""
    whole = torch.from_numpy(ids.astype("int64"))
    scored_up_to = 1  # the first id is given
    for start in range(0, max(1, len(whole) - 1), stride):
        window = whole[start : start + length]
        if start + len(window) <= scored_up_to:
            return
        yield window, scored_up_to - start
        scored_up_to = start + len(window)


@torch.no_grad()
def model_bits(model: OPTForCausalLM, documents: Sequence[Ids], zeros: ReluZeros | None, stride: int) -> float:
    """Return the bits that the model needs for the documents."""
    length = int(model.config.max_position_embeddings)
    todo = [pair for ids in documents for pair in windows(ids, length, stride)]
    todo.sort(key=lambda pair: len(pair[0]))  # batches of like length waste little on padding
    bits = 0.0
    for start in range(0, len(todo), BATCH):
        batch = todo[start : start + BATCH]
        ids_BT = nn.utils.rnn.pad_sequence([w for w, _ in batch], batch_first=True, padding_value=opt_model.PAD_ID)
        scored = torch.zeros_like(ids_BT, dtype=torch.bool)
        for row, (window, first) in enumerate(batch):
            scored[row, first : len(window)] = True
        if zeros is not None:
            zeros.scored = scored.roll(-1, dims=1)  # the position that predicts an id is the one before it
            zeros.tokens += int(scored.sum())
        logits = model(input_ids=ids_BT, attention_mask=torch.ones_like(ids_BT)).logits[:, :-1]
        nats = F.cross_entropy(logits.flatten(0, 1).float(), ids_BT[:, 1:].flatten(), reduction="none")
        bits += float(nats[scored[:, 1:].flatten()].double().sum()) / math.log(2)
    return bits


def loss_curve(log: Path) -> list[dict[str, object]]:
    """Return about a dozen lines of the log, evenly spaced in tokens, the last one included."""
    lines = run_state.Log.read(log)
    count = min(CURVE_POINTS, len(lines))
    picked = sorted({round(i * (len(lines) - 1) / max(1, count - 1)) for i in range(count)})
    keys = ("tokens", "phase", "train_loss", "heldout_bpb")
    return [{key: lines[i][key] for key in keys} for i in picked]


def main() -> None:
    """Write the report."""
    parser = argparse.ArgumentParser(description="Evaluate an exported opt-mini on held-out text.")
    parser.add_argument("--model", type=Path, required=True, help="exported folder")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help="the files that train.py was given")
    parser.add_argument("--run", type=Path, required=True, help="folder of the run")
    parser.add_argument("--kneser-ney", type=Path, required=True, help="JSON file that kneser_ney.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--stride", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    a = parser.parse_args()
    torch.set_num_threads(a.threads)
    corpus = run_state.prepare_corpus(a.text, a.run, vocab=0, seed=0)
    model = OPTForCausalLM.from_pretrained(a.model, dtype=torch.float32).eval()
    zeros = ReluZeros(model)
    bits, size = {}, {}
    for source, documents in corpus.held_out.items():
        bits[source] = model_bits(model, documents, zeros, a.stride)
        size[source] = int(sum(corpus.token_bytes[ids].sum() for ids in documents))
        sys.stderr.write(f"{source}: {bits[source] / size[source]:.4f} bits per byte of {size[source]}\n")
    ours = {source: round(bits[source] / size[source], 4) for source in bits}
    ours["all"] = round(sum(bits.values()) / sum(size.values()), 4)
    kneser_ney = json.loads(a.kneser_ney.read_text(encoding="utf-8"))
    if kneser_ney["bytes"] != size:
        raise SystemExit(f"{a.kneser_ney}: made on other held-out text: {kneser_ney['bytes']}, here {size}")
    length = int(model.config.max_position_embeddings)
    _, progress = run_state.load_state(a.run / run_state.FINAL)
    report = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "tokens_seen": progress.windows * length,
        "training_tokens": len(corpus.train),
        "training_seconds": round(progress.seconds),
        "protocol": {"context": length, "stride": a.stride, "weights": "fp16, run in fp32"},
        "heldout_bytes": size,
        "bits_per_byte": {"opt-mini": ours, "kneser-ney-5": kneser_ney["bits_per_byte"]},
        "relu_by_layer": zeros.shares(),
        "curve": loss_curve(a.run / run_state.LOG),
    }
    with run_state.replacing(a.out) as beside:
        beside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
