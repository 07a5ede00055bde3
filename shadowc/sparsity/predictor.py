# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""The predictor: small networks that score the heads and neuron blocks of all layers but the first.

Style shadow: two networks score all later layers at once. Their input is one token's layer-0 attention context before
out_proj, scaled to 0..1 over its entries: z = (a - min a) / max(max a - min a, 1e-12); scores = fc2(relu(fc1(z))).

Style dejavu: two networks of the same form for every layer. Their input is what that layer's own attention reads, the
output of its first norm: the latest thing that is known when the layer begins, masks of earlier layers included.

Style shadow+: two linear networks of low rank for every layer, fc2(fc1(z)). Heads are scored by what the layer's
attention reads, neurons by what its FFN reads, so they know the attention of their own layer. Scores of all layers can
be compared; a table says which share of each layer is kept at a density (shares.py).

Numpy only; on disk a folder with predictor.safetensors and predictor.json.

Letters: M tokens, E hidden, P width, Lp predicted layers (model layers 1..L-1), H heads, F neurons,
N = ceil(F / block) blocks of neurons.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.output import check_output, staged
from shadowc.sparsity import means, shares, thresholds
from shadowc.sparsity.networks import LayerNetworks, Network, blocks_of
from shadowc.sparsity.styles import network_inputs, scope_of
from shadowc.spec.density import UNIT_KINDS
from shadowc.spec.errors import InputError
from shadowc.spec.options import STYLES, Fill, Scope, Select, Style
from shadowc.spec.program import SparsityPlan

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.checkpoint.facts import ModelFacts

    Floats = npt.NDArray[np.float32]

SCHEMA = 1
_AGAIN = "train it again: shadowc train"
TENSORS_FILE = "predictor.safetensors"
META_FILE = "predictor.json"
PREFIX = "predictor."
_SHARES = ("shares.heads", "shares.neurons")
Networks = Network | LayerNetworks


