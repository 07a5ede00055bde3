# SPDX-License-Identifier: Apache-2.0
"""Whole numbers that callers of the Python API give."""

from __future__ import annotations

from operator import index

from shadowc.spec.errors import InputError


def require_whole(**given: object) -> None:
    """Refuse arguments that are no whole numbers; numpy's are, truth values are not.

    Raises:
        InputError: naming all of them.
    """
    wrong = [f"{name} is {value!r}" for name, value in given.items() if not _is_whole(value)]
    if wrong:
        raise InputError(f"{' and '.join(wrong)}, expected a whole number", hint="for example 8")


def _is_whole(value: object) -> bool:
    try:
        index(value)  # type: ignore[arg-type]  # that is the question
    except TypeError:
        return False
    return not isinstance(value, bool)
