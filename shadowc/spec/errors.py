# SPDX-License-Identifier: Apache-2.0
"""The exception tree: one class and one exit code per kind of failure.

Every message says what was expected, what was found and where; `hint` is the next thing to type.
"""

from __future__ import annotations

from collections.abc import Sequence


class ShadowcError(Exception):
    """Base of everything that shadowc raises on purpose.

    Args:
        message: one sentence for the reader.
        hint: the next command or action, without a full stop; empty if there is none.
        problems: all single findings, when there is more than one.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "", problems: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.problems = tuple(problems)


class InputError(ShadowcError):
    """The user's input cannot be used: a name, a path, an option, a damaged checkpoint."""

    exit_code = 2


class UnsupportedError(ShadowcError):
    """The input is valid, but shadowc does not handle its kind (yet)."""

    exit_code = 3


class IncompatibleEngineError(ShadowcError):
    """The engine folder and this installation do not fit together."""

    exit_code = 4


class VerificationError(ShadowcError):
    """A check of bytes or numbers failed: changed files, or parity out of tolerance."""

    exit_code = 5


class SetupError(ShadowcError):
    """This machine lacks something that is needed: a library, a package, the network."""

    exit_code = 6


class InternalError(ShadowcError):
    """A promise that shadowc makes to itself was broken; a bug."""

    exit_code = 70


class SlowPlaceWarning(UserWarning):
    """Something works, but lies where it makes everything slow."""


class LookAheadWarning(UserWarning):
    """A figure is no bound: what decided the masks knew the token to come."""
