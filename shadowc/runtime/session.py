# SPDX-License-Identifier: Apache-2.0
"""ONNX Runtime sessions over an engine folder: CPU provider only, weights.bin mapped, op library registered."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import uuid4

import numpy as np

from shadowc.runtime.chains import chained
from shadowc.runtime.graph_file import read_graph
from shadowc.runtime.library import REINSTALL
from shadowc.runtime.ort_package import to_install
from shadowc.runtime.recording import Run, read_recording
from shadowc.spec.errors import IncompatibleEngineError, InternalError, SetupError
from shadowc.spec.ops import CHAIN, DOMAIN
from shadowc.spec.tensors import NEXT

if TYPE_CHECKING:
    import numpy.typing as npt
    import onnx
    import onnxruntime

    from shadowc.runtime.weights_memory import WeightsMemory

LOWEST_ORT = (1, 23)
_ERRORS_ONLY = 3
_EXTERNAL_FOLDER = "session.model_external_initializers_file_folder_path"
_SPIN_DURATION, _SPIN_MICROSECONDS = "session.intra_op.spin_duration_us", "1000"
"""How long threads wait for the next call on their core before they sleep: longer than from one token to the next. By
themselves they stay for tens of milliseconds, in which another session, such as the one that makes the masks of a
sequence, lacks their core. An ONNX Runtime that does not know the entry ignores it."""


def check_ort() -> None:
    """Refuse an ONNX Runtime that is too old, or missing.

    Raises:
        SetupError: not installed, or older than the lowest tested version.
    """
    lowest = ".".join(map(str, LOWEST_ORT))
    try:
        import onnxruntime
    except ImportError as error:
        raise SetupError(
            f"ONNX Runtime is not installed, shadowc needs {lowest} or newer", hint=f"pip install {to_install()}"
        ) from error
    version = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < LOWEST_ORT:
        raise SetupError(
            f"ONNX Runtime {version} is installed, shadowc needs {lowest} or newer",
            hint=f"pip install --upgrade {to_install()}",
        )


class Binding:
    """Buffers bound to a session. It keeps them alive: ONNX Runtime borrows the memory of numpy arrays."""

    def __init__(self, session: onnxruntime.InferenceSession) -> None:
        self._session = session
        self._binding = session.io_binding()
        self._held: dict[str, tuple[object, object]] = {}

    def give(self, name: str, array: npt.NDArray[Any]) -> None:
        """Bind a contiguous array as an input; `bind_cpu_input` would refuse inputs that have defaults."""
        value = self._hold(name, array)
        self._binding.bind_ortvalue_input(name, value)

    def take(self, name: str, array: npt.NDArray[Any] | None = None) -> None:
        """Bind an output to an array; None: ONNX Runtime allocates it, see `run`."""
        if array is None:
            self._binding.bind_output(name)
        else:
            self._binding.bind_ortvalue_output(name, self._hold(name, array))

    def run(self) -> list[Any]:
        """Run the graph; returns the outputs in the order in which they were bound."""
        self.run_in_place()
        values: list[Any] = self._binding.get_outputs()
        return values

    def run_in_place(self) -> None:
        """Run the graph when every output is bound to an array.

        Raises:
            InternalError: an operator refused its operands; everything that a user can get wrong is checked before.
        """
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise InternalError(f"the engine's graph failed while it ran: {_first_line(error)}") from error

    def _hold(self, name: str, array: npt.NDArray[Any]) -> onnxruntime.OrtValue:
        import onnxruntime as ort

        value = ort.OrtValue.ortvalue_from_numpy(array)
        self._held[name] = (array, value)
        return value


@dataclass(frozen=True)
class Session:
    """One graph, ready to run.

    Args:
        model: the graph; None: the file `path`.
        path: a model file of the folder; external weights lie beside it.
        threads: intra-op threads.
        library: op library to register; None for graphs of standard operators.
        weights: where they lie in memory; None: ONNX Runtime maps the file.
        profile: folder into which ONNX Runtime's profiler writes, see `recording`; None: it is off.
    """

    path: Path
    threads: int
    library: Path | None
    model: onnx.ModelProto | None = None
    weights: WeightsMemory | None = None
    profile: Path | None = None

    @cached_property
    def ort(self) -> onnxruntime.InferenceSession:
        """The session, made on first use.

        Raises:
            SetupError: the op library cannot be loaded.
            IncompatibleEngineError: this ONNX Runtime cannot run the graph.
            VerificationError: its file is damaged.
        """
        import onnxruntime as ort

        ort.set_default_logger_severity(_ERRORS_ONLY)
        options = self._options()
        model = self._model_to_run()
        if self.weights is not None:
            self.weights.lend(options, self.load_model() if model is None else model)
        source = str(self.path) if model is None else bytes(model.SerializeToString())
        try:
            return ort.InferenceSession(source, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            # It "is not a registered function/op", or one of before, which knows less of them.
            without_chains = f"{DOMAIN}:{CHAIN}(" in str(error) or f"{CHAIN} node '" in str(error)
            again = "compile it again with this version: shadowc compile --model NAME --out FOLDER"
            raise IncompatibleEngineError(
                f"ONNX Runtime {ort.__version__} cannot run {self.path}: {_first_line(error)}",
                hint=REINSTALL if without_chains else again,
            ) from error

    def load_model(self) -> onnx.ModelProto:
        """The graph as a message, without the weights that lie beside it.

        Raises:
            VerificationError: the file is damaged.
        """
        return self.model if self.model is not None else read_graph(self.path)

    def _model_to_run(self) -> onnx.ModelProto | None:
        """What ONNX Runtime gets; None: the file. With chains, unless there is a profile, which tells of operators."""
        if self.library is not None and self.profile is None:
            return chained(self.load_model())
        return self.model

    def bind(self) -> Binding:
        """A new, empty binding.

        Raises:
            VerificationError: the weights changed after they were loaded.
        """
        if self.weights is not None:
            self.weights.require_unchanged()
        return Binding(self.ort)

    def recording(self) -> tuple[Run, ...]:
        """All runs so far, in order; ends the profile, so that it can be asked for once.

        Raises:
            InternalError: the session has no profile.
        """
        if self.profile is None:
            raise InternalError(f"the session of {self.path} was made without a profile")
        origin = self.ort.get_profiling_start_time_ns()
        return read_recording(Path(self.ort.end_profiling()), origin)

    @cached_property
    def inputs(self) -> frozenset[str]:
        """Names of the graph inputs, those with defaults included."""
        session = self.ort
        return frozenset(value.name for value in (*session.get_inputs(), *session.get_overridable_initializers()))

    @cached_property
    def cache_type(self) -> np.dtype[Any]:
        """Element type of keys and values."""
        kind = next(value.type for value in self.ort.get_inputs() if value.name.startswith("past_key_values."))
        return np.dtype({"tensor(float)": np.float32, "tensor(float16)": np.float16}[kind])

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of the graph outputs other than the cache and what a chain chose."""
        names = (value.name for value in self.ort.get_outputs())
        return tuple(name for name in names if name != NEXT and not name.startswith("present."))

    def _options(self) -> onnxruntime.SessionOptions:
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        options.enable_mem_pattern = False  # shapes change from call to call
        options.add_session_config_entry(_EXTERNAL_FOLDER, str(self.path.parent))
        options.add_session_config_entry(_SPIN_DURATION, _SPIN_MICROSECONDS)
        if self.profile is not None:
            options.enable_profiling = True
            # ONNX Runtime adds the time only, and sessions are made within one tick of it.
            options.profile_file_prefix = str(self.profile / uuid4().hex)
        if self.library is not None:
            try:
                options.register_custom_ops_library(str(self.library))
            except Exception as error:
                raise SetupError(
                    f"the op library {self.library} cannot be loaded: {_first_line(error)}",
                    hint=REINSTALL,
                ) from error
        return options


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
