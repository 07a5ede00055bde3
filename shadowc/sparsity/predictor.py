# SPDX-License-Identifier: Apache-2.0
# ruff: noqa: N815 - fields carry their shape letters
"""The predictor: two small networks that score all heads and neuron blocks of all later layers at once.

Input of both is one token's layer-0 attention context before out_proj, scaled to 0..1 over its entries:
z = (a - min a) / max(max a - min a, 1e-12); scores = fc2(relu(fc1(z))). Numpy only; on disk a folder with
predictor.safetensors and predictor.json.

Letters: M tokens, E hidden, P width, Lp predicted layers (model layers 1..L-1), H heads, F neurons,
N = ceil(F / block) blocks of neurons.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from shadowc.output import check_output, staged
from shadowc.spec.errors import InputError
from shadowc.spec.program import SparsityPlan

if TYPE_CHECKING:
    import numpy.typing as npt

    from shadowc.checkpoint.opt import OptFacts

    Floats = npt.NDArray[np.float32]

SCHEMA = 1
TENSORS_FILE = "predictor.safetensors"
META_FILE = "predictor.json"
PREFIX = "predictor."
SMALLEST_SPAN = 1e-12
BUDGET = 0.03
"""Share of a dense token's parameters that the predictor may cost."""
WIDTH_STEP = 32
LARGEST_WIDTH = 1024
_PARTS = ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")


@dataclass(frozen=True, slots=True)
class Network:
    """fc2(relu(fc1(z))): weights as torch.nn.Linear stores them, [out, in]."""

    fc1_weight_PE: Floats
    fc1_bias_P: Floats
    fc2_weight_OP: Floats
    fc2_bias_O: Floats

    @property
    def width(self) -> int:
        """Hidden width P."""
        return int(self.fc1_weight_PE.shape[0])

    def __call__(self, scaled_ME: Floats) -> Floats:
        """Return the scores [M, outputs] of scaled inputs."""
        hidden_MP = np.maximum(scaled_ME @ self.fc1_weight_PE.T + self.fc1_bias_P, 0)
        scores: Floats = hidden_MP @ self.fc2_weight_OP.T + self.fc2_bias_O
        return scores

    def tensors(self, name: str) -> dict[str, Floats]:
        """Return the four tensors under `name.fc1.weight` and so on."""
        values = (self.fc1_weight_PE, self.fc1_bias_P, self.fc2_weight_OP, self.fc2_bias_O)
        return {f"{name}.{part}": value for part, value in zip(_PARTS, values, strict=True)}

    @staticmethod
    def random(generator: np.random.Generator, inputs: int, width: int, outputs: int) -> Network:
        """Return seeded random weights whose scores differ from token to token."""

        def normal(rows: int, columns: int) -> Floats:
            return generator.standard_normal((rows, columns), dtype=np.float32) / np.float32(np.sqrt(columns))

        fc1_weight_PE = normal(width, inputs)
        zeros = np.zeros
        return Network(fc1_weight_PE, zeros(width, np.float32), normal(outputs, width), zeros(outputs, np.float32))


