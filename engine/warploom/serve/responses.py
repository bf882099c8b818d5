"""What the batcher sends, as the objects that OpenAI's API defines: whole answers, and the chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from warploom.data.tokenizer import Tokenizer
from warploom.generate.continuous import Finish, Token
from warploom.serve.requests import Request


@dataclass
class Choice:
    """One continuation as it comes."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish: Finish | None = None

    def add(self, event: Token | Finish) -> None:
        self.text += event.text
        if isinstance(event, Token):
            self.tokens.append(event)
        else:
            self.finish = event


class Writer:
    """Writes the answer to one request, whole or in chunks."""

    def __init__(self, request: Request, model: str, tokenizer: Tokenizer) -> None:
        self._request, self._tokenizer = request, tokenizer
        prefix, name = ("chatcmpl", "chat.completion") if request.kind == "chat" else ("cmpl", "text_completion")
        chunk_name = "chat.completion.chunk" if request.kind == "chat" else name
        common = {"id": f"{prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model}
        self._whole, self._chunk = {**common, "object": name}, {**common, "object": chunk_name}

    def whole(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer of finished choices."""
        return {
            **self._whole,
            "choices": [
                {
                    "index": index,
                    **(
                        {"message": {"role": "assistant", "content": choice.text}}
                        if self._request.kind == "chat"
                        else {"text": choice.text}
                    ),
                    "logprobs": self._log_probs(choice.tokens),
                    "finish_reason": None if choice.finish is None else choice.finish.reason,
                }
                for index, choice in enumerate(choices)
            ],
            "usage": self.usage(choices),
        }

    def first(self, index: int) -> str | None:
        """Return the chunk that opens a choice, if the API has one."""
        return self._chunk_of(index, {"role": "assistant", "content": ""}) if self._request.kind == "chat" else None

    def event(self, index: int, event: Token | Finish) -> str | None:
        """Return the chunk of an event; None if it has nothing to say."""
        tokens = [event] if isinstance(event, Token) else []
        reason = event.reason if isinstance(event, Finish) else None
        if not event.text and reason is None and not self._request.wants_logprobs:
            return None
        delta = {"content": event.text} if event.text or reason is None else {}
        return self._chunk_of(index, delta, event.text, tokens, reason)

    def last(self, choices: Sequence[Choice]) -> str | None:
        """Return the chunk of the usage, if it was asked for."""
        if not self._request.include_usage:
            return None
        return _sse({**self._chunk, "choices": [], "usage": self.usage(choices)})

    def usage(self, choices: Iterable[Choice]) -> dict[str, int]:
        prompt = sum(map(len, self._request.prompts))
        completion = sum(len(choice.tokens) for choice in choices)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
        }

    def _chunk_of(
        self,
        index: int,
        delta: dict[str, str],
        text: str = "",
        tokens: Sequence[Token] = (),
        reason: str | None = None,
    ) -> str:
        content = {"delta": delta} if self._request.kind == "chat" else {"text": text}
        log_probs = self._log_probs(tokens) if tokens else None
        choice = {"index": index, **content, "logprobs": log_probs, "finish_reason": reason}
        return _sse({**self._chunk, "choices": [choice]})

    def _log_probs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._request.wants_logprobs:
            return None
        if self._request.kind == "chat":
            return {
                "content": [
                    {
                        **self._chat_entry(token.id, token.log_prob),
                        "top_logprobs": [self._chat_entry(*each) for each in token.top],
                    }
                    for token in tokens
                ]
            }
        return {
            "tokens": [self._tokenizer.decode([token.id]) for token in tokens],
            "token_logprobs": [token.log_prob for token in tokens],
            "top_logprobs": [
                {self._tokenizer.decode([each]): log_prob for each, log_prob in token.top} for token in tokens
            ],
        }

    def _chat_entry(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self._tokenizer.decode([token])
        # A token may be part of a character; its text is then U+FFFD and its bytes are not known here.
        return {
            "token": text,
            "logprob": log_prob,
            "bytes": None if "\ufffd" in text else list(text.encode()),
        }


def error_event(message: str) -> str:
    """Return what ends a stream that fails after it has begun."""
    return _sse({"error": {"message": message, "type": "server_error", "param": None, "code": "server_error"}})


DONE = "data: [DONE]\n\n"


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"
