"""Checkpoints as models of EleutherAI's lm-evaluation-harness (extra `lm-eval`): its tasks, its prompts, its scores.

lm = lm_eval_model(warploom.load_model("runs/demo"))
lm_eval.simple_evaluate(model=lm, tasks=["lambada_openai"])
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

from warploom.errors import UserError, optional
from warploom.evaluation.likelihood import Request, log_likelihoods
from warploom.evaluation.text_model import TextModel, text_model
from warploom.generate.distribution import SamplingConfig
from warploom.train.load_model import LoadedModel

if TYPE_CHECKING:
    from lm_eval.api.model import TemplateLM

_MAX_GEN_TOKS = 256  # the harness's own default


def lm_eval_model(loaded: LoadedModel, *, batch_size: int = 16) -> TemplateLM:
    """Return an object for simple_evaluate(model=...). batch_size: texts written at a time.

    It answers log-likelihood, rolling log-likelihood and generation requests, not those for a chat template. Raises
    UserError for a checkpoint without tokenizer and for a model that is no decoder.
    """
    return _model_class()(text_model(loaded.model, loaded.tokenizer, batch_size=batch_size))


def _model_class() -> Any:
    template: Any = optional("lm_eval.api.model", "lm-eval").TemplateLM
    windows = optional("lm_eval.utils", "lm-eval")

    class WarploomLM(template):
        """The harness splits text into context and continuation, this class scores and writes."""

        def __init__(self, model: TextModel) -> None:
            super().__init__()
            self._model, self._codec = model, model.tokenizer

        @property
        def eot_token_id(self) -> int:
            return self._codec.eos_id

        @property
        def prefix_token_id(self) -> int:
            return self._codec.encode_beginning("")[-1]

        @property
        def max_length(self) -> int:
            return self._model.model.config.max_seq_len

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
            begin = [] if add_special_tokens is False else self._codec.begin_ids
            return [*begin, *self._codec.encode(string)]

        def _loglikelihood_tokens(self, requests: Any, **kwargs: Any) -> list[tuple[float, bool]]:
            asked = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
            found = dict(log_likelihoods(self._model.model, asked))
            return [(found[n].log_prob, found[n].is_greedy) for n in range(len(asked))]

        def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
            """Each token is scored once, with as much before it as the context holds."""
            asked, owners = [], []
            for number, (text,) in enumerate(request.args for request in requests):
                rolling = windows.get_rolling_token_windows(
                    token_list=self.tok_encode(text, add_special_tokens=False),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
                for context, continuation in map(windows.make_disjoint_window, rolling):
                    asked.append(Request(tuple(context), tuple(continuation)))
                    owners.append(number)
            totals = [0.0] * len(requests)
            for n, likelihood in log_likelihoods(self._model.model, asked):
                totals[owners[n]] += likelihood.log_prob
            return totals

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            answers = [""] * len(requests)
            alike: dict[SamplingConfig, list[int]] = defaultdict(list)
            for n, request in enumerate(requests):
                alike[_sampling(request.args[1])].append(n)
            for sampling, numbers in alike.items():
                prompts = [requests[n].args[0] for n in numbers]
                for place, (text,), _ in self._model.complete(prompts, sampling):
                    answers[numbers[place]] = text
            return answers

    return WarploomLM


def _sampling(asked: dict[str, Any]) -> SamplingConfig:
    """From the harness's generation arguments. Raises UserError for one that means nothing here."""
    arguments = dict(asked)
    until = arguments.pop("until", None) or ()
    is_drawn = arguments.pop("do_sample", False)
    max_gen_toks = _MAX_GEN_TOKS
    for name in ("max_gen_toks", "max_new_tokens", "max_tokens"):
        max_gen_toks = arguments.pop(name, max_gen_toks)
    temperature = float(arguments.pop("temperature", 1.0 if is_drawn else 0.0))
    top_p = arguments.pop("top_p", None)
    if arguments:
        raise UserError(f"the generation argument {', '.join(arguments)} is not known here; leave it out of the task")
    return SamplingConfig(
        temperature=temperature if is_drawn else 0.0,
        top_p=top_p if is_drawn else None,
        stop=(until,) if isinstance(until, str) else tuple(until),
        max_new_tokens=max_gen_toks,
    )
