"""Who judges the answers of MT-Bench: a model behind an OpenAI-compatible address, or a checkpoint."""

from __future__ import annotations

import http.client
import json
import re
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from warploom.data.chat import ChatTemplate
from warploom.errors import UserError
from warploom.evaluation.config import EvalConfig
from warploom.evaluation.text_model import TextModel, text_model
from warploom.generate.distribution import SamplingConfig
from warploom.train.load_model import load_model

Messages = Sequence[Mapping[str, str]]

_MAX_TOKENS = 2048
_TIMEOUT_S = 600.0
_MAX_REPLY_BYTES = 1 << 22
# As FastChat looks for it: two brackets first, one otherwise.
_RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]")
_LOOSE_RATING = re.compile(r"\[(\d+\.?\d*)\]")


class Judge(Protocol):
    name: str

    def __call__(self, messages: Messages) -> str:
        """Return what the judge says to a conversation, at temperature 0."""


def make_judge(config: EvalConfig) -> Judge | None:
    """Return the judge that config names, None if it names none. Raises UserError for one that is not to be had."""
    if config.judge is None:
        return None
    if config.judge.startswith(("http://", "https://")):
        key = None
        if config.judge_key_file is not None:
            try:
                key = config.judge_key_file.read_text(encoding="utf-8").strip()
            except OSError as error:
                raise UserError(f"the judge's key cannot be read from {config.judge_key_file}: {error}") from error
        return EndpointJudge(config.judge, config.judge_model, key)
    if not Path(config.judge).is_dir():
        raise UserError(f"the judge {config.judge} is neither an http address nor the folder of a checkpoint")
    loaded = load_model(config.judge)
    template = loaded.chat_template or own_template(loaded.tokenizer)
    return ModelJudge(str(loaded.path), text_model(loaded.model, loaded.tokenizer, chat_template=template))


def own_template(tokenizer: object) -> ChatTemplate | None:
    """The chat template that came with an imported tokenizer."""
    source = getattr(tokenizer, "chat_template", None)
    return None if source is None else ChatTemplate(source)


class EndpointJudge:
    """Asks POST {address}/chat/completions."""

    def __init__(self, address: str, model: str, key: str | None = None) -> None:
        self.name = f"{model} at {address}"
        self._url, self._model = f"{address.rstrip('/')}/chat/completions", model
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})

    def __call__(self, messages: Messages) -> str:
        """Raises UserError if there is no answer, naming the address and what it said."""
        body = {"model": self._model, "messages": list(messages), "temperature": 0, "max_tokens": _MAX_TOKENS}
        request = urllib.request.Request(self._url, json.dumps(body).encode("utf-8"), self._headers, method="POST")
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as reply:
                answer = json.loads(reply.read(_MAX_REPLY_BYTES))
            content = answer["choices"][0]["message"]["content"]
        except urllib.error.HTTPError as error:
            said = error.read(300).decode("utf-8", "replace")
            raise UserError(
                f"the judge at {self._url} answers {error.code}: {said}; answers so far are kept"
            ) from error
        except (OSError, http.client.HTTPException) as error:
            raise UserError(f"the judge at {self._url} cannot be reached: {error}; what is done is kept") from error
        except (ValueError, LookupError, TypeError) as error:
            raise UserError(
                f"the judge at {self._url} sent no chat completion ({error!r}); is it the right one?"
            ) from error
        return content if isinstance(content, str) else ""


class ModelJudge:
    """Asks a checkpoint that has a chat template."""

    def __init__(self, name: str, model: TextModel) -> None:
        if model.chat_template is None:
            raise UserError(
                f"the judge {name} holds no chat template; take a checkpoint that was tuned on conversations"
            )
        self.name, self._model, self._template = name, model, model.chat_template
        self._end_id = self._template.end_id(model.tokenizer)

    def __call__(self, messages: Messages) -> str:
        ids = self._template.encode(self._model.tokenizer, messages, add_generation_prompt=True).ids
        sampling = SamplingConfig(temperature=0.0, max_new_tokens=_MAX_TOKENS)
        ((_, (text,), _),) = self._model.complete([ids], sampling, end_id=self._end_id)
        return text


def rating_of(judgment: str) -> float | None:
    """The rating in a judgment, None where there is none from 1 to 10."""
    found = _RATING.search(judgment) or _LOOSE_RATING.search(judgment)
    rating = None if found is None else float(found[1])
    return rating if rating is not None and 1.0 <= rating <= 10.0 else None
