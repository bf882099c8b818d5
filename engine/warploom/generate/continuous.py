"""Continuous batching: texts join and leave a batch that is decoded a token at a time, so that none waits for another.

What a text draws depends on its own random stream and its own settings, not on what is decoded beside it, up to the
rounding of the model's products. Whoever asks for texts (the server's thread, an evaluation) owns the batch and calls
it from one thread.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from warploom.data.tokenizer import Tokenizer
from warploom.generate.cache import PrefixCache
from warploom.generate.distribution import SamplingConfig, draw, penalise_repetition, probabilities
from warploom.generate.sampler import TextStream, pad_right
from warploom.generate.slots import SlotCache
from warploom.models.transformer import Transformer

FinishReason = Literal["stop", "length", "error"]

# Prompt tokens read in one pass: those that are being decoded wait for it.
_PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Token:
    """One token of a text."""

    id: int
    text: str
    """The text that is certain now: empty while it may be half a character, or the beginning of a stop string."""
    log_prob: float
    """Under the model, before temperature and whatever else shapes the draw; nats."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, as many as were asked for."""


@dataclass(frozen=True)
class Finish:
    """The last of a text's events; text: what was held back."""

    reason: FinishReason
    text: str
    message: str = ""
    """error: what happened."""


@dataclass(eq=False)
class Generation:
    """A prompt and how to go on. on_event is called in the thread that decodes, with Finish as the last."""

    prompt: Sequence[int]
    sampling: SamplingConfig
    end_ids: frozenset[int]
    generator: torch.Generator
    num_top: int
    on_event: Callable[[Token | Finish], None]
    cancelled: bool = False
    """Set it to leave: the slot is free after the pass that is being made."""


@dataclass
class _Row:
    """A text that is being decoded."""

    generation: Generation
    stream: TextStream
    last: int | None = None  # its newest token; None until the prompt is read
    num_new: int = 0
    seen: Tensor | None = None  # (V,) bool, where repetition is penalised


