# SPDX-License-Identifier: Apache-2.0
"""lm-eval's model `shadowc`: its tasks on an engine or a checkpoint under masks (needs the extra `eval`).

`python -m shadowc.eval` is lm-eval's command line with this model registered. Requests go the way of `shadowc eval`, so
both give the same figures to the last digit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model

from shadowc.eval.likelihood import refuse_not_finite
from shadowc.eval.load import engine_model, torch_model
from shadowc.eval.request import DENSE, Setting, protocol_named
from shadowc.eval.task_corpus import request_of
from shadowc.eval.wikitext import rolling
from shadowc.sparsity.importance import Origin
from shadowc.spec.density import Density
from shadowc.spec.errors import InputError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from shadowc.eval.model import EvaluatedModel
    from shadowc.eval.request import Outcome, Request

_PASSED_ON = ("batch_size", "max_batch_size", "device")
"""What lm-eval hands to every model; batches are cut by their bytes here."""


@register_model("shadowc")
class ShadowcLM(TemplateLM):  # type: ignore[misc]  # lm_eval has no types
    """A model of lm-eval.

    Args:
        engine: an engine folder; or `model`.
        model: a checkpoint, as `shadowc eval --model` takes it.
        predictor: with `model`: the folder that `shadowc train` made.
        density: share of heads and neurons kept, or two with a slash; 1: the dense model.
        method: whose masks: predictor, static, normalised or random.
        protocol: decode, prompt or paper; empty: the model's own.
        scope: local or global; empty: the predictor's own.
        prompt_tokens: dense tokens at the start of each request; None: the whole prompt.
        seed: of random masks.
        threads: of an engine.

    Raises:
        InputError, UnsupportedError: an argument cannot be used, or they do not fit together.
    """

    def __init__(
        self,
        engine: str | None = None,
        model: str | None = None,
        predictor: str | None = None,
        density: float | str = 1.0,
        method: str = "predictor",
        protocol: str = "",
        scope: str = "",
        prompt_tokens: int | None = None,
        seed: int = 0,
        threads: int | None = None,
        **others: object,
    ) -> None:
        super().__init__()
        unknown = [name for name in others if name not in _PASSED_ON]
        if unknown:
            raise InputError(f"--model_args of shadowc has no {', '.join(unknown)}", hint="engine=FOLDER,density=0.5")
        if (engine is None) == (model is None):
            raise InputError("lm-eval's model shadowc takes an engine or a model", hint="--model_args engine=FOLDER")
        if model is not None:
            folder = None if predictor is None else Path(predictor)
            self.evaluated: EvaluatedModel = torch_model(Origin(model, "auto", seed), folder)
        else:
            self.evaluated = engine_model(Path(str(engine)), threads=threads, seed=seed)
        kept = Density.parse(str(density))
        named = protocol_named(protocol) if protocol else self.evaluated.protocols[0]
        self.setting = Setting(method, kept, named, scope, prompt_tokens)
        if self.setting.unmasked:
            self.setting = Setting(DENSE, protocol=named)
        self.evaluated.check(self.setting)
        self.tokenizer = self.evaluated.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text."""
        return self.evaluated.start

    @property
    def max_length(self) -> int:
        """Tokens that are fed at once."""
        return self.evaluated.context

    @property
    def tokenizer_name(self) -> str:
        """Tells requests of one tokenizer from those of another."""
        return self.evaluated.identity

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: object) -> list[int]:
        """Token ids of a text; None: with the special tokens that the tokenizer puts there by itself."""
        asked = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(string, verbose=False, **asked)["input_ids"])

    def _scored(self, requests: Sequence[Request]) -> list[Outcome]:
        """Answer requests; answers that are no numbers are refused, as in `shadowc eval`."""
        outcomes = self.evaluated.score(requests, self.setting)
        refuse_not_finite(
            self.evaluated.name, self.setting, outcomes, lambda number: f"request {number + 1} of {len(requests)}"
        )
        return outcomes

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[object, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        asked = [request_of(prompt, continuation, self.evaluated.context) for _, prompt, continuation in requests]
        outcomes = self._scored(asked)
        return [(outcome.log_probability, outcome.greedy) for outcome in outcomes]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the context."""
        found = []
        for text in (request.args[0] for request in requests):
            ids = self.tok_encode(text, add_special_tokens=False)
            windows = list(rolling(ids, self.evaluated.start, self.evaluated.context))
            outcomes = self._scored(windows)
            found.append(sum(outcome.log_probability for outcome in outcomes))
        return found

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Refuse.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            "lm-eval's model shadowc scores texts and choices; it does not generate", hint="shadowc run ENGINE PROMPT"
        )
