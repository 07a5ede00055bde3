# SPDX-License-Identifier: Apache-2.0
"""Downloads a checkpoint from the Hugging Face hub: the only module of shadowc that uses the network.

In: a repository id. Out: the folder of its snapshot in the hub's own cache (HF_HOME). Offline, by option or by
HF_HUB_OFFLINE, only that cache is looked at.
"""

from __future__ import annotations

import difflib
import errno
import os
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from shadowc.checkpoint.files import INDEX_FILE, PICKLED_FILE, PICKLED_INDEX_FILE, SINGLE_FILE, no_weights
from shadowc.checkpoint.opt import PUBLISHED_NAMES
from shadowc.output import NO_SPACE, no_space
from shadowc.spec.errors import InputError, SetupError

_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
FACT_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
WEIGHT_FORMS = (
    ((SINGLE_FILE, INDEX_FILE), ("model*.safetensors", INDEX_FILE)),
    ((PICKLED_FILE,), (PICKLED_FILE,)),
    ((PICKLED_INDEX_FILE,), ("pytorch_model-*.bin", PICKLED_INDEX_FILE)),
)
"""Files that show a form of weights, and what to download of it; the first form that a repository has is taken."""

ANSWER_SECONDS = 15.0
"""How long the hub may take for its first answer, name resolution and all addresses included."""
_REQUEST_SECONDS = 6.0
_SIMILAR = 0.8

T = TypeVar("T")


def is_offline() -> bool:
    """Whether the environment forbids the network (HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE)."""
    return any(
        os.environ.get(name, "").upper() in {"1", "ON", "YES", "TRUE"}
        for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def download(repository: str, *, offline: bool, weights: bool = True) -> Path:
    """The folder that holds a repository's config, tokenizer and (unless excluded) weights in one form.

    Args:
        repository: `owner/name`.
        offline: look into the local cache only.
        weights: False: everything but the weights, for dummy weights of the same shape.

    Raises:
        InputError: the hub has no such repository, or it holds no weights.
        UnsupportedError: it holds weights in another format only; nothing was downloaded.
        SetupError: the hub cannot be reached, refuses access, or the local cache lacks the files.
    """
    from huggingface_hub.errors import HFValidationError

    try:
        if offline or is_offline():
            return _cached_weights(repository) if weights else _cached(repository, ())
        files = _list_files(repository)
        return _fetch(repository, [*FACT_FILES, *(_needed_weights(repository, files) if weights else ())])
    except HFValidationError as error:
        raise InputError(
            f"there is no folder {repository}, and the hub has no names of this form",
            hint="check the path; a hub id has the form owner/name",
        ) from error


def _needed_weights(repository: str, files: frozenset[str]) -> Sequence[str]:
    """Patterns of the weight files to download, given all files of the repository."""
    for signs, patterns in WEIGHT_FORMS:
        if not files.isdisjoint(signs):
            return patterns
    raise no_weights(f"hub repository {repository}", sorted(files), repository)


def _cached_weights(repository: str) -> Path:
    """The cached folder with the first form of weights that is complete there, else the first error."""
    problem: SetupError | None = None
    folder = Path()
    for signs, patterns in WEIGHT_FORMS:
        try:
            folder = _cached(repository, patterns)
        except SetupError as error:
            problem = problem or error
            continue
        if any((folder / sign).exists() for sign in signs):
            return folder
    if problem is not None:
        raise problem
    return folder


def _cached(repository: str, weights: Sequence[str]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = [*FACT_FILES, *weights]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError as error:
        raise SetupError(
            f"{repository} is not in the local hub cache (or not completely), and the network is not to be used",
            hint=f"{_suggestion(repository)}run hf download {repository} where there is a network, "
            "or drop --offline and HF_HUB_OFFLINE",
        ) from error


def _list_files(repository: str) -> frozenset[str]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    api = HfApi(endpoint=_endpoint())
    try:
        answer = _within(ANSWER_SECONDS, lambda: api.model_info(repository, timeout=_REQUEST_SECONDS))
    except GatedRepoError as error:
        raise _gated(repository) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"there is neither a folder {repository} here nor a public model of that name on the hub",
            hint=f"{_suggestion(repository)}check the spelling; for a private model run hf auth login",
        ) from error
    except _transport_errors() as error:
        raise _unreachable(repository, "the hub could not be reached", error) from error
    return frozenset(file.rfilename for file in answer.siblings or ())


def _fetch(repository: str, patterns: list[str]) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError

    try:
        return Path(snapshot_download(repository, allow_patterns=patterns, endpoint=_endpoint()))
    except GatedRepoError as error:
        raise _gated(repository) from error
    except _transport_errors() as error:
        if isinstance(error, OSError):
            _refuse_cache(repository, Path(constants.HF_HUB_CACHE), error)
        raise _unreachable(repository, "the download from the hub failed", error) from error


def _refuse_cache(repository: str, place: Path, error: OSError) -> None:
    """Say so where it is the cache that fails; a refused connection has no file."""
    if error.errno in NO_SPACE:
        raise no_space(place, error) from error
    if error.errno in _FORBIDDEN and error.filename is not None:
        raise SetupError(
            f"{repository} cannot be kept in {place}: {error.strerror}",
            hint="set HF_HOME to a folder that you may write to",
        ) from error


def _gated(repository: str) -> SetupError:
    return SetupError(
        f"access to {repository} must be asked for on the hub", hint="run hf auth login with an account that has access"
    )


def _suggestion(repository: str) -> str:
    """The published models with the most similar names, as the beginning of a hint; nothing for one of them."""
    known = [f"facebook/{name}" for name in PUBLISHED_NAMES]
    near = difflib.get_close_matches(repository, known, n=2, cutoff=_SIMILAR)
    return f"did you mean {' or '.join(near)}? " if near and repository not in known else ""


def _unreachable(repository: str, what: str, error: BaseException) -> SetupError:
    reason = (str(error).splitlines() or [""])[0] or type(error).__name__
    return SetupError(
        f"{repository}: {what}: {reason}",
        hint="check the network, add --offline if it was downloaded before, or try --model opt-mini (needs no network)",
    )


def _transport_errors() -> tuple[type[Exception], ...]:
    """OSError and the root error of the HTTP client, which the hub library has changed once already."""
    from huggingface_hub.errors import HfHubHTTPError

    return (OSError, *(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception)))


def _endpoint() -> str | None:
    return os.environ.get("HF_ENDPOINT") or None


def _within(seconds: float, ask: Callable[[], T]) -> T:
    """Run a request in a thread of its own and give it up after a while.

    A request's own timeout counts per address and not for name resolution, so it does not bound the whole.
    """
    answers: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(ask())
        except BaseException as error:  # handed to the caller below
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if failures:
        raise failures[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:g} seconds")
    return answers[0]
