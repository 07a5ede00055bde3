# SPDX-License-Identifier: Apache-2.0
"""What the styles of predictors read, and what they cannot do.

Letters: M tokens, E hidden, Lp predicted layers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shadowc.sparsity.networks import minmax_scaled
from shadowc.spec.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from shadowc.spec.options import CompileOptions, Style

    Floats = npt.NDArray[np.float32]


def network_inputs(style: Style, inputs: Floats) -> tuple[Floats, Floats]:
    """Return what the networks of heads and those of neurons read, from the inputs of `Predictor.scores`."""
    if style == "shadow":
        inputs = minmax_scaled(inputs)
    return (inputs[:, 0], inputs[:, 1]) if style == "shadow+" else (inputs, inputs)


def global_is_not_causal(style: Style) -> InputError:
    """Return the refusal of a ranking over all layers where every layer has its own predictor."""
    budget = "; its layers share one budget in scope local already" if style == "shadow+" else ""
    return InputError(
        f"style {style} ranks the units of each layer by themselves: when a layer has to know its mask, the scores of "
        f"the later layers do not exist yet, so they cannot be ranked together{budget}",
        hint="--scope local, or --style shadow",
    )


def check_style(style: Style, options: CompileOptions) -> None:
    """Refuse what a style of predictor cannot do.

    Raises:
        InputError: a ranking over all layers by predictors that know one layer each.
        UnsupportedError: such predictors with a mask per sequence, or for a target that does not have them.
    """
    if style == "shadow":
        return
    if options.scope == "global":
        raise global_is_not_causal(style)
    if options.mask == "sequence":
        raise UnsupportedError(
            f"style {style} makes a mask for every token: what it scores a layer by is known after the masks of the "
            "layers before it, so no token makes the masks of all layers ahead",
            hint="--mask token, or --style shadow",
        )
    if options.target != "cpu":
        raise UnsupportedError(
            f"target {options.target} has predictors of style shadow only, style {style} is for target cpu",
            hint="--style shadow, or --target cpu",
        )
