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

    from shadowc.spec.options import CompileOptions, Scope, Select, Style

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
        hint="--scope local, or thresholds in place of ranks: compile --select calibrated, eval --methods calibrated",
    )


def scope_of(style: Style, wanted: Scope | None, select: Select = "exact") -> Scope:
    """Return the scope of a selection: the one that is wanted, else the widest that there is.

    Raises:
        InputError: units of all layers are to be ranked together, and every layer has a predictor of its own; or all
            layers are to share one threshold, and each has its own by its sensitivity.
    """
    if select == "sensitivity":
        if wanted == "global":
            raise InputError(
                "thresholds by sensitivity give every layer a share of its own, --scope global one threshold to all "
                "layers",
                hint="calibrated in place of sensitivity, or leave --scope out",
            )
        return "local"
    if select == "calibrated":
        return wanted or "global"  # one threshold for all layers needs no scores of later ones
    if style != "shadow" and wanted == "global":
        raise global_is_not_causal(style)
    return wanted or ("global" if style == "shadow" else "local")


def check_select(options: CompileOptions) -> None:
    """Refuse calibrated thresholds where they cannot work.

    Raises:
        InputError: a least number of units is to be kept.
        UnsupportedError: for a target that only ranks, or with a mask per sequence.
    """
    from shadowc.sparsity.thresholds import refuse_least

    if options.select == "exact":
        return
    refuse_least(max(options.min_active_heads, options.min_active_neurons))
    if options.mask == "sequence":
        raise UnsupportedError(
            f"--select {options.select} meets a density in the mean over tokens; the one token that makes the mask of "
            "a sequence may be far from the mean, for as long as the mask holds",
            hint="--mask token, or --select exact",
        )
    if options.target != "cpu":
        raise UnsupportedError(
            f"target {options.target} ranks the units of every token, --select {options.select} is for target cpu",
            hint="--select exact, or --target cpu",
        )


def check_style(style: Style, options: CompileOptions) -> None:
    """Refuse what a style of predictor cannot do.

    Raises:
        InputError: a ranking over all layers by predictors that know one layer each.
        UnsupportedError: such predictors with a mask per sequence, or for a target that does not have them.
    """
    if style == "shadow":
        return
    if options.scope == "global" and options.select == "exact":
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
