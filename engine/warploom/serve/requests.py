"""From the body of a request to what the batcher takes. Whatever is not understood is refused, with the parameter's
name: a setting that is silently ignored would be worse than an error."""

from __future__ import annotations

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from warploom.data.chat import ChatTemplate
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.generate.distribution import SamplingConfig

MAX_CHOICES = 8  # of one request: prompts times n
MAX_TOP = 20
_MAX_STOPS = 8
_MAX_STOP_CHARS = 256

_SAMPLING = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty"}
_COMMON = {"model", "stream", "stream_options", "n", "stop", "seed", "max_tokens", "logprobs", "user", *_SAMPLING}
_KNOWN = {
    "completions": {*_COMMON, "prompt", "echo"},
    "chat": {*_COMMON, "messages", "max_completion_tokens", "top_logprobs"},
}
# Of OpenAI's, and nothing here: taken as long as they ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "presence_penalty": (0, None),
    "frequency_penalty": (0, None),
    "logit_bias": ({}, None),
    "best_of": (1, None),
    "suffix": ("", None),
    "tools": ([], None),
    "response_format": ({"type": "text"}, None),
}


class Refused(Exception):
    """A request that is answered with an error. status: of HTTP; code: a word for programs."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Request:
    """A checked request: choices in the order of their index, n for each prompt."""

    kind: Literal["completions", "chat"]
    prompts: list[list[int]]
    n: int
    sampling: SamplingConfig
    end_ids: frozenset[int]
    num_top: int
    wants_logprobs: bool
    stream: bool
    include_usage: bool


def parse_body(body: bytes) -> dict[str, Any]:
    """Return the JSON object of a body. Raises Refused."""
    try:
        value = json.loads(body, object_pairs_hook=_unique, parse_constant=_no_constant)
    except RecursionError:
        raise Refused(400, "the body is JSON nested too deeply") from None
    except ValueError as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refused(400, f"the body is a JSON {type(value).__name__}, not an object")
    return value


def read_request(
    kind: Literal["completions", "chat"],
    body: Mapping[str, Any],
    tokenizer: Tokenizer,
    template: ChatTemplate | None,
    context: int,
) -> Request:
    """Check a request against the model it is for. context: the model's longest sequence. Raises Refused."""
    for name in body:
        if name in _NEUTRAL and body[name] in _NEUTRAL[name]:
            continue
        if name not in _KNOWN[kind]:
            raise Refused(400, f"{name} is not supported", param=name, code="unsupported_parameter")
    end_ids = {tokenizer.eos_id}
    if kind == "completions":
        prompts = _prompts(_require(body, "prompt"), tokenizer)
        num_top = _integer(body, "logprobs", None, 0, MAX_TOP)
        wants_logprobs = num_top is not None
        if body.get("echo") not in (None, False):
            raise Refused(400, "echo is not supported", param="echo", code="unsupported_parameter")
    else:
        if template is None:
            raise Refused(400, "this model has no chat template; use /v1/completions", code="no_chat_template")
        try:
            chat = template.encode(tokenizer, _require(body, "messages"), add_generation_prompt=True)
            end_ids.add(template.end_id(tokenizer))
        except UserError as error:
            raise Refused(400, str(error), param="messages") from None
        prompts = [chat.ids]
        wants_logprobs = _boolean(body, "logprobs")
        num_top = _integer(body, "top_logprobs", None, 0, MAX_TOP)
        if num_top is not None and not wants_logprobs:
            raise Refused(400, "top_logprobs needs logprobs true", param="top_logprobs")
    n = _integer(body, "n", 1, 1, MAX_CHOICES) or 1
    if n * len(prompts) > MAX_CHOICES:
        raise Refused(400, f"{len(prompts)} prompts times n {n} are more than {MAX_CHOICES} choices", param="n")
    room = context - max(map(len, prompts))
    if room < 1:
        longest = max(map(len, prompts))
        message = f"the prompt has {longest} tokens and the model's context is {context}; shorten the prompt"
        raise Refused(400, message, code="context_length_exceeded")
    default = min(16, room) if kind == "completions" else room
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, dict) or set(stream_options) - {"include_usage"}:
        raise Refused(400, "stream_options may hold include_usage alone", param="stream_options")
    return Request(
        kind=kind,
        prompts=prompts,
        n=n,
        sampling=_sampling(body, default),
        end_ids=frozenset(end_ids),
        num_top=min(num_top or 0, tokenizer.vocab_size),
        wants_logprobs=wants_logprobs,
        stream=_boolean(body, "stream"),
        include_usage=_boolean(stream_options, "include_usage"),
    )