@dataclass(frozen=True, slots=True)
class Predictor:
    """The networks of both kinds, the neuron orders their blocks refer to, and where they come from."""

    heads: Networks
    neurons: Networks
    layers: int
    """Predicted layers Lp."""
    block: int
    orders_LF: npt.NDArray[np.int32]
    """[Lp, F]: entry i is the checkpoint's neuron that becomes neuron i; the identity for block 1."""
    meta: dict[str, Any] = field(default_factory=dict)
    """criterion, model, text (fingerprint of the calibration text), seed, training options, report."""
    controls: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    """Context-free scores ([Lp, H], [Lp, N]) of the same trace, by name: what the predictor has to beat."""
    shares: tuple[Floats, Floats] | None = None
    """Of style shadow+, for heads and for neurons: density -> share of each layer, see shares.py."""
    thresholds: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    """Budget -> for heads and for neurons: density -> threshold of each layer, see thresholds.py."""
    means_LHD: Floats | None = None
    """[Lp, H, D]: the mean context of each head over the calibration positions, what a skipped head leaves in its
    place; None: a skipped head leaves zero."""

    @property
    def style(self) -> Style:
        """Whether one network scores all layers, or each layer has its own, and of which form."""
        if isinstance(self.heads, LayerNetworks):
            return "shadow+" if self.heads.networks[0].linear else "dejavu"
        return "shadow"

    @property
    def fill(self) -> Fill:
        """What a skipped head leaves in its place."""
        return "zero" if self.means_LHD is None else "mean"

    @property
    def means(self) -> dict[int, Floats]:
        """Model layer -> mean contexts of its heads [H, D]; empty where skipped heads leave zero."""
        return {} if self.means_LHD is None else dict(enumerate(self.means_LHD, start=1))

    @property
    def report(self) -> dict[str, Any]:
        """How well it found the important units of held-out text, beside the controls; empty for a dummy."""
        found: dict[str, Any] = self.meta.get("report", {})
        return found

    @property
    def units(self) -> tuple[int, int]:
        """Heads and neuron blocks per layer."""
        return self.heads.outputs // self.layers, self.neurons.outputs // self.layers

    @property
    def parameters(self) -> int:
        """Weights and biases of all networks."""
        return sum(value.size for value in (self.heads.tensors("h") | self.neurons.tensors("n")).values())

    def scores(self, inputs: Floats) -> tuple[Floats, Floats]:
        """Return the scores of tokens: heads [M, Lp, H] and neuron blocks [M, Lp, N].

        Args:
            inputs: shadow: layer-0 contexts [M, E], not yet scaled; dejavu: what the attentions of the layers read
                [M, Lp, E]; shadow+: that, and what their FFNs read [M, 2, Lp, E].
        """
        parts = network_inputs(self.style, np.asarray(inputs, np.float32))
        pairs = zip((self.heads, self.neurons), parts, strict=True)
        heads, neurons = (self._scores(networks, part) for networks, part in pairs)
        return heads, neurons

    def _scores(self, networks: Networks, inputs: Floats) -> Floats:
        """Scores [M, Lp, units] of one kind."""
        if isinstance(networks, LayerNetworks):
            return np.stack([one(inputs[:, layer]) for layer, one in enumerate(networks.networks)], axis=1)
        return networks(inputs).reshape(len(inputs), self.layers, networks.outputs // self.layers)

    def scope(self, wanted: Scope | None, select: Select = "exact") -> Scope:
        """Return the scope of the selection: the one that is wanted, else the widest that there is.

        Raises:
            InputError: see `styles.scope_of`.
        """
        return scope_of(self.style, wanted, select)

    def plan(
        self,
        scope: Scope | None,
        exempt: tuple[int, ...] = (),
        *,
        select: Select = "exact",
        min_active_heads: int = 0,
        min_active_neurons: int = 0,
    ) -> SparsityPlan:
        """Return what the passes need to know about this predictor.

        Raises:
            InputError: see `scope`; or there are no thresholds to select by, or none that keep a least number of units.
        """
        found_scope = self.scope(scope, select)
        tables = None
        if select != "exact":
            thresholds.refuse_least(max(min_active_heads, min_active_neurons))
            tables = thresholds.of_budget(self.thresholds, thresholds.budget_of(select, found_scope))
        return SparsityPlan(
            width_heads=self.heads.width,
            width_neurons=self.neurons.width,
            block=self.block,
            scope=found_scope,
            exempt=exempt,
            min_active_heads=min_active_heads,
            min_active_neurons=min_active_neurons,
            style=self.style,
            shares=self.shares,
            select=select,
            thresholds=tables,
            fill=self.fill,
        )

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Return the networks, and what there is of orders, shares, thresholds and means, by the names on disk."""
        tables = {} if self.shares is None else dict(zip(_SHARES, self.shares, strict=True))
        tables |= thresholds.named(self.thresholds)
        orders = {f"order.{i + 1}": order_F for i, order_F in enumerate(self.orders_LF)} if self.block > 1 else {}
        named = means.named(self.means)
        return {**self.heads.tensors("heads"), **self.neurons.tensors("neurons"), **orders, **tables, **named}

    def as_source(self) -> PredictorSource:
        """Return the tensors as a `TensorSource`, their names prefixed with `predictor.`."""
        return PredictorSource({PREFIX + name: value for name, value in self.tensors().items()})

    def save(self, folder: Path) -> None:
        """Write both files into a sibling of `folder` that takes its place when it is complete.

        Raises:
            InputError: `folder` holds something else than a predictor, or cannot be written.
            SetupError: the disk is full.
        """
        from safetensors.numpy import save

        controls = {
            f"control.{name}.{kind}": values
            for name, pair in self.controls.items()
            for kind, values in zip(UNIT_KINDS, pair, strict=True)
        }
        tensors = {name: np.ascontiguousarray(value) for name, value in {**self.tensors(), **controls}.items()}
        shape = {"layers": self.layers, "block": self.block, "ffn": self.orders_LF.shape[1]}
        text = json.dumps(
            {"schema": SCHEMA, "style": self.style, "shape": shape, **self.meta}, indent=1, sort_keys=True
        )
        with staged(folder, check_out, "predictor") as staging:
            (staging / TENSORS_FILE).write_bytes(save(tensors))
            (staging / META_FILE).write_text(text + "\n", "utf-8")

    @staticmethod
    def load(folder: Path, facts: ModelFacts | None = None) -> Predictor:
        """Read a predictor; with `facts`, also check that it fits the model.

        Raises:
            InputError: files are missing, damaged, inconsistent or of another schema, or for a model of another shape.
        """
        meta, tensors = _read(folder)
        style = _style(meta, folder)
        try:
            shape = meta.pop("shape")
            layers, block, ffn = int(shape["layers"]), int(shape["block"]), int(shape["ffn"])
            orders = [tensors[f"order.{i + 1}"] if block > 1 else np.arange(ffn) for i in range(layers)]
            predictor = Predictor(
                heads=_networks(tensors, "heads", layers, style),
                neurons=_networks(tensors, "neurons", layers, style),
                layers=layers,
                block=block,
                orders_LF=np.stack(orders).astype(np.int32),
                meta=meta,
                controls=_controls(tensors),
                shares=(tensors[_SHARES[0]], tensors[_SHARES[1]]) if style == "shadow+" else None,
                thresholds=thresholds.read(tensors),
                means_LHD=means.read(tensors, layers),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"{folder} is not a complete predictor: {error}", hint="train it again: shadowc train"
            ) from error
        problems = _inconsistencies(predictor, ffn)
        if problems:
            raise InputError(
                f"the predictor in {folder} is damaged: {problems[0]}", hint="train it again", problems=problems
            )
        if facts is not None:
            predictor.require_fit(facts)
        return predictor

    def require_fit(self, facts: ModelFacts) -> None:
        """Check that every tensor has the shape that the model needs.

        A predictor of another model of the same shape passes (fine-tuned copies share one); `trained_on`
        tells whose it is.

        Raises:
            InputError: it is for a model of another shape; all differences are listed.
        """
        found = {
            "predicted layers": (self.layers, facts.layers - 1),
            "hidden size": (self.heads.inputs, facts.hidden),
            "heads": (self.units[0], facts.heads),
            "neurons": (self.orders_LF.shape[1], facts.ffn),
        }
        if self.means_LHD is not None:
            found["size of a head's mean"] = (self.means_LHD.shape[2], facts.head_size)
        problems = [f"{what} {mine}, the model has {its}" for what, (mine, its) in found.items() if mine != its]
        if problems:
            trained_for = self.meta.get("model", {}).get("name", "another model")
            raise InputError(
                f"the predictor was trained for {trained_for} and does not fit {facts.name}: {'; '.join(problems)}",
                hint="train one on this model with shadowc train, or leave --predictor out",
                problems=problems,
            )

    @staticmethod
    def dummy(
        facts: ModelFacts, block: int, width: int = 0, seed: int = 0, style: Style = "shadow", fill: Fill = "zero"
    ) -> Predictor:
        """Return a seeded random predictor of the true shape, for latency work; width 0: the default."""
        from shadowc.sparsity.dummy_predictor import dummy_predictor

        return dummy_predictor(facts, block, width, seed, style, fill)


def style_in(path: str | Path) -> Style:
    """Return the style of the predictor in a folder; only predictor.json is read.

    Raises:
        InputError: the file is missing or damaged, or the style is not known.
    """
    return _style(_meta(Path(path)), Path(path))


def check_folder(path: str | Path) -> None:
    """Refuse what is no folder with the two files of a predictor; neither is opened.

    Raises:
        InputError: they are missing.
    """
    folder = Path(path)
    for name in (META_FILE, TENSORS_FILE):
        try:
            there = (folder / name).is_file()
        except (OSError, ValueError):  # too long for a name, or not to be looked into
            there = False
        if not there:
            raise InputError(f"{folder} is not a predictor: it has no {name}", hint="shadowc train makes one")


def check_out(out: Path) -> None:
    """Refuse an output folder that holds anything but a predictor; nothing is touched.

    Raises:
        InputError: it does, or nothing can be written there.
    """
    check_output(out, "a predictor", META_FILE, _listed)


def _listed(meta: Mapping[str, object]) -> Collection[str] | None:
    return (TENSORS_FILE,) if isinstance(meta.get("schema"), int) else None


@dataclass(frozen=True, slots=True)
class PredictorSource:
    """A predictor as a `TensorSource`."""

    _tensors: Mapping[str, npt.NDArray[Any]]

    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._tensors))

    def tensor(self, name: str) -> npt.NDArray[Any]:
        """One tensor: float32, or int32 for a neuron order."""
        return self._tensors[name]


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    meta = _meta(folder)
    try:
        return meta, load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / TENSORS_FILE} is damaged or cut short: {error}", hint=_AGAIN) from error


def _meta(folder: Path) -> dict[str, Any]:
    check_folder(folder)
    try:
        meta = json.loads((folder / META_FILE).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{folder / META_FILE} is damaged: {error}", hint=_AGAIN) from error
    if not isinstance(meta, dict) or meta.pop("schema", None) != SCHEMA:
        raise InputError(f"{folder / META_FILE} does not have schema {SCHEMA}", hint=_AGAIN)
    wrong = [name for name in ("model", "report") if not isinstance(meta.get(name, {}), dict)]
    if wrong:
        raise InputError(
            f"{folder / META_FILE} is damaged: {' and '.join(wrong)} expected as JSON objects", hint=_AGAIN
        )
    return meta


def _style(meta: dict[str, Any], folder: Path) -> Style:
    """Take the style out of what predictor.json says; predictors from before there were styles have none."""
    style = meta.pop("style", "shadow")
    if style not in STYLES:
        raise InputError(
            f"the predictor in {folder} has style {style!r}; this version knows {', '.join(STYLES)}", hint=_AGAIN
        )
    known: Style = style
    return known


def _networks(tensors: Mapping[str, npt.NDArray[Any]], kind: str, layers: int, style: Style) -> Networks:
    if style == "shadow":
        return Network.read(tensors, kind)
    return LayerNetworks.read(tensors, kind, layers, linear=style == "shadow+")


def _controls(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[Floats, Floats]]:
    names = sorted({name.split(".")[1] for name in tensors if name.startswith("control.")})
    return {name: (tensors[f"control.{name}.heads"], tensors[f"control.{name}.neurons"]) for name in names}


def _inconsistencies(predictor: Predictor, ffn: int) -> list[str]:
    """Return what does not fit together inside one predictor."""
    problems = []
    blocks = blocks_of(ffn, predictor.block) if predictor.block > 0 else 0
    wanted = {"heads": predictor.layers * predictor.units[0], "neurons": predictor.layers * blocks}
    for name, outputs in wanted.items():
        problems += getattr(predictor, name).problems(name, predictor.heads.inputs, outputs)
    for name, table in zip(_SHARES, predictor.shares or (), strict=False):
        problems += shares.problems(name, table, predictor.layers)
    problems += thresholds.problems(predictor.thresholds, predictor.layers)
    problems += means.problems(predictor.means_LHD, predictor.units[0])
    for i, order_F in enumerate(predictor.orders_LF):
        if not np.array_equal(np.sort(order_F), np.arange(ffn)):
            problems.append(f"order.{i + 1} is not a permutation of the {ffn} neurons")
    return problems
