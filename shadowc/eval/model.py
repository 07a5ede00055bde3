# SPDX-License-Identifier: Apache-2.0
"""What is evaluated: a checkpoint with a predictor in torch, or an engine. Both answer the same requests."""

from __future__ import annotations

import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np

from shadowc.eval.request import BY_THRESHOLD, DENSE, Outcome, Protocol, Request, Setting
from shadowc.spec.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy.typing as npt

    from shadowc.eval.ledger import Ledger

    Floats = npt.NDArray[np.float32]
    Masks = npt.NDArray[np.bool_]

METHODS = ("predictor", "static", "normalised", "random")
"""Whose masks: the predictor's, and those of its controls, which know no context."""
REFERENCE_PROTOCOLS: Mapping[str, Protocol] = MappingProxyType({"oracle": "decode", "prompt": "prompt"})
"""See references.py: the true scores of each token, and the units that fired in the prompt."""
RANKING = "static-"
"""Begins the names of controls by other criteria, see `shadowc train --ranking`."""


class EvaluatedModel(ABC):
    """Answers requests under masks."""

    name: str
    identity: str
    """Equal for equal weights, tokenizer and predictor."""
    context: int
    """Tokens that can be fed at once."""
    start: int
    """The token in front of a text that has nothing before it."""
    ledger: Ledger
    protocols: tuple[Protocol, ...]
    """Those it can follow; the first is the default."""
    methods: tuple[str, ...]
    """Those it has masks of."""
    references: tuple[str, ...] = ()
    """Further ones that are measured where they are named: BY_THRESHOLD, and REFERENCE_PROTOCOLS with one each."""
    recall: Mapping[str, Any]
    """What a predictor's own report found on held-out text (kind, scope, density, method); empty: nothing is known."""

    @abstractmethod
    def score(self, requests: Sequence[Request], setting: Setting) -> list[Outcome]:
        """Answer the requests, in their order.

        Raises:
            InputError, UnsupportedError: the setting is not one of this model.
        """

    def masks(self, request: Request, setting: Setting) -> tuple[Masks, Masks]:
        """Which units every masked token of a request computes: heads [Z,L,H], then units of neurons [Z,L,N].

        Of method oracle without those of no importance, which only fill the density up.

        Raises:
            InputError: the setting is not one of this model.
            UnsupportedError: the model does not show its masks.
        """
        raise UnsupportedError(f"{self.name} does not show its masks here", hint="shadowc eval --model MODEL")

    @property
    @abstractmethod
    def tokenizer(self) -> Any:
        """Callable as transformers' tokenizers are.

        Raises:
            InputError: there is none.
        """

    @abstractmethod
    def refuse_calibration_text(self, content: bytes, documents: Sequence[str]) -> None:
        """Refuse a text that the predictor was calibrated on.

        Raises:
            InputError: it is that text, or shares paragraphs with it.
        """

    def check(self, *settings: Setting) -> None:
        """Refuse settings before anything is measured.

        Raises:
            InputError: nothing of that name is known at all, or it needs a predictor that is not there.
            UnsupportedError: this kind of model cannot do it.
        """
        methods = dict.fromkeys(setting.method for setting in settings if not setting.dense)
        known = (*METHODS, *BY_THRESHOLD, *REFERENCE_PROTOCOLS)
        unknown = [name for name in methods if name not in known and not name.startswith(RANKING)]
        if unknown:
            raise InputError(
                f"unknown method {', '.join(map(repr, unknown))}",
                hint=f"--methods takes {', '.join(known)}, {RANKING}CRITERION",
            )
        lacking = [method for method in methods if method not in (*self.methods, *self.references)]
        if lacking:
            raise self._lacks(lacking)
        held = [one for one in settings if one.method in BY_THRESHOLD and one.protocol != "decode"]
        if held:
            raise UnsupportedError(
                f"method {held[0].method} meets a density in the mean over tokens, and under protocol "
                f"{held[0].protocol!r} one token makes the mask of many",
                hint="--protocol decode",
            )
        for protocol in dict.fromkeys(setting.protocol for setting in settings):
            if protocol not in self.protocols:
                raise self._cannot(protocol)
        for setting in settings:
            if setting.prompt_tokens is not None and setting.protocol == "paper":
                raise InputError(
                    "protocol paper masks a sequence from its first token on: none is dense at the start",
                    hint="leave --prompt-tokens out, or --protocol decode,prompt",
                )
            least = 1 if setting.protocol == "prompt" else 0
            if setting.prompt_tokens is not None and setting.prompt_tokens < least:
                raise InputError(
                    f"protocol {setting.protocol} takes at least {least} dense tokens at the start of a request; "
                    f"prompt_tokens is {setting.prompt_tokens}",
                    hint=f"--prompt-tokens {least}",
                )
            wanted = REFERENCE_PROTOCOLS.get(setting.method, setting.protocol)
            if setting.protocol != wanted:
                raise InputError(
                    f"method {setting.method} has protocol {wanted} only; found {setting.protocol}",
                    hint=f"--protocol {wanted}, in a command of its own",
                )

    def _lacks(self, methods: Sequence[str]) -> Exception:
        has = ", ".join((*self.methods, *self.references)) or "none"
        return InputError(
            f"{self.name} has no masks of method {', '.join(methods)}; it has: {has}",
            hint="--predictor FOLDER, from shadowc train",
        )

    def _cannot(self, protocol: str) -> Exception:
        return UnsupportedError(
            f"{self.name} cannot follow protocol {protocol!r}", hint=f"--protocol {', '.join(self.protocols)}"
        )


def random_scores(
    seed: int, request: Request, heads: tuple[int, int], neurons: tuple[int, int]
) -> Callable[[int], tuple[Floats, Floats]]:
    """Return what draws the scores [1,Z,L,H] and [1,Z,L,N] of the next Z masked tokens of a request.

    They depend on the seed and the request's tokens alone: neither batches nor pieces nor what ran before change them.
    """
    text = zlib.crc32(np.asarray(request.ids, np.int64).tobytes())
    of_heads, of_neurons = (np.random.default_rng([seed, text, kind]) for kind in range(2))
    return lambda tokens: (
        of_heads.random((1, tokens, *heads), np.float32),
        of_neurons.random((1, tokens, *neurons), np.float32),
    )


def dense_setting(model: EvaluatedModel) -> Setting:
    """The setting without masks; its protocol only says how an engine is run."""
    return Setting(DENSE, protocol=model.protocols[0])
