# SPDX-License-Identifier: Apache-2.0
"""Train opt-mini from scratch on text files, on a CPU, for as long as one likes.

In: text. Out, in one folder: tokenizer.json, log.jsonl, state.safetensors (to resume from) and, after the
decay phase, final.safetensors, which `export.py` turns into a Hugging Face folder. The learning rate stays on a
plateau until the end is asked for (`--minutes`, `--steps` or the file FINISH in the `--control` folder), then
falls to zero over 15 % of the steps made so far, 12 minutes at most. The state is from before that fall, so a
finished run can be resumed and finished again later. `--init` starts from the weights of an exported folder, at the
place in the text where its run stopped: for those who have the published weights but not the state. PAUSE in the
`--control` folder halts the run while it exists. Ctrl-C saves the state and stops. The same options and number of
threads give the same bits.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # a waiting thread must not take time from other programs

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from torch import Tensor

import opt_model
import run_state
from optimiser import Optimiser, Rates, schedule

DECAY_SHARE = 0.15
LOSS_MEMORY = 0.95  # of the running mean of the training loss


@dataclass(frozen=True, slots=True)
class Options:
    """What a run depends on."""

    text: tuple[Path, ...]
    out: Path
    minutes: float | None = None  # of this call, decay included
    steps: int | None = None  # of the whole run, decay included
    resume: bool = False
    control: Path | None = None
    init: Path | None = None  # exported folder to start from
    stop_after: int | None = None  # behave as if interrupted after this many steps
    shape: opt_model.Shape = field(default_factory=opt_model.Shape)
    window: int = 512
    micro_batch: int = 2
    accumulate: int = 8
    seed: int = 1
    threads: int = 2
    compile: bool = True
    dtype: torch.dtype = torch.bfloat16
    evaluate_every: int = 100
    save_every_minutes: float = 5.0
    max_decay_minutes: float = 12.0
    rates: Rates = field(default_factory=Rates)


class HeldOut:
    """A fixed sample of held-out windows, a few from each source."""

    def __init__(self, corpus: run_state.Corpus, window: int, per_source: int = 12) -> None:
        """Take evenly spaced windows of each source's held-out stream."""
        self.sizes = torch.from_numpy(corpus.token_bytes)
        self.windows: dict[str, Tensor] = {}
        for source, documents in corpus.held_out.items():
            stream = torch.cat([torch.from_numpy(ids.astype("int64")) for ids in documents])
            count = min(per_source, (len(stream) - 1) // window)
            starts = [int(i * (len(stream) - window - 1) / max(1, count - 1)) for i in range(count)]
            if starts:
                self.windows[source] = torch.stack([stream[s : s + window + 1] for s in starts])

    @torch.no_grad()
    def bits_per_byte(self, params: opt_model.Params, heads: int, dtype: torch.dtype) -> dict[str, float]:
        """Return bits per byte of each source and over all of them; the start token is not counted."""
        bits, size = dict.fromkeys(self.windows, 0.0), dict.fromkeys(self.windows, 0)
        for source, windows in self.windows.items():
            for batch in torch.split(windows, 4):
                states = opt_model.hidden_states(params, batch[:, :-1], heads, dtype)
                logits = F.linear(states, params["embed"].to(dtype)).float().flatten(0, 1)
                target = batch[:, 1:].flatten()
                loss = F.cross_entropy(logits, target, reduction="none")
                bits[source] += float(loss[target != opt_model.EOS_ID].sum()) / math.log(2)
                size[source] += int(self.sizes[target].sum())
        result = {source: bits[source] / max(1, size[source]) for source in self.windows}
        return result | {"all": sum(bits.values()) / max(1, sum(size.values()))}


class Trainer:
    """One run: parameters, optimiser, position."""

    def __init__(self, options: Options, console: Console) -> None:
        """Prepare text and parameters, or read the saved state."""
        self.options, self.console = options, console
        torch.set_num_threads(options.threads)
        torch.manual_seed(options.seed)
        if options.init and not options.resume:
            run_state.adopt_tokenizer(options.init, options.out)
        self.corpus = run_state.prepare_corpus(options.text, options.out, options.shape.vocab, options.seed)
        self.windows = run_state.Windows(self.corpus.train, options.window, options.seed)
        self.held_out = HeldOut(self.corpus, options.window)
        self.params = opt_model.init_params(options.shape, options.seed)
        self.optimiser = Optimiser(self.params, options.rates)
        self.at = run_state.Progress()
        if options.resume:
            self._load()
        elif options.init:
            self.params = opt_model.from_hf(load_file(options.init / "model.safetensors"), options.shape)
            self.at = run_state.exported_progress(options.init, options.window)
        for p in self.params.values():
            p.requires_grad_()
        self.log = run_state.Log(options.out / run_state.LOG, self.at.step)
        self.control = run_state.Control(options.control)
        self.loss_of: Callable[..., Tensor] = opt_model.mean_loss
        if options.compile:
            self.loss_of = torch.compile(opt_model.mean_loss, options={"cpp.threads": 1})
        # One micro-batch a thread, each on one core: threads that share every operation wait for each other, and
        # on a busy machine that costs more than half of the speed.
        self.pool = ThreadPoolExecutor(options.threads, initializer=torch.set_num_threads, initargs=(1,))
        self.compiled = not options.compile
        self.interrupted = False
        self.mean_loss = 0.0
        console.print(f"{len(self.corpus.train):,} training tokens, {self.windows.per_pass:,} windows a pass")

    def _load(self) -> None:
        tensors, self.at = run_state.load_state(self.options.out / run_state.STATE)
        for name, target in (self.params | self.optimiser.state).items():
            target.copy_(tensors[name])

    def save(self) -> None:
        """Write the state to resume from."""
        path = self.options.out / run_state.STATE
        run_state.save_state(path, self.params | self.optimiser.state, self.at)

    def step(self, scale: float) -> None:
        """Make one optimiser step."""
        options = self.options
        started, paused = time.monotonic(), self.control.paused
        size = options.micro_batch
        batches = [self.windows.take(self.at.windows + i * size, size) for i in range(options.accumulate)]
        self.at.windows += size * options.accumulate
        work = []
        for batch in batches:
            work.append(self.pool.submit(self._gradients, batch))
            if not self.compiled:  # alone, so that it is compiled once
                work[-1].result()
                self.compiled = True
        results = [one.result() for one in work]  # summed in this order, so that a step is always the same bits
        mean = {name: torch.stack([grads[i] for _, grads in results]).mean(dim=0) for i, name in enumerate(self.params)}
        self.at.step += 1
        self.optimiser.step(self.params, mean, self.at.step, scale)
        self.at.seconds += time.monotonic() - started - (self.control.paused - paused)
        latest = sum(loss for loss, _ in results) / options.accumulate
        self.mean_loss = LOSS_MEMORY * (self.mean_loss or latest) + (1 - LOSS_MEMORY) * latest

    def _gradients(self, batch: Tensor) -> tuple[float, tuple[Tensor, ...]]:
        self.control.wait_while_paused()
        loss = self.loss_of(self.params, batch, self.options.shape.heads, self.options.dtype)
        return float(loss.detach()), torch.autograd.grad(loss, list(self.params.values()))

    def report(self, phase: str, speed: float) -> None:
        """Log the running training loss and the held-out bits per byte."""
        bpb = self.held_out.bits_per_byte(self.params, self.options.shape.heads, self.options.dtype)
        count = self.at.windows * self.options.window
        rounded = {source: round(value, 4) for source, value in bpb.items()}
        line = {"step": self.at.step, "tokens": count, "seconds": round(self.at.seconds), "phase": phase}
        line |= {"tokens_per_second": round(speed), "train_loss": round(self.mean_loss, 4)}
        self.log.append(line | {"heldout_bpb": rounded})
        self.console.print(
            f"step {self.at.step}  {count / 1e6:.2f}M tokens  {speed:.0f} tokens/s  {phase}  "
            f"train {self.mean_loss:.3f}  held-out bits/byte {rounded}"
        )

    def run(self) -> bool:
        """Train until the end is due; return whether the decay phase was completed."""
        options, first = self.options, self.at.step
        begun, saved = self.at.seconds, self.at.seconds
        decay_start: int | None = None
        decay_steps = 0
        recent: list[float] = []  # seconds of the last steps
        tokens_a_step = options.micro_batch * options.accumulate * options.window
        columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
        with Progress(*columns, console=self.console) as bar:
            task = bar.add_task("training", total=options.steps)
            while decay_start is None or self.at.step < decay_start + decay_steps:
                pace = sum(recent) / len(recent) if recent else 1.0
                if decay_start is None:
                    length = max(1, min(int(self.at.step * DECAY_SHARE), int(options.max_decay_minutes * 60 / pace)))
                    if self._end_is_due(first, begun, length, pace):
                        decay_start, decay_steps = self.at.step, self._decay_steps(length)
                        self.save()
                        self.control.forget_end()
                        self.console.print(f"decay phase: {decay_steps} steps")
                before = self.at.seconds
                self.step(schedule(self.at.step, options.rates.warmup_steps, decay_start, decay_steps))
                recent = [*recent[-19:], self.at.seconds - before]
                speed = tokens_a_step * len(recent) / sum(recent)
                phase = "plateau" if decay_start is None else "decay"
                text = f"{phase} {self.mean_loss:.3f} {speed:.0f} tokens/s"
                bar.update(task, completed=self.at.step, description=text)
                if self.at.step % options.evaluate_every == 0:
                    self.report(phase, speed)
                if decay_start is None and self.at.seconds - saved > options.save_every_minutes * 60:
                    self.save()
                    saved = self.at.seconds
                if self.interrupted or self.at.step - first == options.stop_after:
                    if decay_start is None:
                        self.save()
                    return False
        self.report("end", tokens_a_step * len(recent) / sum(recent))
        run_state.save_state(options.out / run_state.FINAL, dict(self.params), self.at)
        return True

    def _end_is_due(self, first: int, begun: float, length: int, pace: float) -> bool:
        options = self.options
        if options.steps is not None and self.at.step >= math.ceil(options.steps / (1 + DECAY_SHARE)):
            return True
        if self.at.step == first:  # at least one step, and a pace to count with
            return False
        minutes = (self.at.seconds - begun + length * pace) / 60
        return self.control.wants_end() or (options.minutes is not None and minutes >= options.minutes)

    def _decay_steps(self, length: int) -> int:
        return max(1, self.options.steps - self.at.step) if self.options.steps is not None else length


def train(options: Options, console: Console | None = None) -> bool:
    """Run the training that the options describe; return whether it reached its end."""
    trainer = Trainer(options, console or Console(stderr=True))

    def interrupt(_signal: int, _frame: object) -> None:
        trainer.interrupted = True
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a second Ctrl-C does not wait

    previous = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return trainer.run()
    finally:
        trainer.pool.shutdown()
        for number, handler in previous.items():
            signal.signal(number, handler)


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description="Train opt-mini from scratch.")
    parser.add_argument("--text", type=Path, nargs="+", required=True, help=".txt or .jsonl files, also .xz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument("--minutes", type=float, help="length of this call, decay phase included")
    parser.add_argument("--steps", type=int, help="length of the whole run in steps, decay phase included")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --out")
    parser.add_argument("--init", type=Path, help="exported folder whose weights to start from; not with --resume")
    parser.add_argument("--control", type=Path, help="folder to watch for the files PAUSE and FINISH")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=8, help="a step's batch in units of 1024 tokens")
    parser.add_argument("--no-compile", action="store_true", help="run without torch.compile")
    a = parser.parse_args(arguments)
    options = Options(tuple(a.text), a.out, a.minutes, a.steps, a.resume, a.control, a.init)
    options = replace(options, accumulate=a.accumulate)
    return replace(options, threads=a.threads, seed=a.seed, compile=not a.no_compile)


def main() -> None:
    """Train."""
    if not train(parse()):
        Console(stderr=True).print("stopped; go on with --resume")


if __name__ == "__main__":
    main()
