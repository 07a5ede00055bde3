# SPDX-License-Identifier: Apache-2.0
"""An engine folder of the tiny model, made once."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.emit import engines

if TYPE_CHECKING:
    from transformers import OPTForCausalLM


@pytest.fixture(scope="session")
def engine_folder(tiny_model: OPTForCausalLM, tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """fp32, sparse, with tokenizer. Read only."""
    out = tmp_path_factory.mktemp("emit") / "tiny.engine"
    engines.write_engine(out, tiny_model, tokenizer=tiny_checkpoint)
    return out
