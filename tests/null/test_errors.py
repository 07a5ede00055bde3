# SPDX-License-Identifier: Apache-2.0
"""The exception tree: exit codes are a promise to scripts."""

from __future__ import annotations

import pytest

from shadowc.spec import errors
from shadowc.spec.errors import ShadowcError

EXIT_CODES = {
    "InputError": 2,
    "UnsupportedError": 3,
    "IncompatibleEngineError": 4,
    "VerificationError": 5,
    "SetupError": 6,
    "InternalError": 70,
}


@pytest.mark.parametrize(("name", "code"), EXIT_CODES.items())
def test_error_has_its_exit_code(name: str, code: int) -> None:
    assert getattr(errors, name).exit_code == code


def test_every_kind_of_error_is_listed_and_has_a_code_of_its_own() -> None:
    kinds = {kind.__name__: kind.exit_code for kind in ShadowcError.__subclasses__()}
    assert kinds == EXIT_CODES
    assert len({ShadowcError.exit_code, *kinds.values()}) == len(kinds) + 1


def test_error_carries_sentence_hint_and_all_problems() -> None:
    error = errors.InputError("two files are missing", hint="shadowc verify mini", problems=["a.bin", "b.bin"])
    assert str(error) == error.message == "two files are missing"
    assert error.hint == "shadowc verify mini"
    assert error.problems == ("a.bin", "b.bin")


def test_error_has_no_hint_and_no_problems_when_none_are_given() -> None:
    error = errors.SetupError("no compiler")
    assert (error.hint, error.problems) == ("", ())
