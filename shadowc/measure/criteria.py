# SPDX-License-Identifier: Apache-2.0
"""What `shadowc criteria` measures, from the model as it was typed to the report: see agreement.py."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.measure.agreement import AgreementReport, measure_agreement
from shadowc.sparsity.calibration import check_data, pack, read_text, tokenise
from shadowc.sparsity.criteria import criterion_names, find_criterion
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shadowc.sparsity.importance import Origin
    from shadowc.spec.progress import Progress


@dataclass(frozen=True, slots=True)
class CriteriaReport:
    """How well criteria rank the units of a model on a text."""

    model: str
    identity: str
    """Hash of the checkpoint."""
    text: str
    """The file's name."""
    text_sha256: str
    agreement: AgreementReport


def measure_criteria(
    origin: Origin,
    data: Path,
    criteria: Sequence[str] | None = None,
    *,
    units: int = 112,
    sequences: int = 16,
    length: int = 64,
    tokens: int = 2,
    seed: int = 0,
    offline: bool = False,
    progress: Progress | None = None,
) -> CriteriaReport:
    """Mask sampled heads and neurons of a model on a text, and correlate every criterion with what that costs.

    Args:
        origin: the model as it was typed.
        data: a .txt or .jsonl file, best one that the model was not trained on.
        criteria: names; None: all.
        units: sampled units of each kind.
        sequences: pieces of the text, spread evenly over it.
        length: tokens of each, bos included.
        tokens: sampled tokens of each sequence at which units are masked alone.
        seed: of the samples, of dummy weights and of the bootstrap.
        offline: do not use the network.
        progress: told about stages.

    Raises:
        InputError: an unknown criterion, a model or text that cannot be used, or no finite numbers.
        UnsupportedError: the model is of a kind that is not handled.
        SetupError: the hub cannot be reached.
    """
    from shadowc.checkpoint.models import resolve_model
    from shadowc.sparsity.reference import load_torch_model
    from shadowc.sparsity.threads import threads_for

    progress = progress or NullProgress()
    names = tuple(dict.fromkeys(criteria)) if criteria is not None else criterion_names()
    for name in names:
        find_criterion(name)
    check_data(str(data))
    documents, text = read_text(data)
    with progress.stage("checkpoint"):
        checkpoint = resolve_model(origin.model, load_format=origin.load_format, offline=offline, seed=origin.seed)
    facts = checkpoint.facts
    less = "fewer --sequences or a smaller --length"
    cut = pack(tokenise(documents, checkpoint), facts, sequences, min(length, facts.positions), data, less)
    with progress.stage("weights"):
        model = load_torch_model(checkpoint)
    work = length * sum(weight.numel() for weight in model.parameters())
    with progress.stage("criteria"), threads_for(work):
        agreement = measure_agreement(model, cut, names, units=units, tokens=tokens, seed=seed, progress=progress)
    return CriteriaReport(facts.name, checkpoint.identity, data.name, text.sha256, agreement)
