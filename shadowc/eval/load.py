# SPDX-License-Identifier: Apache-2.0
"""From what was typed to a model that can be evaluated: a checkpoint with its predictor, or an engine folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.sparsity.kept import NOTHING, Kept
from shadowc.spec.errors import InputError
from shadowc.spec.progress import NullProgress

if TYPE_CHECKING:
    from shadowc.eval.engine_model import EngineModel
    from shadowc.eval.torch_model import TorchModel
    from shadowc.sparsity.importance import Origin
    from shadowc.spec.options import Scope
    from shadowc.spec.progress import Progress


def torch_model(
    origin: Origin,
    predictor: Path | None = None,
    *,
    scope: Scope | None = None,
    kept: Kept = NOTHING,
    offline: bool = False,
    progress: Progress | None = None,
) -> TorchModel:
    """Load a checkpoint, and the predictor that was trained on it.

    Args:
        origin: the model as it was typed.
        predictor: its folder; None: the model is evaluated dense, and under masks that need none.
        scope: of the ranking; None: the widest that the predictor allows.
        kept: what all masks leave.
        offline: do not use the network.
        progress: told about stages.

    Raises:
        InputError: the model or the predictor cannot be used, or the predictor was trained on another checkpoint.
        UnsupportedError: the model is of a kind that is not handled.
        SetupError: the hub cannot be reached.
    """
    from shadowc.checkpoint.finite import check_finite
    from shadowc.checkpoint.models import resolve_model
    from shadowc.eval.torch_model import TorchModel
    from shadowc.sparsity.predictor import Predictor, check_folder
    from shadowc.sparsity.reference import load_torch_model
    from shadowc.sparsity.trained_on import trained_on_another

    progress = progress or NullProgress()
    if predictor is not None:
        check_folder(predictor)
    with progress.stage("checkpoint"):
        checkpoint = resolve_model(
            origin.model,
            load_format=origin.load_format,
            offline=offline,
            seed=origin.seed,
            advance=lambda done, total: progress.advance(done >> 20, total >> 20, "MiB"),
        )
    found = None
    kept.check(checkpoint.facts)
    if predictor is not None:
        found = Predictor.load(predictor, checkpoint.facts)
        another = trained_on_another(found.meta, predictor, checkpoint.described, origin.model)
        if another is not None:
            raise InputError(
                another, hint=f"shadowc train {origin.flags}, or name the checkpoint that it was trained on"
            )
        found.scope(scope)  # refused before weights are read
    with progress.stage("weights"):
        check_finite(checkpoint, progress.advance)
        model = load_torch_model(checkpoint)
    return TorchModel(model, checkpoint, found, scope=scope, seed=origin.seed, kept=kept)


def engine_model(folder: Path, *, threads: int | None = None, refresh: int | None = None, seed: int = 0) -> EngineModel:
    """Load an engine; dense text is read with the digits that masked text is read with.

    Raises:
        InputError, IncompatibleEngineError, VerificationError, SetupError: it cannot be loaded.
    """
    from shadowc.eval.engine_model import EngineModel
    from shadowc.runtime.load import load, read_manifest

    exact = read_manifest(folder).tensorrt is None
    return EngineModel(load(folder, threads=threads, refresh=refresh, exact_prompts=exact), seed)