def _sampling(body: Mapping[str, Any], default_tokens: int) -> SamplingConfig:
    name = "max_completion_tokens" if body.get("max_completion_tokens") is not None else "max_tokens"
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if (
        not isinstance(stops, list)
        or len(stops) > _MAX_STOPS
        or not all(isinstance(each, str) and len(each) <= _MAX_STOP_CHARS for each in stops)
    ):
        message = f"stop is a text or up to {_MAX_STOPS}, of up to {_MAX_STOP_CHARS} characters each"
        raise Refused(400, message, param="stop")
    given: dict[str, Any] = {}
    for field in dataclasses.fields(SamplingConfig):
        value = body.get(field.name)
        if field.name not in _SAMPLING or value is None:
            continue
        kinds = (int,) if field.name == "top_k" else (int, float)
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise Refused(400, f"{field.name} is {value!r:.40}; give a number", param=field.name)
        given[field.name] = value
    seed = _integer(body, "seed", None, -(2**63), 2**63 - 1)
    try:
        return SamplingConfig(
            **{"temperature": 1.0, **given},
            stop=tuple(stops),
            max_new_tokens=_integer(body, name, default_tokens, 1, 2**31) or default_tokens,
            seed=secrets.randbits(62) if seed is None else seed,
        )
    except UserError as error:
        raise Refused(400, str(error)) from None


def _prompts(value: Any, tokenizer: Tokenizer) -> list[list[int]]:
    """A text, texts, token ids, or lists of token ids. A text begins a document, ids stand as they are."""
    several = value if isinstance(value, list) and value and isinstance(value[0], str | list) else [value]
    if len(several) > MAX_CHOICES:
        raise Refused(400, f"prompt holds {len(several)}; give up to {MAX_CHOICES}", param="prompt")
    prompts = []
    for prompt in several:
        if isinstance(prompt, str):
            try:
                prompts.append(tokenizer.encode_beginning(prompt))
            except UserError as error:
                raise Refused(400, str(error), param="prompt") from None
        elif isinstance(prompt, list) and prompt and all(_is_id(token, tokenizer) for token in prompt):
            prompts.append(prompt)
        else:
            message = f"prompt is a text or token ids from 0 to {tokenizer.vocab_size - 1}, or up to {MAX_CHOICES} such"
            raise Refused(400, message, param="prompt")
    return prompts


def _is_id(token: Any, tokenizer: Tokenizer) -> bool:
    return isinstance(token, int) and not isinstance(token, bool) and 0 <= token < tokenizer.vocab_size


def _require(body: Mapping[str, Any], name: str) -> Any:
    if body.get(name) is None:
        raise Refused(400, f"{name} is missing", param=name)
    return body[name]


def _integer(body: Mapping[str, Any], name: str, default: int | None, low: int, high: int) -> int | None:
    value = body.get(name)
    if value is None:
        return default
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise Refused(400, f"{name} is {value!r:.40}; give a whole number from {low} to {high}", param=name)
    return value


def _boolean(body: Mapping[str, Any], name: str) -> bool:
    value = body.get(name)
    if value is not None and not isinstance(value, bool):
        raise Refused(400, f"{name} is {value!r:.40}; give true or false", param=name)
    return bool(value)


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("a key stands twice in an object")
    return record


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
