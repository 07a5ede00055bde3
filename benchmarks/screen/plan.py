# SPDX-License-Identifier: Apache-2.0
"""What a screen compares: criteria, styles of predictors, scopes, densities; and which settings that makes of each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import cast

from shadowc.eval.request import Protocol, Setting
from shadowc.sparsity.criteria import criterion_names, find_criterion
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError
from shadowc.spec.options import STYLES, CollectOptions, Scope, Style, TrainOptions

SCOPES: tuple[Scope, ...] = ("local", "global")
DENSITIES = (0.2, 0.5, 0.8)
GRID = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
GRID_SEEDS = 3
BEST = 3
"""Criteria that the grid, the parts and what knows no context are measured of, unless a number is given."""
RANKINGS = ("static", "normalised")
"""Methods that know no context, by every criterion."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared, and how the predictors come about."""

    data: str
    criteria: tuple[str, ...]
    styles: tuple[Style, ...]
    scopes: tuple[Scope, ...]
    densities: tuple[float, ...]
    epochs: Mapping[Style, int]
    positions: int
    length: int
    block: int
    """Neurons of a unit, the same for all styles: so references are those of the criterion alone."""
    seed: int

    def __post_init__(self) -> None:
        """Refuse styles none of which has a scope.

        Raises:
            InputError: layers that know themselves alone are to be ranked together, and nothing else.
        """
        if "shadow" not in self.styles and "local" not in self.scopes:
            raise InputError(
                f"styles {', '.join(self.styles)} rank each layer by itself: they have scope local only",
                hint="--scopes local, or --styles with shadow",
            )

    @property
    def learnable(self) -> tuple[str, ...]:
        """Criteria that a predictor can learn."""
        return tuple(name for name in self.criteria if find_criterion(name).trains)

    @property
    def host(self) -> str:
        """The criterion whose predictor lends its units, and a kind that another criterion has no formula for."""
        return "plainact" if "plainact" in self.learnable else self.learnable[0]

    def collecting(self, criterion: str) -> CollectOptions:
        """How a criterion's trace is recorded."""
        return CollectOptions(  # fill zero: as all screens were made
            criterion=criterion, data=self.data, positions=self.positions, length=self.length, seed=self.seed,
            fill="zero",
        )  # fmt: skip

    def training(self, style: Style, seed: int) -> TrainOptions:
        """How a predictor is trained."""
        return TrainOptions(style=style, neuron_block=self.block, epochs=self.epochs[style], seed=seed)

    def both(self, densities: Iterable[float]) -> tuple[Density, ...]:
        """Heads and neurons alike."""
        return tuple(Density.of(density) for density in densities)

    def parts(self) -> tuple[Density, ...]:
        """Heads alone, then neurons alone."""
        heads = [Density(density, 1.0) for density in self.densities]
        return (*heads, *(Density(1.0, density) for density in self.densities))

    def of_predictor(self, style: Style, densities: Sequence[Density]) -> list[Setting]:
        """Settings of a predictor: layers that know themselves alone cannot be ranked together."""
        scopes = [scope for scope in self.scopes if style == "shadow" or scope == "local"]
        return _settings(["predictor"], scopes, densities)

    def of_rankings(self, criterion: str, densities: Sequence[Density]) -> list[Setting]:
        """Settings of a criterion's references: rankings of its means, and the true scores where a token has them."""
        oracle = ("oracle",) if find_criterion(criterion).per == "token" else ()
        return _settings([*RANKINGS, *oracle], self.scopes, densities)

    def of_random(self, densities: Sequence[Density]) -> list[Setting]:
        """Settings of random masks."""
        return _settings(["random"], self.scopes, densities)

    def of_prompt(self, densities: Sequence[Density]) -> list[Setting]:
        """Settings of the mask that the prompt's activations make."""
        return _settings(["prompt"], self.scopes, densities, "prompt")


def _settings(
    methods: Sequence[str], scopes: Sequence[str], densities: Sequence[Density], protocol: Protocol = "decode"
) -> list[Setting]:
    return [
        Setting(method, density, protocol, scope) for density in densities for scope in scopes for method in methods
    ]


def criteria_named(text: str) -> tuple[str, ...]:
    """The criteria of a list, `all` means all; at least one has to teach a predictor.

    Raises:
        InputError: one is not known, or none of them can.
    """
    names = criterion_names() if text.strip() == "all" else tuple(dict.fromkeys(_listed(text)))
    able = [name for name in names if find_criterion(name).trains]
    if not able:
        can = ", ".join(name for name in criterion_names() if find_criterion(name).trains)
        raise InputError(
            f"no predictor can learn {', '.join(names) or 'nothing'}, and references need one's units",
            hint=f"--criteria with one of {can}",
        )
    return names


def styles_named(text: str) -> tuple[Style, ...]:
    """The styles of a list.

    Raises:
        InputError: one is not known; all are listed.
    """
    return cast("tuple[Style, ...]", _known(text, STYLES, "style", "--styles"))


def scopes_named(text: str) -> tuple[Scope, ...]:
    """The scopes of a list.

    Raises:
        InputError: one is not known; all are listed.
    """
    return cast("tuple[Scope, ...]", _known(text, SCOPES, "scope", "--scopes"))


def densities_named(text: str) -> tuple[float, ...]:
    """The shares of a list.

    Raises:
        InputError: one is no number, or outside 0..1.
    """
    try:
        found = tuple(float(entry) for entry in _listed(text))
    except ValueError:
        raise InputError(f"densities are numbers such as 0.2,0.5; found {text!r}", hint="--densities 0.2,0.5") from None
    for density in found:
        Density.of(density)
    if not found:
        raise InputError("no density was given", hint="--densities 0.2,0.5")
    return found


def epochs_named(text: str) -> dict[Style, int]:
    """Epochs of every style, from one number for all or from STYLE=N,...

    Raises:
        InputError: it is neither, or a style is missing.
    """
    if text.strip().isdecimal() and int(text) > 0:
        return dict.fromkeys(STYLES, int(text))
    pairs = dict(entry.partition("=")[::2] for entry in _listed(text))
    if set(pairs) != set(STYLES) or not all(count.isdecimal() and int(count) for count in pairs.values()):
        example = ",".join(f"{style}=20" for style in STYLES)
        raise InputError(f"epochs are a number, or one for each style; found {text!r}", hint=f"--epochs {example}")
    return {style: int(pairs[style]) for style in STYLES}


def _known(text: str, known: Sequence[str], what: str, flag: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(_listed(text)))
    unknown = [name for name in found if name not in known]
    if unknown or not found:
        raise InputError(
            f"unknown {what} {', '.join(map(repr, unknown)) or repr(text)}", hint=f"{flag} takes {', '.join(known)}"
        )
    return found


def _listed(text: str) -> list[str]:
    return [entry.strip() for entry in text.split(",") if entry.strip()]
