# SPDX-License-Identifier: Apache-2.0
"""shadowc compiles an OPT checkpoint into an inference engine with contextual sparsity.

    folder = shadowc.compile(shadowc.CompileOptions(model="opt-mini", out="mini"))
    engine = shadowc.load(folder)
    engine.generate("Once upon a time", max_new_tokens=32, density=0.5)

Heavy modules are imported on first use, so `import shadowc` is cheap.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from shadowc._version import __version__

# From 1.29 on ONNX Runtime's own packages tell Microsoft about every model unless this is set before they are imported.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

if TYPE_CHECKING:
    from shadowc.compiler import compile as compile
    from shadowc.runtime.load import load as load
    from shadowc.runtime.transformers_model import OPTForCausalLM as OPTForCausalLM
    from shadowc.spec.density import Density as Density
    from shadowc.spec.options import CompileOptions as CompileOptions

_LAZY = {
    "compile": "shadowc.compiler",
    "load": "shadowc.runtime.load",
    "OPTForCausalLM": "shadowc.runtime.transformers_model",
    "Density": "shadowc.spec.density",
    "CompileOptions": "shadowc.spec.options",
    "ShadowcError": "shadowc.spec.errors",
    "InputError": "shadowc.spec.errors",
    "UnsupportedError": "shadowc.spec.errors",
    "IncompatibleEngineError": "shadowc.spec.errors",
    "VerificationError": "shadowc.spec.errors",
    "SetupError": "shadowc.spec.errors",
}
__all__ = ["__version__", *_LAZY]


def __getattr__(name: str) -> object:
    """Import a public name on first use (PEP 562)."""
    if name not in _LAZY:
        raise AttributeError(f"module 'shadowc' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_LAZY[name]), name)
