"""Continuous batching: requests join and leave a batch that is decoded a token at a time, in a thread of its own.

A request is read (its prompt, with others that wait) as soon as a slot is free, and from then on gets one token of each
pass. What it draws depends on its own random stream and its own settings, not on who is decoded beside it, up to the
rounding of the model's products.
"""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from warploom.data.tokenizer import Tokenizer
from warploom.generate.cache import KeyValueCache
from warploom.generate.distribution import SamplingConfig, draw, penalise_repetition, probabilities
from warploom.generate.sampler import TextStream, pad_right
from warploom.generate.slots import SlotCache
from warploom.models.transformer import Transformer

FinishReason = Literal["stop", "length", "error"]

# Prompt tokens read in one pass: those who are being decoded wait for it.
_PREFILL_TOKENS = 2048


@dataclass(frozen=True)
class Token:
    """One token of a request's text."""

    id: int
    text: str
    """The text that is certain now: empty while it may be half a character, or the beginning of a stop string."""
    log_prob: float
    """Under the model, before temperature and whatever else shapes the draw; nats."""
    top: tuple[tuple[int, float], ...]
    """The likeliest tokens and their log-probabilities, as many as were asked for."""


@dataclass(frozen=True)
class Finish:
    """The last of a request's events; text: what was held back."""

    reason: FinishReason
    text: str
    message: str = ""
    """error: what happened."""


@dataclass(eq=False)
class Generation:
    """A request: a prompt and how to go on. on_event is called in the batcher's thread, with Finish as the last."""

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
    """A request that is being decoded."""

    generation: Generation
    stream: TextStream
    last: int = 0  # its newest token
    num_new: int = 0
    seen: Tensor | None = None  # (V,) bool, where repetition is penalised


class BatcherFull(Exception):
    """The queue of waiting requests is full; try later."""


class BatcherStopped(Exception):
    """The batcher takes no requests any more; the message says why."""


class Batcher:
    """Decodes one model for up to num_slots requests at once, with up to max_queue more waiting."""

    def __init__(self, model: Transformer, tokenizer: Tokenizer, *, num_slots: int = 8, max_queue: int = 32) -> None:
        self.model, self.tokenizer = model.eval(), tokenizer
        self._num_slots, self._max_queue = num_slots, max_queue
        self._cache = SlotCache(num_slots, model.config.max_seq_len)
        self._rows: list[_Row] = []  # in the order of the cache's
        self._waiting: deque[Generation] = deque()
        self._changed = threading.Condition()
        self._stopped: str | None = None
        self._thread = threading.Thread(target=self._run, name="batcher", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End after the pass that is being made; what is not finished gets an error."""
        with self._changed:
            self._stopped = self._stopped or "the server is shutting down"
            self._changed.notify()
        self._thread.join()

    @property
    def stopped(self) -> str | None:
        """Why no requests are taken any more; None as long as they are."""
        return self._stopped

    @property
    def load(self) -> tuple[int, int]:
        """Requests being decoded, and requests that wait."""
        return len(self._rows), len(self._waiting)

    def submit(self, generations: Sequence[Generation]) -> None:
        """Take all of the requests, or raise BatcherFull or BatcherStopped and take none."""
        with self._changed:
            if self._stopped is not None:
                raise BatcherStopped(self._stopped)
            if len(self._waiting) + len(generations) > self._max_queue + self._num_slots - len(self._rows):
                raise BatcherFull
            self._waiting.extend(generations)
            self._changed.notify()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                with torch.inference_mode():
                    self._admit()
                    self._step()
        except BaseException as error:
            self._stopped = f"the model stopped with {type(error).__name__}: {error}"
            raise
        finally:
            # Under the lock, so that no request is taken after the last look at the queue.
            with self._changed:
                left = [row.generation for row in self._rows] + list(self._waiting)
                self._waiting.clear()
            for generation in left:
                generation.on_event(Finish("error", "", self._stopped or ""))

    def _wait_for_work(self) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped is not None or self._rows or self._waiting)
            return self._stopped is None

    def _admit(self) -> None:
        """Read the prompts of those who wait, as many as there are slots."""
        joining: list[Generation] = []
        with self._changed:
            longest = 0
            while self._waiting and len(self._rows) + len(joining) < self._num_slots:
                if self._waiting[0].cancelled:
                    self._waiting.popleft()
                    continue
                longest = max(longest, len(self._waiting[0].prompt))
                if joining and longest * (len(joining) + 1) > _PREFILL_TOKENS:
                    break
                joining.append(self._waiting.popleft())
            # Counted as rows before the lock is let go, so that the queue is never taken for shorter than it is.
            self._rows += [_Row(g, TextStream(self.tokenizer, g.sampling.stop)) for g in joining]
        if not joining:
            return
        device = next(self.model.parameters()).device
        tokens, lengths = pad_right([g.prompt for g in joining], device)  # (B, T), (B,)
        prompts = KeyValueCache(lengths, tokens.shape[1])
        hidden = self.model(tokens, cache=prompts)[torch.arange(len(joining), device=device), lengths - 1]
        self._cache.insert(prompts)
        rows = range(len(self._rows) - len(joining), len(self._rows))
        for row in rows:
            self._rows[row].seen = self._seen(self._rows[row].generation)
        self._draw(hidden, rows)

    def _seen(self, generation: Generation) -> Tensor | None:
        if generation.sampling.repetition_penalty == 1.0:
            return None
        seen = torch.zeros(min(self.model.config.vocab_size, self.tokenizer.vocab_size), dtype=torch.bool)
        seen[torch.tensor(generation.prompt[1:], dtype=torch.int64)] = True
        return seen

    def _step(self) -> None:
        """Give each row its next token."""
        for row in reversed(range(len(self._rows))):
            if self._rows[row].generation.cancelled:
                self._remove(row)
        if not self._rows:
            return
        device = next(self.model.parameters()).device
        last = torch.tensor([[row.last] for row in self._rows], device=device)  # (B, 1)
        positions = self._cache.lengths[: len(self._rows), None]
        hidden = self.model(last, positions=positions, cache=self._cache)[:, 0]
        self._cache.advance()
        self._draw(hidden, range(len(self._rows)))

    def _draw(self, hidden: Tensor, rows: Sequence[int]) -> None:
        """Draw the next token of these rows from their hidden states (B, C), and tell those who asked."""
        logits = self.model.logits(hidden).float().cpu()
        # A vocabulary that was padded for speed has rows that no token goes with; they are never drawn.
        known = min(logits.shape[-1], self.tokenizer.vocab_size)
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
        is_full = len(generation.prompt) + row.num_new >= self.model.config.max_seq_len
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
