# SPDX-License-Identifier: Apache-2.0
"""What `bisect` finds: every tensor beside torch's, and the stored parameters behind the first that deviates."""

from __future__ import annotations

from dataclasses import dataclass

from shadowc.spec.errors import VerificationError
from shadowc.spec.manifest import FIXED_FILE, MODEL_FILE


@dataclass(frozen=True, slots=True)
class Compared:
    """One tensor of the engine beside torch's."""

    layer: int | None
    """Model layer; None: in front of the first or behind the last one, or the masks of all."""
    tensor: str
    """As the graph names it."""
    made_by: str
    difference: float
    """Largest, of torch's largest value."""
    tolerance: float
    parameters: tuple[str, ...] = ()
    """Names of the parameters that go into it."""
    graph: str = MODEL_FILE
    """File of the graph that has it."""

    @property
    def deviates(self) -> bool:
        """Whether it is out of tolerance; a NaN is."""
        return not self.difference <= self.tolerance

    @property
    def where(self) -> str:
        """For people: layer and tensor, and the graph where it is not the one that makes a mask for every token."""
        place = self.tensor if self.layer is None else f"layer {self.layer}, {self.tensor}"
        return f"{self.graph}, {place}" if self.graph == FIXED_FILE else place


@dataclass(frozen=True, slots=True)
class Altered:
    """A stored parameter that is not the checkpoint's."""

    name: str
    difference: float
    """Largest, of the checkpoint's largest value."""
    at: tuple[int, ...]
    """Index of the largest difference, in the checkpoint's order."""
    values: int
    """How many differ."""


@dataclass(frozen=True, slots=True)
class BisectReport:
    """All tensors in the order in which the engine makes them, and what is behind the first that deviates."""

    folder: str
    compared: tuple[Compared, ...]
    altered: tuple[Altered, ...]
    """Parameters of the first deviation that are not the checkpoint's."""
    matched: tuple[str, ...]
    """Parameters of the first deviation that are; those in neither are stored in a form that is not compared."""
    changed_files: tuple[str, ...]
    """What `verify` would say about the folder."""
    positions: int
    """Token positions that were compared."""
    reference: bool
    """Whether the graph was reference.onnx, without kernels of ours."""

    @property
    def first(self) -> Compared | None:
        """The first tensor that deviates; None: none does."""
        return next((one for one in self.compared if one.deviates), None)

    def require(self) -> None:
        """Raises VerificationError naming the first deviation."""
        if self.first is None:
            return
        raise VerificationError(
            f"{self.folder} parts from torch at {self.first.where} ({self.first.made_by}): {self.first.difference:.1e} "
            f"of the largest value, tolerance {self.first.tolerance:.0e}",
            hint=self._hint(self.first),
            problems=[
                f"{one.name} is stored with {one.values} other values, the worst at {list(one.at)} "
                f"({one.difference:.1e} of the largest)"
                for one in self.altered
            ] + list(self.changed_files),
        )  # fmt: skip

    def _hint(self, first: Compared) -> str:
        if self.altered or self.changed_files:
            return "compile the engine again"
        unseen = [name for name in first.parameters if name not in self.matched]
        known = f"{', '.join(self.matched)}: as in the checkpoint; " if self.matched else ""
        known += f"{', '.join(unseen)}: stored in a form that is not compared; " if unseen else ""
        if not self.reference:
            return f"{known}run it again with --reference to tell a kernel from the graph"
        return f"{known}the graph{' or one of the latter' if unseen else ''} is wrong: compile the engine again"
