"""Sampling: prompts in, text out, a token at a time, for decoder-only and encoder-decoder models."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from warploom.errors import UserError
from warploom.generate.cache import KeyValueCache
from warploom.generate.distribution import SamplingConfig, draw, penalise_repetition, probabilities
from warploom.models.transformer import Transformer


class TextCodec(Protocol):
    """What generate needs of a tokenizer; data.tokenizer.Tokenizer is one."""

    @property
    def eos_id(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def encode_beginning(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...


@torch.no_grad()
def generate(
    model: Transformer,
    tokenizer: TextCodec,
    prompts: str | Sequence[str | Sequence[int]],
    sampling: SamplingConfig | None = None,
    *,
    sources: Sequence[str] | None = None,
    end_id: int | None = None,
    on_text: Callable[[int, int, str], None] | None = None,
) -> list[list[str]]:
    """Continue each prompt num_samples times. Returns, per prompt, the continuations without the prompt.

    Prompts may have different lengths; what a sample says does not depend on the prompts beside it, up to the rounding
    of the model's products. A sample ends at <|endoftext|>, a stop string (cut off), max_new_tokens, or when the
    model's context is full. Each prompt is read as the beginning of a document, an empty one too; one that is given as
    token ids, a chat's for instance, is read as it stands. end_id: another token that ends a sample. For an
    encoder-decoder, sources gives the text to encode for each prompt. on_text(prompt number, sample number, piece) is
    called as text comes.
    Raises UserError for a prompt longer than the context.
    """
    sampling = SamplingConfig() if sampling is None else sampling
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    encoded = [tokenizer.encode_beginning(p) if isinstance(p, str) else list(p) for p in prompts]
    end_ids = (tokenizer.eos_id, end_id)
    for prompt, ids in zip(prompts, encoded, strict=True):
        if len(ids) >= model.config.max_seq_len:
            raise UserError(
                f"the prompt {prompt[:40]!r}... has {len(ids)} tokens and the model's context is "
                f"{model.config.max_seq_len}; shorten the prompt"
            )
    rows = [(p, s) for p in range(len(prompts)) for s in range(sampling.num_samples)]
    streams = [TextStream(tokenizer, sampling.stop) for _ in rows]
    source = None if sources is None else [tokenizer.encode(sources[p]) + [tokenizer.eos_id] for p, _ in rows]
    generators = [row_generator(sampling.seed, p, s) for p, s in rows]
    finished = [False] * len(rows)

    def emit(row: int, piece: str) -> None:
        if on_text is not None and piece:
            on_text(*rows[row], piece)

    def on_step(drawn: list[int]) -> bool:
        for row, token in enumerate(drawn):
            if not finished[row] and token in end_ids:
                finished[row] = True
            elif not finished[row]:
                piece, finished[row] = streams[row].add(token)
                emit(row, piece)
        return all(finished)

    prompts_of_rows = [encoded[p] for p, _ in rows]
    sample_tokens(model, prompts_of_rows, sampling, generators, on_step, source=source, num_tokens=tokenizer.vocab_size)
    for row, stream in enumerate(streams):
        emit(row, stream.end())
    texts = iter(stream.text for stream in streams)
    return [[next(texts) for _ in range(sampling.num_samples)] for _ in prompts]


def row_generator(seed: int, prompt: int, sample: int) -> torch.Generator:
    """Return the random stream of one sample: the same whatever is sampled beside it."""
    # Odd multipliers spread the three numbers over 64 bits; torch mixes the seed further.
    mixed = seed * 0x9E3779B97F4A7C15 + prompt * 0xC2B2AE3D27D4EB4F + sample * 0x165667B19E3779F9
    return torch.Generator().manual_seed(mixed % 2**63)


def sample_tokens(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingConfig,
    generators: list[torch.Generator],
    on_step: Callable[[list[int]], bool],
    *,
    source: Sequence[Sequence[int]] | None = None,
    num_tokens: int | None = None,
) -> None:
    """Draw the next token of every row and hand them to on_step, until it returns True, or max_new_tokens are drawn, or
    the longest row fills the context.

    prompts: rows of token ids, at least one each. source: for an encoder-decoder, rows of source ids. num_tokens: ids
    from there on are never drawn, as a vocabulary that was padded for speed has them; None draws all.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    try:
        tokens, lengths = pad_right(prompts, device)  # (B, T), (B,)
        B, T = tokens.shape
        room = min(T + sampling.max_new_tokens, model.config.max_seq_len)
        tokens = torch.nn.functional.pad(tokens, (0, room - T))
        # What begins a document is not a word that could be repeated.
        known = min(num_tokens or model.config.vocab_size, model.config.vocab_size)
        seen = _mark_seen(tokens[:, 1:], lengths - 1, model.config.vocab_size)[:, :known]
        arguments: dict[str, Tensor] = {}
        if source is not None:
            padded, arguments["source_lengths"] = pad_right(source, device)
            arguments["memory"] = model.encode(padded, arguments["source_lengths"])
        cache = KeyValueCache(lengths, room) if sampling.use_cache else None
        rows = torch.arange(B, device=device)
        for step in range(room - T):
            if cache is None:
                hidden = model(tokens[:, : T + step], **arguments)[rows, lengths - 1]  # (B, C)
            elif step == 0:
                hidden = model(tokens[:, :T], cache=cache, **arguments)[rows, lengths - 1]
            else:
                last = tokens[rows, lengths - 1]
                hidden = model(last[:, None], positions=(lengths - 1)[:, None], cache=cache, **arguments)[:, 0]
            if cache is not None:
                cache.advance()
            drawn = _next_tokens(model.logits(hidden.float())[:, :known], seen, sampling, generators)  # (B,)
            tokens[rows, lengths] = drawn
            seen[rows, drawn] = True
            lengths = lengths + 1
            if on_step(drawn.tolist()):
                return
    finally:
        model.train(was_training)