@dataclass(frozen=True, slots=True)
class Predictor:
    """Both networks, the neuron orders their blocks refer to, and where they come from."""

    heads: Network
    neurons: Network
    layers: int
    """Predicted layers Lp."""
    block: int
    orders_LF: npt.NDArray[np.int32]
    """[Lp, F]: entry i is the checkpoint's neuron that becomes neuron i; the identity for block 1."""
    meta: dict[str, Any] = field(default_factory=dict)
    """criterion, model, text (fingerprint of the calibration text), seed, training options, report."""
    controls: dict[str, tuple[Floats, Floats]] = field(default_factory=dict)
    """Context-free scores ([Lp, H], [Lp, N]) of the same trace, by name: what the predictor has to beat."""

    @property
    def report(self) -> dict[str, Any]:
        """How well it found the important units of held-out text, beside the controls; empty for a dummy."""
        found: dict[str, Any] = self.meta.get("report", {})
        return found

    @property
    def units(self) -> tuple[int, int]:
        """Heads and neuron blocks per layer."""
        return len(self.heads.fc2_bias_O) // self.layers, len(self.neurons.fc2_bias_O) // self.layers

    @property
    def parameters(self) -> int:
        """Weights and biases of both networks."""
        return sum(value.size for value in (self.heads.tensors("h") | self.neurons.tensors("n")).values())

    def scores(self, context_ME: Floats) -> tuple[Floats, Floats]:
        """Return the scores of tokens: heads [M, Lp, H] and neuron blocks [M, Lp, N]."""
        scaled_ME = minmax_scaled(np.asarray(context_ME, np.float32))
        heads, blocks = self.units
        rows = len(scaled_ME)
        return (
            self.heads(scaled_ME).reshape(rows, self.layers, heads),
            self.neurons(scaled_ME).reshape(rows, self.layers, blocks),
        )

    def plan(
        self,
        scope: Literal["local", "global"],
        exempt: tuple[int, ...] = (),
        *,
        min_active_heads: int = 0,
        min_active_neurons: int = 0,
    ) -> SparsityPlan:
        """Return what the passes need to know about this predictor."""
        return SparsityPlan(
            width_heads=self.heads.width,
            width_neurons=self.neurons.width,
            block=self.block,
            scope=scope,
            exempt=exempt,
            min_active_heads=min_active_heads,
            min_active_neurons=min_active_neurons,
        )

    def tensors(self) -> dict[str, npt.NDArray[Any]]:
        """Return the networks and, for blocks of more than one neuron, `order.{model layer}`."""
        orders = {f"order.{i + 1}": order_F for i, order_F in enumerate(self.orders_LF)} if self.block > 1 else {}
        return {**self.heads.tensors("heads"), **self.neurons.tensors("neurons"), **orders}

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
            for kind, values in zip(("heads", "neurons"), pair, strict=True)
        }
        tensors = {name: np.ascontiguousarray(value) for name, value in {**self.tensors(), **controls}.items()}
        shape = {"layers": self.layers, "block": self.block, "ffn": self.orders_LF.shape[1]}
        text = json.dumps({"schema": SCHEMA, "shape": shape, **self.meta}, indent=1, sort_keys=True)
        with staged(folder, check_out, "predictor") as staging:
            (staging / TENSORS_FILE).write_bytes(save(tensors))
            (staging / META_FILE).write_text(text + "\n", "utf-8")

    @staticmethod
    def load(folder: Path, facts: OptFacts | None = None) -> Predictor:
        """Read a predictor; with `facts`, also check that it fits the model.

        Raises:
            InputError: files are missing, damaged, inconsistent or of another schema, or for a model of another shape.
        """
        meta, tensors = _read(folder)
        try:
            shape = meta.pop("shape")
            layers, block, ffn = int(shape["layers"]), int(shape["block"]), int(shape["ffn"])
            orders = [tensors[f"order.{i + 1}"] if block > 1 else np.arange(ffn) for i in range(layers)]
            predictor = Predictor(
                heads=Network(*(tensors[f"heads.{part}"] for part in _PARTS)),
                neurons=Network(*(tensors[f"neurons.{part}"] for part in _PARTS)),
                layers=layers,
                block=block,
                orders_LF=np.stack(orders).astype(np.int32),
                meta=meta,
                controls=_controls(tensors),
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

    def require_fit(self, facts: OptFacts) -> None:
        """Check that every tensor has the shape that the model needs.

        A predictor of another model of the same shape passes (fine-tuned copies share one); `meta["model"]` tells
        whose it is.

        Raises:
            InputError: it is for a model of another shape; all differences are listed.
        """
        found = {
            "predicted layers": (self.layers, facts.layers - 1),
            "hidden size": (self.heads.fc1_weight_PE.shape[1], facts.hidden),
            "heads": (self.units[0], facts.heads),
            "neurons": (self.orders_LF.shape[1], facts.ffn),
        }
        problems = [f"{what} {mine}, the model has {its}" for what, (mine, its) in found.items() if mine != its]
        if problems:
            trained_for = self.meta.get("model", {}).get("name", "another model")
            raise InputError(
                f"the predictor was trained for {trained_for} and does not fit {facts.name}: {'; '.join(problems)}",
                hint="train one on this model with shadowc train, or leave --predictor out",
                problems=problems,
            )

    @staticmethod
    def dummy(facts: OptFacts, block: int, width: int = 0, seed: int = 0) -> Predictor:
        """Return a seeded random predictor of the true shape, for latency work; width 0: the default."""
        width = width or default_width(facts, block)
        generator = np.random.default_rng([seed, 2])
        layers = facts.layers - 1
        orders = [generator.permutation(facts.ffn) if block > 1 else np.arange(facts.ffn) for _ in range(layers)]
        return Predictor(
            heads=Network.random(generator, facts.hidden, width, layers * facts.heads),
            neurons=Network.random(generator, facts.hidden, width, layers * blocks_of(facts.ffn, block)),
            layers=layers,
            block=block,
            orders_LF=np.stack(orders).astype(np.int32),
            meta={"origin": "dummy", "seed": seed, "model": {"name": facts.name, "identity": ""}},
        )


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


def minmax_scaled(context_ME: Floats) -> Floats:
    """Scale each row to 0..1 over its entries, exactly as the engine does."""
    low_M1 = context_ME.min(axis=-1, keepdims=True)
    span_M1 = np.maximum(context_ME.max(axis=-1, keepdims=True) - low_M1, np.float32(SMALLEST_SPAN))
    scaled: Floats = (context_ME - low_M1) / span_M1
    return scaled


def blocks_of(neurons: int, block: int) -> int:
    """Return the number of blocks; the last one may be short."""
    return -(-neurons // block)


def cost_share(facts: OptFacts, block: int, width: int) -> float:
    """Return the parameters of both networks as a share of those that a dense token reads (layers and LM head)."""
    outputs = facts.predicted_layers * (facts.heads + blocks_of(facts.ffn, block))
    per_layer = 4 * facts.hidden * (facts.hidden + 1) + facts.ffn * (2 * facts.hidden + 1) + facts.hidden
    dense = facts.layers * per_layer + facts.vocab * facts.hidden
    return (width * (2 * (facts.hidden + 1) + outputs) + outputs) / dense


def default_width(facts: OptFacts, block: int) -> int:
    """Return the largest multiple of 32, 32 to 1024, with which both networks cost at most 3 % of a dense token.

    Counted in parameters, since the predictor is quantised as the model is. A model too small for the budget gets 32.
    """
    widths = range(WIDTH_STEP, LARGEST_WIDTH + 1, WIDTH_STEP)
    return max((width for width in widths if cost_share(facts, block, width) <= BUDGET), default=WIDTH_STEP)


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, npt.NDArray[Any]]]:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    again = "train it again: shadowc train"
    check_folder(folder)
    try:
        meta = json.loads((folder / META_FILE).read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / META_FILE} is damaged: {error}", hint=again) from error
    if not isinstance(meta, dict) or meta.pop("schema", None) != SCHEMA:
        raise InputError(f"{folder / META_FILE} does not have schema {SCHEMA}", hint=again)
    try:
        return meta, load_file(folder / TENSORS_FILE)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder / TENSORS_FILE} is damaged or cut short: {error}", hint=again) from error


