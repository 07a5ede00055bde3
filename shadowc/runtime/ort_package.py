# SPDX-License-Identifier: Apache-2.0
"""Which package brings the module `onnxruntime`: several can, and two of them overwrite each other's files."""

from __future__ import annotations

import platform
import sys
from importlib import metadata

ORT_PACKAGES = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-training",
)
"""All of them install the module `onnxruntime`, over each other."""


def installed() -> dict[str, str]:
    """Those of `ORT_PACKAGES` that are installed, and their versions."""
    found = {}
    for name in ORT_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def to_install() -> str:
    """The one to install or upgrade: what is there, else what shadowc depends on here."""
    found = installed()
    usual = "onnxruntime-gpu" if sys.platform == "linux" and platform.machine() == "x86_64" else "onnxruntime"
    return usual if usual in found or not found else next(iter(found))
