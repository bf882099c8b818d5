"""Chat templates: from messages to token ids, and which of these are the assistant's answers.

A template is Jinja2 as Hugging Face's tokenizers have it: it sees `messages`, `add_generation_prompt`, `bos_token` and
`eos_token`, and runs in a sandbox. A control token is only what the template itself writes; the same characters
in a message stay plain text, so no message can end its turn or begin another's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError

Message = Mapping[str, Any]  # "role" and "content"

# A name stands for a template here; anything else is a file.
TEMPLATES = {
    "turns": """\
{{- bos_token }}
{%- for message in messages %}
    {{- "### " ~ message.role | capitalize ~ "\\n" ~ message.content | trim }}
    {{- eos_token ~ "\\n" if message.role == "assistant" else "\\n\\n" }}
{%- endfor %}
{%- if add_generation_prompt %}{{ "### Assistant\\n" }}{% endif %}""",
    "alpaca": """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == "assistant" %}{{ message.content | trim ~ eos_token ~ "\\n\\n" }}
    {%- elif message.role == "system" %}{{ message.content | trim ~ "\\n\\n" }}
    {%- else %}
        {%- if loop.first %}{{ "Below is an instruction that describes a task. Write a response that appropriately \
completes the request.\\n\\n" }}{% endif %}
        {{- "### Instruction:\\n" ~ message.content | trim ~ "\\n\\n### Response:\\n" }}
    {%- endif %}
{%- endfor %}""",
}
_ROLES = ("system", "user", "assistant", "tool")
# Code points that Unicode will never give to a character: one of them that no message has marks what only looks like
# a control token, until the text is encoded.
_MARKERS = [chr(code) for code in range(0xFDD0, 0xFDF0)]


@dataclass(frozen=True)
class EncodedChat:
    ids: list[int]
    is_answer: list[bool]
    """Whether the assistant wrote the token: its words, and the control token that ends its turn."""


class ChatTemplate:
    """One template. Raises UserError for a source that is no Jinja2."""

    def __init__(self, source: str) -> None:
        self.source = source
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"the chat template is no Jinja2: {error}; mend it") from error

    @classmethod
    def named(cls, name: str) -> ChatTemplate:
        """Return the template of TEMPLATES, or that of a file. Raises UserError if there is neither."""
        if name in TEMPLATES:
            return cls(TEMPLATES[name])
        try:
            return cls(Path(name).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"there is no chat template {name!r}: it is none of {', '.join(TEMPLATES)}, and no file: {error}"
            ) from error

    def encode(
        self, tokenizer: Tokenizer, messages: Sequence[Message], *, add_generation_prompt: bool = False
    ) -> EncodedChat:
        """Return the ids of a conversation; with add_generation_prompt it ends where the assistant is to go on.

        The ids are cut where an answer begins and ends, so that an answer is encoded in training as it is generated.
        Raises UserError for messages that are none, and for a template that rewrites the beginning of a conversation
        when more is said.
        """
        messages, marker = _checked(messages, tokenizer)
        text = self._render(tokenizer, messages, add_generation_prompt)
        cuts = [0]
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(tokenizer, messages[:index], True)
            after = self._render(tokenizer, messages[: index + 1], False)
            if not after.startswith(before) or not text.startswith(after):
                raise UserError(
                    "the chat template does not write a conversation as a continuation of its beginning (at message "
                    f"{index + 1}); answers cannot be told from the rest, take another template"
                )
            end = len(after.rstrip())
            # White space behind the token that ends the turn belongs to the turns after it.
            cuts += [len(before), end if after[:end].endswith(tuple(tokenizer.control_tokens)) else len(after)]
        ids: list[int] = []
        is_answer: list[bool] = []
        for number, (start, end) in enumerate(zip(cuts, [*cuts[1:], len(text)], strict=True)):
            piece = _encode_rendered(tokenizer, text[start:end], marker)
            ids += piece
            is_answer += [number % 2 == 1] * len(piece)
        return EncodedChat(ids, is_answer)

    def end_id(self, tokenizer: Tokenizer) -> int:
        """Return the control token with which an answer ends. Raises UserError if the template writes none."""
        chat = self.encode(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
        last = max((index for index, answer in enumerate(chat.is_answer) if answer), default=None)
        if last is None or chat.ids[last] not in tokenizer.control_tokens.values():
            raise UserError(
                "the chat template ends an answer with no control token of the tokenizer "
                f"({', '.join(tokenizer.control_tokens)}), so generation would not stop; write "
                "{{ eos_token }} behind the content of the assistant's messages"
            )
        return chat.ids[last]

    def _render(self, tokenizer: Tokenizer, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        try:
            return self._template.render(
                messages=messages,
                add_generation_prompt=add_generation_prompt,
                bos_token="" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id),
                eos_token=tokenizer.token(tokenizer.eos_id),
            )
        except (jinja2.TemplateError, TypeError, ValueError, KeyError, OverflowError, RecursionError) as error:
            raise UserError(f"the chat template cannot write this conversation: {error}") from error


def encode_completion(tokenizer: Tokenizer, prompt: str, response: str) -> EncodedChat:
    """Return a prompt and its response as they stand, a document of its own; the answer is the response and its end."""
    before, after = tokenizer.encode_beginning(prompt), [*tokenizer.encode(response), tokenizer.eos_id]
    return EncodedChat(before + after, [False] * len(before) + [True] * len(after))


def _checked(messages: Sequence[Message], tokenizer: Tokenizer) -> tuple[list[dict[str, Any]], str]:
    """Return the messages as {"role", "content"} with marked contents, and the marker."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError(f"a conversation is a list of messages with role and content, got {messages!r:.60}")
    contents = []
    for message in messages:
        role = message.get("role") if isinstance(message, Mapping) else None
        content = message.get("content") if isinstance(message, Mapping) else None
        if isinstance(content, Sequence) and not isinstance(content, str):
            content = _joined(content)
        if role not in _ROLES or not isinstance(content, str):
            raise UserError(
                f"a message is a role ({', '.join(_ROLES)}) and a content that is a text, got {message!r:.120}"
            )
        contents.append((role, content))
    everything = "".join(content for _, content in contents)
    marker = next((char for char in _MARKERS if char not in everything), None)
    if marker is None:
        raise UserError("the conversation holds every noncharacter from U+FDD0 to U+FDEF; remove them")
    pattern = _control_pattern(tokenizer)
    return [
        {"role": role, "content": pattern.sub(lambda found: found[0][:1] + marker + found[0][1:], content)}
        for role, content in contents
    ], marker


def _joined(parts: Sequence[Any]) -> str | None:
    """The text of a content in parts, as OpenAI's clients send it; None if a part is no text."""
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    found = [text for text in texts if isinstance(text, str)]
    return "".join(found) if len(found) == len(texts) else None


def _encode_rendered(tokenizer: Tokenizer, text: str, marker: str) -> list[int]:
    ids: list[int] = []
    start = 0
    for found in _control_pattern(tokenizer).finditer(text):
        ids += _encode_plain(tokenizer, text[start : found.start()].replace(marker, ""))
        ids.append(tokenizer.control_tokens[found[0]])
        start = found.end()
    return ids + _encode_plain(tokenizer, text[start:].replace(marker, ""))


def _encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text) if text else []


def _control_pattern(tokenizer: Tokenizer) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, sorted(tokenizer.control_tokens, key=len, reverse=True))))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)
