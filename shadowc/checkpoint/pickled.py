# SPDX-License-Identifier: Apache-2.0
"""Reads what torch.save wrote (pytorch_model.bin and its shards), as far as it is weights and nothing else.

In: one file. Out: the same tensors, bit for bit and under the same names, as a safetensors file. A pickle can run any
code; torch's weights-only reader runs none, and what it refuses is refused here, never read in another way. The file
is mapped and written on one tensor at a time; formats that cannot be mapped are read whole, which is one shard.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from shadowc.checkpoint.stored import GIT_LFS, GIT_LFS_PROBLEM
from shadowc.spec.errors import InputError, SetupError, ShadowcError, UnsupportedError

if TYPE_CHECKING:
    import torch

OLDEST_TORCH = (2, 10)
"""Before it, a crafted file could corrupt memory through the weights-only reader (CVE-2026-24747)."""

_ZIP = b"PK\x03\x04"
_PICKLE = b"\x80"
"""Every pickle of protocol 2 or later, and so all of torch.save's older format, starts with it."""
_LEGACY_PICKLES = 5
"""Magic number, protocol, system, content, and the order of the numbers behind them."""
_NAMED = 5
_AGAIN = "download the checkpoint again"
_TRUSTED = (
    "ask whoever made it for model.safetensors, which model.save_pretrained(FOLDER) writes; "
    "to measure speed alone, add --load-format dummy"
)
_HEAD_END = "lm_head.weight"
_EMBEDDING_END = "decoder.embed_tokens.weight"


def container_problem(path: Path) -> str | None:
    """What is wrong with a file as a container, told from its frame alone; None: nothing.

    So truncated downloads are found before the first of many shards is converted.
    """
    try:
        start = _start(path)
        if start == GIT_LFS:
            return f"{path.name}: {GIT_LFS_PROBLEM}"
        if len(start) < len(_ZIP):
            return f"{path.name}: truncated: it has {len(start)} bytes"
        if start.startswith(_ZIP):
            with zipfile.ZipFile(path):
                return None
        if start.startswith(_PICKLE) or tarfile.is_tarfile(path):
            return None
    except OSError as error:
        return f"{path.name}: cannot be read: {error.strerror or error}"
    except Exception:  # zipfile lets the errors of what it calls through
        return f"{path.name}: truncated: its table of contents, which should lie at its end, is not there"
    return f"{path.name}: is not a file that torch.save writes"


def convert(path: Path, out: Path, advance: Callable[[int, int], None] | None = None) -> None:
    """Write the tensors of one torch.save file as safetensors.

    Args:
        path: the file.
        out: the safetensors file to write. The head is left out if it shares the embedding's memory.
        advance: called with bytes written and their total.

    Raises:
        InputError: the file is truncated or damaged.
        UnsupportedError: it needs more than weights_only, or holds something else than plain tensors.
        SetupError: torch is too old to read such files safely.
        OSError: `out` cannot be written.
    """
    import torch

    check_torch(torch.__version__)
    problem = container_problem(path)
    if problem is not None:
        raise InputError(problem, hint=_AGAIN)
    _write(out, _without_tied_head(_plain_tensors(path, _load(path))), advance)


def check_torch(version: str) -> None:
    """Refuse a torch whose weights-only reader is not safe; raises SetupError."""
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TORCH:
        oldest = ".".join(map(str, OLDEST_TORCH))
        raise SetupError(
            f"torch {version} cannot read pickled weights safely (CVE-2026-24747), expected at least {oldest}",
            hint=f'python -m pip install "torch>={oldest}", or give the checkpoint as safetensors',
        )


def _load(path: Path) -> object:
    """torch.load without code: mapped where the format allows it, else read whole."""
    import torch

    start = _start(path)
    if not start.startswith((_ZIP, _PICKLE)):
        raise UnsupportedError(
            f"{path}: is in the tar format of torch before 0.1.10, which cannot be read without running code",
            hint=_TRUSTED,
        )
    mapped = start.startswith(_ZIP) and _is_mappable(path)
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except MemoryError:
        raise
    except Exception as error:  # the reader raises nearly anything for damaged content
        raise _refusal(path, error) from error


def _start(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(GIT_LFS))


def _is_mappable(path: Path) -> bool:
    """Whether the tensors lie in a zip as they are: torch maps compressed ones too, and gives garbage.

    Raises:
        UnsupportedError: the file is a TorchScript program.
    """
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.filename.rsplit("/", 1)[-1] == "constants.pkl" for entry in entries):
        raise UnsupportedError(
            f"{path}: is a TorchScript program, expected the weights alone",
            hint="save its state_dict() as safetensors",
        )
    return all(entry.compress_type == zipfile.ZIP_STORED for entry in entries)


