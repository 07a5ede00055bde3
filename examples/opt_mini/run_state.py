# SPDX-License-Identifier: Apache-2.0
"""What a training run keeps on disk: the prepared corpus, the state to resume from, the log, the control files.

Everything is plain: JSON, `.npy` and safetensors. A file is written beside its place and renamed, so a killed
run leaves the old file or the new one.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

import corpus
import tokens

STATE, FINAL, LOG, TOKENIZER = "state.safetensors", "final.safetensors", "log.jsonl", "tokenizer.json"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path`; it takes the place of `path` when the block ends well."""
    beside = path.with_name(path.name + ".part")
    yield beside
    beside.chmod(0o644)  # safetensors writes files that only their owner can read
    beside.replace(path)


@dataclass(frozen=True, slots=True)
class Corpus:
    """The training stream and the held-out documents, as ids."""

    tokenizer: Tokenizer
    train: tokens.Ids
    held_out: dict[str, list[tokens.Ids]]  # by source
    token_bytes: NDArray[np.int64]


def prepare_corpus(paths: Sequence[Path], out: Path, vocab: int, seed: int) -> Corpus:
    """Read and split the texts, train the tokenizer and encode; a second call in the same folder reuses both."""
    out.mkdir(parents=True, exist_ok=True)
    parts = corpus.load(paths)
    train_texts = [part.train for part in parts if part.train]
    tokenizer_path, stream_path = out / TOKENIZER, out / "train.npy"
    if not tokenizer_path.exists():
        with replacing(tokenizer_path) as beside:
            tokens.train_tokenizer(train_texts, vocab).save(str(beside))
    tokenizer = Tokenizer.from_file(str(tokenizer_path))
    if not stream_path.exists():
        order = np.random.default_rng(seed).permutation(len(train_texts))
        stream = np.concatenate(tokens.encode_documents(tokenizer, [train_texts[i] for i in order]))
        with replacing(stream_path) as beside, beside.open("wb") as file:
            np.save(file, stream)
    held_out = {
        source: tokens.encode_documents(tokenizer, [p.held_out for p in parts if p.source == source and p.held_out])
        for source in corpus.sources(parts)
    }
    return Corpus(tokenizer, np.load(stream_path), held_out, tokens.token_bytes(tokenizer))


class Windows:
    """The endless order of training windows: a pure function of the seed, so a position is one number.

    Each pass over the stream cuts it at a new offset and visits the windows in a new order.
    """

    def __init__(self, stream: tokens.Ids, length: int, seed: int) -> None:
        """Cut windows of `length` inputs (and one more id, the last target)."""
        self.stream, self.length, self.seed = stream, length, seed
        self.per_pass = (len(stream) - 1) // length - 1
        if self.per_pass < 1:
            raise SystemExit(f"training text has {len(stream)} tokens; two windows of {length} are the least")
        self._pass: tuple[int, int, NDArray[np.int64]] | None = None

    def take(self, first: int, count: int) -> Tensor:
        """Return windows number `first` to `first + count` as one [count, length + 1] tensor."""
        rows = []
        for number in range(first, first + count):
            offset, order = self._order(number // self.per_pass)
            start = offset + int(order[number % self.per_pass]) * self.length
            rows.append(self.stream[start : start + self.length + 1])
        return torch.from_numpy(np.stack(rows).astype(np.int64))

    def _order(self, visit: int) -> tuple[int, NDArray[np.int64]]:
        if self._pass is None or self._pass[0] != visit:
            rng = np.random.default_rng([self.seed, visit])
            self._pass = (visit, int(rng.integers(self.length)), rng.permutation(self.per_pass))
        return self._pass[1:]


@dataclass(slots=True)
class Progress:
    """Where a run stands."""

    step: int = 0
    windows: int = 0
    seconds: float = 0.0


def adopt_tokenizer(exported: Path, out: Path) -> None:
    """Use the tokenizer of an exported folder in a run that starts from its weights."""
    out.mkdir(parents=True, exist_ok=True)
    with replacing(out / TOKENIZER) as beside:
        shutil.copyfile(exported / TOKENIZER, beside)


def exported_progress(exported: Path, window: int) -> Progress:
    """Where the run of an exported folder stood in the text and in time; its steps are not counted on."""
    report = json.loads((exported / "report.json").read_text(encoding="utf-8"))
    return Progress(windows=int(report["tokens_seen"]) // window, seconds=float(report["training_seconds"]))


def save_state(path: Path, tensors: dict[str, Tensor], progress: Progress) -> None:
    """Write weights, moments and position."""
    numbers = {"step": progress.step, "windows": progress.windows, "seconds": progress.seconds}
    with replacing(path) as beside:
        save_file(
            {name: t.detach().contiguous() for name, t in tensors.items()},
            beside,
            {"progress": json.dumps(numbers)},
        )


def load_state(path: Path) -> tuple[dict[str, Tensor], Progress]:
    """Read what `save_state` wrote."""
    if not path.exists():
        raise SystemExit(f"{path}: no state to resume from; start without --resume")
    with safe_open(path, framework="pt") as file:
        names: Iterable[str] = file.keys()
        return {name: file.get_tensor(name) for name in names}, Progress(**json.loads(file.metadata()["progress"]))


class Log:
    """The run's log: one JSON object a line."""

    def __init__(self, path: Path, keep_steps: int) -> None:
        """Open the log; lines after step `keep_steps` belong to work that is about to be done again."""
        self.path = path
        kept = [line for line in self.read(path) if int(str(line["step"])) <= keep_steps]
        path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")

    def append(self, line: dict[str, object]) -> None:
        """Add a line."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    @staticmethod
    def read(path: Path) -> list[dict[str, object]]:
        """Return the lines of a log file."""
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


class Control:
    """Two files that steer a run from outside: `PAUSE` while it exists, `FINISH` once."""

    def __init__(self, folder: Path | None) -> None:
        """Watch `folder`; None watches nothing."""
        self.folder = folder
        self.paused = 0.0  # seconds slept so far
        self._one_sleeper = threading.Lock()  # of several workers, one counts the time

    def wait_while_paused(self) -> None:
        """Sleep as long as the pause file is there."""
        with self._one_sleeper:
            start = time.monotonic()
            while self.folder and (self.folder / "PAUSE").exists():
                time.sleep(0.5)
            self.paused += time.monotonic() - start

    def wants_end(self) -> bool:
        """Say whether the run should begin its last phase."""
        return self.folder is not None and (self.folder / "FINISH").exists()

    def forget_end(self) -> None:
        """Remove the request once it is obeyed, so that a resumed run does not end at once."""
        if self.folder is not None:
            (self.folder / "FINISH").unlink(missing_ok=True)
