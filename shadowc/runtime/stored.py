# SPDX-License-Identifier: Apache-2.0
"""What an engine folder stores beside its graph's behaviour: single tensors, neuron orders, control rankings.

Only files that engine.json lists are read: the others were never checked.

Letters: F neurons, L predicted layers, H heads, N units of neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from shadowc.spec.errors import InputError, VerificationError

if TYPE_CHECKING:
    from pathlib import Path

    import onnx

    from shadowc.spec.manifest import EngineManifest

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Ranking:
    """Constant scores of a control: heads [L,H] and neuron units [L,N]."""

    heads: Floats
    neurons: Floats


@dataclass(frozen=True, slots=True)
class StoredGraph:
    """What one graph of an engine stores."""

    model: onnx.ModelProto
    folder: Path
    manifest: EngineManifest

    def initialiser(self, name: str) -> npt.NDArray[Any]:
        """See `initialiser`."""
        return initialiser(self.model, self.folder, name)

    def neuron_orders(self) -> dict[int, npt.NDArray[np.int32]]:
        """See `neuron_orders`."""
        return neuron_orders(self.folder, self.manifest)


def initialiser(model: onnx.ModelProto, folder: Path, name: str) -> npt.NDArray[Any]:
    """One stored tensor of the graph, as it lies in weights.bin.

    Raises:
        InputError: the graph has none of this name.
    """
    from onnx import numpy_helper

    found = next((tensor for tensor in model.graph.initializer if tensor.name == name), None)
    if found is None:
        raise InputError(f"{folder} stores no tensor {name!r}", hint=f"shadowc inspect {folder}")
    value: npt.NDArray[Any] = numpy_helper.to_array(found, base_dir=str(folder))
    return value


def require_exact_products(model: onnx.ModelProto, folder: Path) -> None:
    """Refuse an engine whose LM head rounds activations, which nothing can be compared with to the last digits.

    Raises:
        InputError: it was compiled before MatMulRows.
    """
    if any(node.op_type == "MatMulNBits" for node in model.graph.node):
        raise InputError(
            f"{folder} was compiled by an earlier version: its LM head (MatMulNBits) rounds what it multiplies, "
            "so it cannot be compared with its checkpoint",
            hint="shadowc compile again; it runs as it is",
        )


def neuron_orders(folder: Path, manifest: EngineManifest) -> dict[int, npt.NDArray[np.int32]]:
    """Model layer -> order [F]: entry i is the checkpoint's neuron that became record i. Empty: none was moved."""
    from shadowc.emit.folder import ORDERS_FILE

    tensors = _tensors(folder, manifest, ORDERS_FILE)
    return {int(name.removeprefix("order.")): order_F for name, order_F in tensors.items()}


def head_means(folder: Path, manifest: EngineManifest) -> dict[int, Floats]:
    """Model layer -> mean contexts of its heads [H,D], which skipped heads leave. Empty: they leave zero."""
    from shadowc.emit.folder import MEANS_FILE

    tensors = _tensors(folder, manifest, MEANS_FILE)
    return {int(name.rpartition(".")[2]): mean_HD for name, mean_HD in tensors.items()}


def control_names(folder: Path, manifest: EngineManifest) -> tuple[str, ...]:
    """Names of the controls that were stored when the predictor was trained, sorted."""
    from shadowc.emit.folder import CONTROLS_FILE

    return tuple(sorted({name.rpartition(".")[0] for name in _tensors(folder, manifest, CONTROLS_FILE)}))


def control(folder: Path, manifest: EngineManifest, method: str) -> Ranking:
    """The constant scores of a control that was stored when the predictor was trained.

    Raises:
        InputError: the engine has none of this name.
    """
    from shadowc.emit.folder import CONTROLS_FILE

    tensors = _tensors(folder, manifest, CONTROLS_FILE)
    if f"{method}.heads" not in tensors:
        known = control_names(folder, manifest)
        raise InputError(
            f"{folder} holds no control {method!r}; it has: {', '.join(known) or 'none'}",
            hint="shadowc compile with --predictor train stores controls",
        )
    return Ranking(tensors[f"{method}.heads"], tensors[f"{method}.neurons"])


def _tensors(folder: Path, manifest: EngineManifest, name: str) -> dict[str, npt.NDArray[Any]]:
    """Tensors of a file of the folder; none if the manifest does not list it.

    Raises:
        VerificationError: it cannot be read.
    """
    if name not in manifest.files:
        return {}
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    from shadowc.runtime.verification import RECOMPILE

    try:
        tensors: dict[str, npt.NDArray[Any]] = load_file(folder / name)
    except (OSError, SafetensorError) as error:
        raise VerificationError(f"{folder / name} cannot be read: {error}", hint=RECOMPILE) from error
    return tensors