def _refusal(path: Path, error: Exception) -> ShadowcError:
    """What the reader's error means; its own text advises to load without protection."""
    if not isinstance(error, pickle.UnpicklingError) or not _is_whole(path):
        known = not isinstance(error, pickle.UnpicklingError)
        first = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".") if known else ""
        return InputError(f"{path}: truncated or damaged: {first or 'it ends in the middle'}", hint=_AGAIN)
    needed = re.findall(r"GLOBAL (\S+)", str(error)) or re.findall(r"Unsupported \w+ \S+", str(error))
    what = ", ".join(dict.fromkeys(needed)) or "an object that is no tensor"
    return UnsupportedError(
        f"{path}: its pickle needs {what}, expected tensors and nothing else; "
        "a pickle that needs more can run any code, so nothing of it was used",
        hint=_TRUSTED,
    )


def _is_whole(path: Path) -> bool:
    """Whether the pickles of the older format, which lie in front of the numbers, end; a zip was checked before."""
    with path.open("rb") as file:
        if file.read(1) != _PICKLE:
            return True
        file.seek(0)
        try:
            for _ in range(_LEGACY_PICKLES):
                for _opcode in pickletools.genops(file):
                    pass
        except Exception:  # not in the middle of a known instruction only
            return False
    return True


def _plain_tensors(path: Path, content: object) -> dict[str, torch.Tensor]:
    """The content as a flat dict of ordinary tensors, or an error that names what is not."""
    import torch

    if not isinstance(content, Mapping):
        raise UnsupportedError(f"{path}: holds a {type(content).__name__}, expected a dict of tensors", hint=_TRUSTED)
    others = [
        f"{name!r} ({type(value).__name__})"
        for name, value in content.items()
        if not (isinstance(name, str) and isinstance(value, torch.Tensor))
    ]
    if others:
        raise UnsupportedError(
            f"{path}: holds {_join(others)}, expected a flat dict of tensors, as model.state_dict() is",
            hint="if it is a training checkpoint, save the model in it alone: model.save_pretrained(FOLDER)",
            problems=others,
        )
    tensors = {name: value.detach() for name, value in content.items()}
    odd = [f"{name} ({reason})" for name, tensor in tensors.items() if (reason := _oddity(tensor)) is not None]
    if odd:
        raise UnsupportedError(
            f"{path}: holds tensors that are not plain numbers: {_join(odd)}",
            hint="give the original checkpoint in fp32, fp16 or bf16",
            problems=odd,
        )
    _check_size(path, tensors)
    return tensors


def _oddity(tensor: torch.Tensor) -> str | None:
    import torch

    if tensor.is_meta:
        return "without data"
    if tensor.is_quantized or tensor.layout != torch.strided:
        return f"{tensor.dtype}, {tensor.layout}".replace("torch.", "")
    return None if tensor.dtype in _names() else str(tensor.dtype).removeprefix("torch.")


def _check_size(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse views that would unfold to much more than the file holds, and fill the disk."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors.values()}
    held, unfolded = sum(storages.values()), sum(_bytes(tensor) for tensor in tensors.values())
    if unfolded > 2 * held:
        raise UnsupportedError(
            f"{path}: its tensors are views that unfold to {unfolded} bytes, the file holds {held}", hint=_TRUSTED
        )


def _without_tied_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Leave out a head that is the embedding under a second name; any other head stays, and is compared later."""
    head = tensors.get(_HEAD_END)
    shared = [name for name in tensors if name.endswith(_EMBEDDING_END)]
    if head is None or len(shared) != 1 or not _is_same_memory(head, tensors[shared[0]]):
        return tensors
    return {name: tensor for name, tensor in tensors.items() if name != _HEAD_END}


def _is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return (a.data_ptr(), a.dtype, a.shape, a.stride()) == (b.data_ptr(), b.dtype, b.shape, b.stride())


def _write(out: Path, tensors: Mapping[str, torch.Tensor], advance: Callable[[int, int], None] | None) -> None:
    """Write safetensors one tensor at a time; widest types first, so that all of them are aligned."""
    import torch

    names, order = _names(), sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        span = [end, end + _bytes(tensor)]
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        end = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with out.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        done = 0
        for name in order:
            flat = tensors[name].contiguous().reshape(-1).view(torch.uint8)
            file.write(flat.numpy().data)
            done += flat.numel()
            if advance is not None:
                advance(done, end)
        file.flush()
        os.fsync(file.fileno())


def _names() -> Mapping[torch.dtype, str]:
    """What safetensors calls torch's types; a type that the model cannot use is refused later, by tensor."""
    import torch

    return {
        torch.float64: "F64",
        torch.float32: "F32",
        torch.float16: "F16",
        torch.bfloat16: "BF16",
        torch.int64: "I64",
        torch.int32: "I32",
        torch.int16: "I16",
        torch.int8: "I8",
        torch.uint8: "U8",
        torch.bool: "BOOL",
    }


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _join(found: list[str]) -> str:
    more = f" and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
    return ", ".join(found[:_NAMED]) + more