def _next_tokens(logits: Tensor, seen: Tensor, sampling: SamplingConfig, generators: list[torch.Generator]) -> Tensor:
    if sampling.repetition_penalty != 1.0:
        logits = penalise_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    return draw(probabilities(logits, sampling), generators)


def pad_right(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Stack rows of unequal length: tokens (B, T) int64 with zeros after each row's end, and lengths (B,) int64."""
    lengths = torch.tensor([len(row) for row in rows])
    tokens = torch.zeros(len(rows), int(lengths.max()), dtype=torch.int64)
    for b, row in enumerate(rows):
        tokens[b, : len(row)] = torch.tensor(row)
    return tokens.to(device), lengths.to(device)


def _mark_seen(tokens: Tensor, lengths: Tensor, vocab_size: int) -> Tensor:
    seen = torch.zeros(tokens.shape[0], vocab_size, dtype=torch.bool, device=tokens.device)
    real = torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]
    rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None].expand_as(tokens)
    seen[rows[real], tokens[real]] = True
    return seen


class TextStream:
    """Text of one sample as its tokens come: no half characters, nothing that may still turn out a stop string."""

    def __init__(self, tokenizer: TextCodec, stop: tuple[str, ...]) -> None:
        self.text = ""
        self._tokenizer = tokenizer
        self._stop = stop
        self._pending: list[int] = []
        self._emitted = 0

    def add(self, token: int) -> tuple[str, bool]:
        """Take one more token; return the text that is certain now, and whether a stop string has come."""
        self._pending.append(token)
        piece = self._tokenizer.decode(self._pending)
        if piece.endswith("\ufffd") and len(self._pending) < 4:  # at most 4 bytes of UTF-8 make a character
            return "", False
        self._pending = []
        return self._append(piece)

    def end(self) -> str:
        """No token will follow; return what was held back."""
        piece = self._append(self._tokenizer.decode(self._pending))[0] if self._pending else ""
        rest = self.text[self._emitted :]
        self._pending, self._emitted = [], len(self.text)
        return piece + rest

    def _append(self, piece: str) -> tuple[str, bool]:
        self.text += piece
        places = [at for at in (self.text.find(stop) for stop in self._stop) if at >= 0]
        if places:
            self.text = self.text[: min(places)]
        certain = len(self.text) if places else len(self.text) - self._possible_stop()
        out = self.text[self._emitted : certain]
        self._emitted = max(self._emitted, certain)
        return out, bool(places)

    def _possible_stop(self) -> int:
        """Characters at the end of the text that a stop string begins with."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for size in range(min(longest, len(self.text)), 0, -1):
            if any(stop.startswith(self.text[-size:]) for stop in self._stop):
                return size
        return 0
