# SPDX-License-Identifier: Apache-2.0
"""What masks have to leave whatever the scores are: whole layers, and a least number of units in each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from shadowc.spec.errors import InputError

if TYPE_CHECKING:
    from shadowc.checkpoint.facts import ModelFacts
    from shadowc.spec.options import CompileOptions


@dataclass(frozen=True, slots=True)
class Kept:
    """Layers that stay dense, and how many heads and neurons every other layer keeps at least."""

    exempt: tuple[int, ...] = ()
    """Layers of the model, 1 to its last; layer 0 is dense anyway."""
    heads: int = 0
    neurons: int = 0

    def check(self, facts: ModelFacts) -> None:
        """Refuse what the model does not have, all at once.

        Raises:
            InputError: a layer or a number out of range, or no layer is left to mask.
        """
        problems = [
            f"layer {layer} is to stay dense; the model's masked layers are 1 to {facts.layers - 1}"
            for layer in self.exempt
            if not 1 <= layer < facts.layers
        ]
        problems += [
            f"{least:,} {kind} are to be kept at least; a layer has {there:,}"
            for kind, least, there in (("heads", self.heads, facts.heads), ("neurons", self.neurons, facts.ffn))
            if not 0 <= least <= there
        ]
        if not problems and len(set(self.exempt)) == facts.layers - 1:
            problems.append("all layers are to stay dense; then nothing is left to mask")
        if problems:
            raise InputError(
                problems[0] if len(problems) == 1 else "no such layers or units",
                hint="--exempt, --min-active-heads, --min-active-neurons",
                problems=problems if len(problems) > 1 else (),
            )

    def text(self) -> str:
        """What tells it apart from others; empty where nothing is kept."""
        layers = ",".join(str(layer + 1) for layer in self.predicted())
        return f" kept {layers or 0}/{self.heads}/{self.neurons}" if self != NOTHING else ""

    def predicted(self) -> tuple[int, ...]:
        """The layers as `SparsityPlan.exempt` counts them."""
        return tuple(sorted({layer - 1 for layer in self.exempt}))

    def blocks(self, block: int) -> int:
        """The least number of blocks that hold as many neurons."""
        return -(-self.neurons // block)


NOTHING = Kept()


def kept_by(options: CompileOptions) -> Kept:
    """What an engine's masks leave."""
    return Kept(options.exempt, options.min_active_heads, options.min_active_neurons)