class ContinuousBatch:
    """Decodes up to num_slots texts of one model, in evaluation mode.

    max_len: tokens of the longest text, prompt included; None takes the model's context. prefix: token ids that every
    prompt begins with and goes on from, which are then read only once.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        *,
        num_slots: int,
        max_len: int | None = None,
        prefix: Sequence[int] = (),
    ) -> None:
        self._model, self._tokenizer, self._num_slots = model, tokenizer, num_slots
        self._cache = SlotCache(num_slots, model.config.max_seq_len if max_len is None else max_len)
        self._rows: list[_Row] = []  # in the order of the cache's; those whose prompt is not read yet behind them
        self._device = next(model.parameters()).device
        self._prefix = PrefixCache()
        if prefix:
            self._read(self._prefix, [prefix])

    @property
    def num_rows(self) -> int:
        """Texts that have a slot."""
        return len(self._rows)

    @property
    def generations(self) -> list[Generation]:
        return [row.generation for row in self._rows]

    def admit(self, waiting: deque[Generation]) -> None:
        """Give slots to those that wait, from the left, as far as there are slots and one pass can read the prompts."""
        joining = longest = 0
        while waiting and len(self._rows) < self._num_slots:
            if waiting[0].cancelled:
                waiting.popleft()
                continue
            longest = max(longest, len(waiting[0].prompt) - self._prefix.length)
            if joining and longest * (joining + 1) > _PREFILL_TOKENS:
                break
            generation = waiting.popleft()
            self._rows.append(_Row(generation, TextStream(self._tokenizer, generation.sampling.stop)))
            joining += 1

    def step(self) -> None:
        """Read the prompts of those that were admitted, and give every row its next token."""
        self._read_prompts()
        for row in reversed(range(len(self._rows))):
            if self._rows[row].generation.cancelled:
                self._remove(row)
        if not self._rows:
            return
        last = torch.tensor([[row.last] for row in self._rows], device=self._device)  # (B, 1)
        positions = self._cache.lengths[: len(self._rows), None]
        hidden = self._model(last, positions=positions, cache=self._cache)[:, 0]
        self._cache.advance()
        self._draw(hidden, range(len(self._rows)))

    def _read_prompts(self) -> None:
        """Samples of one prompt have it read once."""
        joining = range(self._cache.num_rows, len(self._rows))
        if not joining:
            return
        prompts = [tuple(self._rows[row].generation.prompt[self._prefix.length :]) for row in joining]
        places = {prompt: n for n, prompt in enumerate(dict.fromkeys(prompts))}
        cache = self._prefix.fork(torch.zeros(len(places), dtype=torch.int64, device=self._device))
        hidden, lengths = self._read(cache, list(places))  # (P, T, C), (P,)
        rows = torch.tensor([places[prompt] for prompt in prompts], device=self._device)
        self._cache.insert(cache.fork(rows).layers, lengths[rows] + self._prefix.length)
        for row in joining:
            self._rows[row].seen = self._seen(self._rows[row].generation)
        self._draw(hidden[rows, lengths[rows] - 1], joining)

    def _read(self, cache: PrefixCache, prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """Let the model read prompts after what the cache holds; return hidden states (B, T, C) and lengths (B,)."""
        tokens, lengths = pad_right(prompts, self._device)
        positions = torch.arange(cache.length, cache.length + tokens.shape[1], device=self._device)
        hidden = self._model(tokens, positions=positions, cache=cache)
        cache.advance(tokens.shape[1])
        return hidden, lengths

    def _seen(self, generation: Generation) -> Tensor | None:
        if generation.sampling.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(min(self._model.config.vocab_size, self._tokenizer.vocab_size), dtype=torch.bool)
        seen[torch.tensor(generation.prompt[1:], dtype=torch.int64)] = True
        return seen

    def _draw(self, hidden: Tensor, rows: Sequence[int]) -> None:
        """Draw the next token of these rows from their hidden states (B, C), and tell those who asked."""
        logits = self._model.logits(hidden.float()).cpu()
        # A vocabulary that was padded for speed has rows that no token goes with; they are never drawn.
        known = min(logits.shape[-1], self._tokenizer.vocab_size)
        logits, log_probs = logits[:, :known], logits.log_softmax(-1)[:, :known]
        drawn = self._next_tokens(logits, [self._rows[row] for row in rows])
        for at, row in reversed(list(enumerate(rows))):  # from the last, since a row that ends moves those behind it
            if self._take(self._rows[row], drawn[at], log_probs[at]):
                self._remove(row)

    def _next_tokens(self, logits: Tensor, rows: Sequence[_Row]) -> list[int]:
        """Rows of equal settings are drawn together; each has its own random stream."""
        groups: dict[tuple, list[int]] = defaultdict(list)
        for at, row in enumerate(rows):
            sampling = row.generation.sampling
            groups[sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p].append(at)
            if row.seen is not None:
                logits[at] = penalise_repetition(logits[at], row.seen, sampling.repetition_penalty)
        drawn = [0] * len(rows)
        for members in groups.values():
            sampling, part = rows[members[0]].generation.sampling, logits[members]
            if sampling.temperature == 0.0:
                tokens = part.argmax(-1)
            else:
                tokens = draw(probabilities(part, sampling), [rows[at].generation.generator for at in members])
            for at, token in zip(members, tokens.tolist(), strict=True):
                drawn[at] = token
        return drawn

    def _take(self, row: _Row, token: int, log_probs: Tensor) -> bool:
        """Give a row its token; return whether it was the last."""
        generation = row.generation
        if token in generation.end_ids:
            generation.on_event(Finish("stop", row.stream.end()))
            return True
        row.last, row.num_new = token, row.num_new + 1
        if row.seen is not None:
            row.seen[token] = True
        text, stopped = row.stream.add(token)
        values, ids = log_probs.topk(generation.num_top)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        generation.on_event(Token(token, text, float(log_probs[token]), top))
        is_full = len(generation.prompt) + row.num_new >= self._model.config.max_seq_len
        if stopped or is_full or row.num_new >= generation.sampling.max_new_tokens:
            generation.on_event(Finish("stop" if stopped else "length", row.stream.end()))
            return True
        return False

    def _remove(self, row: int) -> None:
        """Free a row's slot; as in the cache, the last row takes its place."""
        self._cache.remove(row)
        last = self._rows.pop()
        if row < len(self._rows):
            self._rows[row] = last
