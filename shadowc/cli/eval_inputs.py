# SPDX-License-Identifier: Apache-2.0
"""What was typed after `shadowc eval`, checked, as models, corpora and settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, get_args

from shadowc.cli import flags

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from shadowc.eval.corpus import Corpus
    from shadowc.eval.model import EvaluatedModel
    from shadowc.eval.request import Protocol, Setting
    from shadowc.eval.task import Task
    from shadowc.sparsity.kept import Kept
    from shadowc.spec.density import Density
    from shadowc.spec.progress import Progress


@dataclass(frozen=True, slots=True)
class Subject:
    """Of whom the quality is measured: an engine, or a checkpoint with its predictor."""

    engine: Path | None
    model: str | None
    predictor: Path | None
    load_format: flags.LoadFormat
    offline: bool
    refresh: int | None
    threads: int | None
    seed: int
    kept: Kept

    def load(self, progress: Progress) -> EvaluatedModel:
        """Load it.

        Raises:
            InputError: neither or both were given, or it cannot be used.
            UnsupportedError, SetupError, VerificationError, IncompatibleEngineError: it cannot be loaded.
        """
        from shadowc.eval.load import engine_model, torch_model
        from shadowc.sparsity.importance import Origin
        from shadowc.spec.errors import InputError

        if self.model is not None and self.engine is None:
            origin = Origin(self.model, self.load_format, self.seed)
            return torch_model(origin, self.predictor, kept=self.kept, offline=self.offline, progress=progress)
        if self.engine is not None and self.model is None:
            return engine_model(self.engine, threads=self.threads, refresh=self.refresh, seed=self.seed)
        found = "both" if self.model is not None else "neither"
        raise InputError(
            f"eval takes an engine folder or a model, found {found}",
            hint="shadowc eval ENGINE --text FILE, or shadowc eval --model MODEL --text FILE",
        )


@dataclass(frozen=True, slots=True)
class Masks:
    """Under which masks."""

    methods: tuple[str, ...]
    """Empty: all that there are."""
    densities: tuple[Density, ...]
    protocols: tuple[Protocol, ...]
    """Empty: the model's own."""
    scopes: tuple[str, ...]
    prompt_tokens: int | None

    @staticmethod
    def read(
        methods: str | None, densities: str, protocol: str | None, scope: str | None, prompt_tokens: int | None
    ) -> Masks:
        """Read the flags.

        Raises:
            InputError: an entry of a list is not known; all that are known are listed.
        """
        from shadowc.eval.model import METHODS, RANKING, REFERENCE_PROTOCOLS
        from shadowc.eval.request import BY_THRESHOLD, protocol_named

        return Masks(
            _known(methods, (*METHODS, *BY_THRESHOLD, *REFERENCE_PROTOCOLS), "method", "--methods", RANKING),
            flags.densities_of(densities),
            tuple(map(protocol_named, _listed(protocol))),
            _known(scope, get_args(flags.Scope), "scope", "--scope") or ("",),
            prompt_tokens,
        )

    def settings(self, model: EvaluatedModel) -> list[Setting]:
        """Every combination for a model."""
        from shadowc.eval.run import settings_of

        protocols = self.protocols or model.protocols[:1]
        return settings_of(self.methods or model.methods, self.densities, protocols, self.scopes, self.prompt_tokens)


@dataclass(frozen=True, slots=True)
class Ground:
    """On what."""

    text: Path | None
    wikitext: Path | None
    tasks: Path | None
    chosen: tuple[Task, ...]
    shots: tuple[int, ...]
    window: int | None
    limit: int | None

    @staticmethod
    def read(
        text: Path | None,
        wikitext: Path | None,
        tasks: Path | None,
        task: str,
        shots: str,
        window: int | None,
        limit: int | None,
    ) -> Ground:
        """Read the flags.

        Raises:
            InputError: there is nothing, a task is not known, or shots are no numbers.
        """
        from shadowc.eval.task import tasks_named
        from shadowc.spec.errors import InputError

        if text is None and wikitext is None and tasks is None:
            raise InputError(
                "eval needs something to evaluate on", hint="--text FILE, --wikitext FILE or --tasks FOLDER"
            )
        counts = _listed(shots)
        if not counts or not all(count.isdecimal() for count in counts):
            raise InputError(f"--shots takes numbers such as 0,5; found {shots!r}", hint="--shots 0,5")
        once = tuple(dict.fromkeys(map(int, counts)))
        return Ground(text, wikitext, tasks, tasks_named(task), once, window, limit)

    def corpora(self, model: EvaluatedModel) -> Iterator[Corpus]:
        """Read and tokenise everything.

        Raises:
            InputError: a file cannot be used, or calibrated the predictor.
        """
        from shadowc.eval.task_corpus import task_corpus
        from shadowc.eval.texts import text_corpus, wikitext_corpus

        if self.text is not None:
            yield text_corpus(model, self.text, self.window, self.limit)
        if self.wikitext is not None:
            yield wikitext_corpus(model, self.wikitext, self.window, self.limit)
        if self.tasks is not None:
            for shots in self.shots:
                for task in self.chosen:
                    yield task_corpus(model, self.tasks, task, shots, self.limit)


def _known(text: str | None, known: tuple[str, ...], what: str, flag: str, begun: str = "") -> tuple[str, ...]:
    """Read a list of names; those that begin with `begun` are known to what is loaded later."""
    from shadowc.spec.errors import InputError

    found = _listed(text)
    unknown = [name for name in found if name not in known and not (begun and name.startswith(begun))]
    if unknown:
        raise InputError(f"unknown {what} {', '.join(map(repr, unknown))}", hint=f"{flag} takes {', '.join(known)}")
    return found


def _listed(text: str | None) -> tuple[str, ...]:
    return () if text is None else tuple(entry.strip() for entry in text.split(",") if entry.strip())
