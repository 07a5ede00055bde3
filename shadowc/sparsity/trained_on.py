# SPDX-License-Identifier: Apache-2.0
"""Whose predictor is it: the checkpoint's own, or that of another of the same shape (fine-tuned copies share one)?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowc.checkpoint.digest import differing_part

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


def trained_on_another(meta: Mapping[str, object], folder: Path, model: Mapping[str, str], typed: str) -> str | None:
    """Tell that a predictor's trace came from another checkpoint, with both hashes; None: it did not, or is not known.

    Args:
        meta: the predictor's.
        folder: where it is.
        model: `ModelCheckpoint.described` of the checkpoint.
        typed: the checkpoint as the user named it.
    """
    told = meta.get("model")
    known = told if isinstance(told, dict) else {}
    trained = str(known.get("identity") or "")
    if not trained or trained == model["identity"]:
        return None
    return (
        f"the predictor in {folder} was trained on another checkpoint: model hash {trained[:16]} "
        f"({known.get('name')}), and {typed} has {model['identity'][:16]}; {differing_part(known, model)}"
    )
