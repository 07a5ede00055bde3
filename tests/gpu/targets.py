# SPDX-License-Identifier: Apache-2.0
"""Which of the two TensorRT targets can build the tests' engines for a card, and with which options."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from shadowc.emit.tensorrt.checks import builder_of, check_capabilities, plugin_of
from shadowc.spec.errors import ShadowcError
from shadowc.spec.options import CompileOptions

TARGETS = ("tensorrt", "tensorrt-rtx")
"""In the order of preference: TensorRT builds for every card, TensorRT for RTX for some."""


class NoTargetError(Exception):
    """Why no engine can be built for a card, as a sentence."""


def require_tools(target: str) -> None:
    """Builder and plugin of a target.

    Raises:
        SetupError: one of them is missing.
    """
    plugin_of(builder_of(target))


def engine_options(target: str, capability: tuple[int, int], out: Path, weights: str) -> CompileOptions:
    """Options of the tests' engines: for this card, where the target lets one choose."""
    return CompileOptions(
        model="opt-mini", out=out, target=target, weights=weights, offline=True,
        compute_capability=("{}.{}".format(*capability),) if target == "tensorrt-rtx" else (),
    )  # fmt: skip


def engine_target(capability: tuple[int, int], require: Callable[[str], None] = require_tools) -> str:
    """The first target whose tools are here and that builds the widest of the tests' engines, fp32, for the card.

    Args:
        capability: of the card.
        require: raises SetupError for a target without tools.

    Raises:
        NoTargetError: there is none; one reason per target.
    """
    reasons = []
    for target in TARGETS:
        try:
            require(target)
            check_capabilities(engine_options(target, capability, Path("mini"), "fp32"))
        except ShadowcError as error:
            reasons.append(error.message)
        else:
            return target
    raise NoTargetError(
        "no engine can be built for compute capability {}.{}: ".format(*capability) + "; ".join(reasons)
    )
