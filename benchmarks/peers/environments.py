# SPDX-License-Identifier: Apache-2.0
"""One virtual environment per runtime, with pinned versions, made by pip and kept until the pins change.

Environments are apart because the runtimes do not agree: on the version of transformers, and `onnxruntime` must
not lie beside the `onnxruntime-gpu` that shadowc uses.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

TORCH = "torch==2.13.0"
PINS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "openvino": (
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "optimum-intel==2.2.0",
            "nncf==3.4.0",
            "transformers==5.5.4",
            TORCH,
        ),
        "ctranslate2": ("ctranslate2==4.8.5", "transformers==5.24.0", TORCH),
        "transformers": ("transformers==5.24.0", TORCH),
        "onnxruntime": (
            "onnxruntime==1.32.0",
            "optimum-onnx==0.1.0",
            "transformers==4.57.6",
            "onnx==1.23.2",
            "onnx-ir==1.1.0",
            TORCH,
        ),
    }
)
"""Runtime -> what pip installs. shadowc runs in the environment that runs the race."""

_STAMP = "pins.txt"
_TAIL = 5


class PreparationError(Exception):
    """A runtime cannot take part; the message says why in one line."""


def python_of(runtime: str, parent: Path) -> Path:
    """The interpreter of a runtime's environment, made first if it is not there with the pinned versions.

    Raises:
        PreparationError: venv or pip failed; the log lies beside the environment.
    """
    if runtime not in PINS:
        return Path(sys.executable)
    folder, pins = parent / runtime, "\n".join(PINS[runtime]) + "\n"
    python, stamp = folder / "bin" / "python", folder / _STAMP
    if stamp.is_file() and stamp.read_text("utf-8") == pins:
        return python
    shutil.rmtree(folder, ignore_errors=True)
    parent.mkdir(parents=True, exist_ok=True)
    log = parent / f"{runtime}.log"
    install = [str(python), "-m", "pip", "install", "--no-cache-dir", "--disable-pip-version-check", *PINS[runtime]]
    logged([sys.executable, "-m", "venv", str(folder)], log, f"the environment of {runtime}")
    logged(install, log, f"pip install {' '.join(PINS[runtime])}")
    stamp.write_text(pins, "utf-8")
    return python


def logged(command: list[str], log: Path, what: str, environment: Mapping[str, str] | None = None) -> None:
    """Run a command with its output in a file.

    Raises:
        PreparationError: it failed; the message ends with the last lines of the file.
    """
    with log.open("wb") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=environment, check=False).returncode
    if code != 0:
        lines = [line.strip() for line in log.read_text("utf-8", "replace").splitlines() if line.strip()]
        raise PreparationError(f"{what} failed (exit status {code}, {log}): {' / '.join(lines[-_TAIL:])}")
