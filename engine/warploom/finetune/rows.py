"""From lines of JSON to conversations with answers, and to pairs of a chosen and a rejected one.

{"messages": [{"role": "user", "content": ...}, {"role": "assistant", "content": ...}, ...]}
{"prompt": ..., "response": ...}          also "completion" for the response
{"instruction": ..., "input": ..., "output": ...}                                     as of Alpaca; input may lack
{"prompt": ..., "chosen": ..., "rejected": ...}       texts, or lists of messages with or without the prompt's
{"chosen": "\\n\\nHuman: ... \\n\\nAssistant: ...", "rejected": ...}                  as of Anthropic's hh-rlhf
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from warploom.data.chat import ChatTemplate, EncodedChat, encode_completion
from warploom.data.documents import read_records
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError

ExampleT = TypeVar("ExampleT")
Messages = list[dict[str, Any]]

_SPEAKER = re.compile(r"\n\n(Human|Assistant): ?")
_ROLE_OF = {"Human": "user", "Assistant": "assistant"}


def task_of(paths: Sequence[str | Path]) -> Literal["instruct", "preference", "text"]:
    """Return the task that the fields of the first line are for; text if there are none of them."""
    if not paths or not all(".jsonl" in Path(path).name.lower() for path in paths):
        return "text"
    _, row = next(iter(read_records(list(paths))))
    if "chosen" in row and "rejected" in row:
        return "preference"
    is_instruction = "messages" in row or "instruction" in row or "prompt" in row
    return "instruct" if is_instruction else "text"


def read_instructions(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    wrap_prompts: bool,
    on_bad_line: Literal["error", "skip"],
    counts: Counter[str],
) -> list[EncodedChat]:
    """Encode each line as a conversation whose answers count. wrap_prompts: lines of prompt and response are put
    through the template, otherwise encoded as they stand.

    Raises UserError naming the line, or counts it, if it is no conversation or has no answer.
    """

    def example(row: dict[str, Any]) -> EncodedChat:
        if "messages" in row:
            chat = template.encode(tokenizer, row["messages"])
        else:
            prompt, response = _prompt_and_response(row)
            if not wrap_prompts:
                return encode_completion(tokenizer, prompt, response)
            chat = template.encode(tokenizer, [_said("user", prompt), _said("assistant", response)])
        if not any(chat.is_answer):
            raise UserError("holds no message of the assistant")
        return chat

    return _examples(paths, example, on_bad_line, counts)


def read_pairs(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    template: ChatTemplate,
    *,
    on_bad_line: Literal["error", "skip"],
    counts: Counter[str],
) -> list[tuple[EncodedChat, EncodedChat]]:
    """Encode each line as (chosen, rejected); only answers behind what both have in common count."""

    def example(row: dict[str, Any]) -> tuple[EncodedChat, EncodedChat]:
        prompt = _conversation(row.get("prompt", []), "user")
        sides = [_side(row, name, prompt) for name in ("chosen", "rejected")]
        same = 0
        while same < min(map(len, sides)) and sides[0][same] == sides[1][same]:
            same += 1
        return _encode_side(sides[0], same), _encode_side(sides[1], same)

    def _encode_side(messages: Messages, same: int) -> EncodedChat:
        if same == len(messages) or messages[same]["role"] != "assistant":
            raise UserError("holds a chosen and a rejected side that do not part at an answer")
        chat = template.encode(tokenizer, messages)
        before = len(template.encode(tokenizer, messages[:same], add_generation_prompt=True).ids)
        return EncodedChat(chat.ids, [answer and at >= before for at, answer in enumerate(chat.is_answer)])

    return _examples(paths, example, on_bad_line, counts)


def _examples(
    paths: Sequence[str | Path],
    example: Callable[[dict[str, Any]], ExampleT],
    on_bad_line: Literal["error", "skip"],
    counts: Counter[str],
) -> list[ExampleT]:
    examples = []
    for place, row in read_records(list(paths), on_bad_line=on_bad_line, counts=counts):
        try:
            examples.append(example(row))
        except UserError as error:
            if on_bad_line == "error":
                raise UserError(f"{place}: {error}, or set on-bad-line to skip") from error
            counts["no example"] += 1
    return examples


def _prompt_and_response(row: dict[str, Any]) -> tuple[str, str]:
    prompt = row.get("prompt", row.get("instruction"))
    if row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    response = next((row[name] for name in ("response", "completion", "output") if name in row), None)
    if not isinstance(prompt, str) or not isinstance(response, str):
        raise UserError(
            f"has the fields {', '.join(map(repr, list(row)[:8]))}; give messages, or prompt and response, both texts"
        )
    return prompt, response


def _side(row: dict[str, Any], name: str, prompt: Messages) -> Messages:
    messages = _conversation(row.get(name), "assistant")
    return messages if messages[: len(prompt)] == prompt else [*prompt, *messages]


def _conversation(value: Any, role: str) -> Messages:
    """Messages as they are; a text in hh-rlhf's way in its turns; any other text as one message of that role."""
    if isinstance(value, list) and all(isinstance(message, dict) for message in value):
        return value
    if not isinstance(value, str):
        raise UserError(f"has {value!r:.60} for one side of a pair; give a text or a list of messages")
    parts = _SPEAKER.split(value)
    if len(parts) > 1 and not parts[0].strip():
        return [_said(_ROLE_OF[speaker], text.strip()) for speaker, text in zip(parts[1::2], parts[2::2], strict=True)]
    return [_said(role, value)]


def _said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}