def _controls(tensors: Mapping[str, npt.NDArray[Any]]) -> dict[str, tuple[Floats, Floats]]:
    names = sorted({name.split(".")[1] for name in tensors if name.startswith("control.")})
    return {name: (tensors[f"control.{name}.heads"], tensors[f"control.{name}.neurons"]) for name in names}


def _inconsistencies(predictor: Predictor, ffn: int) -> list[str]:
    """Return what does not fit together inside one predictor."""
    problems = []
    blocks = blocks_of(ffn, predictor.block) if predictor.block > 0 else 0
    wanted = {"heads": predictor.layers * predictor.units[0], "neurons": predictor.layers * blocks}
    hidden = predictor.heads.fc1_weight_PE.shape[-1]
    for name, outputs in wanted.items():
        network = getattr(predictor, name)
        width = len(network.fc1_bias_P)
        shapes = {
            "fc1.weight": (width, hidden),
            "fc1.bias": (width,),
            "fc2.weight": (outputs, width),
            "fc2.bias": (outputs,),
        }
        for key, value in network.tensors(name).items():
            shape = shapes[key.removeprefix(f"{name}.")]
            if value.shape != shape:
                problems.append(f"{key} has shape {list(value.shape)}, expected {list(shape)}")
            elif not np.isfinite(value).all():
                problems.append(f"{key} has numbers that are not finite")
    for i, order_F in enumerate(predictor.orders_LF):
        if not np.array_equal(np.sort(order_F), np.arange(ffn)):
            problems.append(f"order.{i + 1} is not a permutation of the {ffn} neurons")
    return problems
