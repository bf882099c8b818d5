"""A trained model as benchmarks use one: text in, likelihoods or text out, in batches of like length."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
import xxhash

from warploom.data.chat import ChatTemplate
from warploom.data.tokenizer import Tokenizer
from warploom.errors import UserError
from warploom.evaluation.likelihood import Likelihood, Request, log_likelihoods, shared_prefix
from warploom.generate.continuous import ContinuousBatch, Finish, Generation, Token
from warploom.generate.distribution import SamplingConfig
from warploom.generate.sampler import row_generator
from warploom.models.transformer import Transformer
from warploom.nn.linear import keep_packed


class TextModel:
    """A decoder with its tokenizer. max_tokens: tokens in one pass; batch_size: texts written at a time."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer | None,
        *,
        max_tokens: int = 8192,
        batch_size: int = 16,
        chat_template: ChatTemplate | None = None,
    ) -> None:
        if tokenizer is None:
            raise UserError("the checkpoint holds no tokenizer; a benchmark is text, which it cannot read")
        if model.config.architecture != "decoder":
            raise UserError(f"the model is a {model.config.architecture}; benchmarks are for decoders")
        self.model, self.tokenizer = model, tokenizer
        self.chat_template = chat_template
        self._max_tokens, self._batch_size = max_tokens, batch_size

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> Iterator[tuple[int, Likelihood]]:
        """Yield (index of the pair, likelihood of the continuation after the context), in the order of the work."""
        return log_likelihoods(self.model, self.encode_pairs(pairs), max_tokens=self._max_tokens)

    def encode_pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Encode contexts and continuations together and cut the ids where the context alone ends, so that the border
        is where it would be in running text. Spaces at the end of a context go to the continuation, for the same
        reason. Raises UserError for a continuation without tokens."""
        begin, pairs = list(self.tokenizer.begin_ids), list(map(_spaces_moved, pairs))
        contexts = list(dict.fromkeys(context for context, _ in pairs))
        heads = dict(zip(contexts, self.tokenizer.encode_batch(contexts), strict=True))
        wholes = self.tokenizer.encode_batch([context + continuation for context, continuation in pairs])
        requests = []
        for (context, continuation), whole in zip(pairs, wholes, strict=True):
            ids = whole[len(heads[context]) :]
            if not ids:
                raise UserError(f"the continuation {continuation!r:.60} of {context[-40:]!r} has no token of its own")
            requests.append(Request(tuple([*begin, *heads[context]] or [self.tokenizer.eos_id]), tuple(ids)))
        return requests

    @torch.no_grad()
    def complete(
        self,
        prompts: Sequence[str | Sequence[int]],
        sampling: SamplingConfig | Sequence[SamplingConfig],
        *,
        names: Sequence[str] | None = None,
        end_id: int | None = None,
    ) -> Iterator[tuple[int, list[str], bool]]:
        """Yield (index of the prompt, its continuations, whether the prompt was cut), as they are finished. The longest
        prompts come first; what all of them begin with is read once; a text that ends makes room for another.

        sampling: one for all prompts, or one of each. A prompt is cut on the left to leave room for max_new_tokens, of
        which at most half of the context is used. What is drawn depends on the seed and the prompt's name (its index
        without names), not on what is written beside it. end_id: another token that ends a text.
        """
        context = self.model.config.max_seq_len
        each = [sampling] * len(prompts) if isinstance(sampling, SamplingConfig) else sampling
        each = [replace(one, max_new_tokens=min(one.max_new_tokens, max(1, context // 2))) for one in each]
        whole = [self.tokenizer.encode_beginning(p) if isinstance(p, str) else list(p) for p in prompts]
        cut = [ids[one.max_new_tokens - context :] for ids, one in zip(whole, each, strict=True)]
        streams = range(len(prompts)) if names is None else [xxhash.xxh3_64_intdigest(name.encode()) for name in names]
        end_ids = frozenset({self.tokenizer.eos_id, *([] if end_id is None else [end_id])})
        texts: dict[int, dict[int, str]] = {n: {} for n in range(len(prompts))}
        finished: deque[int] = deque()

        def generation(n: int, sample: int) -> Generation:
            pieces: list[str] = []

            def on_event(event: Token | Finish) -> None:
                pieces.append(event.text)
                if isinstance(event, Finish):
                    texts[n][sample] = "".join(pieces)
                    if len(texts[n]) == each[n].num_samples:
                        finished.append(n)

            return Generation(cut[n], each[n], end_ids, row_generator(each[n].seed, streams[n], sample), 0, on_event)

        order = sorted(range(len(prompts)), key=lambda n: -len(cut[n]))
        to_come = (generation(n, sample) for n in order for sample in range(each[n].num_samples))
        batch = ContinuousBatch(
            self.model,
            self.tokenizer,
            num_slots=self._batch_size,
            max_len=max((len(ids) + one.max_new_tokens for ids, one in zip(cut, each, strict=True)), default=1),
            prefix=shared_prefix(cut),
        )
        waiting: deque[Generation] = deque()
        while True:
            waiting.extend(islice(to_come, self._batch_size - len(waiting)))
            batch.admit(waiting)
            if not batch.num_rows:
                return
            batch.step()
            while finished:
                n = finished.popleft()
                done = texts.pop(n)
                yield n, [done[sample] for sample in range(len(done))], len(cut[n]) < len(whole[n])


def text_model(
    model: Transformer,
    tokenizer: Tokenizer | None,
    *,
    dtype: torch.dtype = torch.float32,
    batch_size: int = 16,
    chat_template: ChatTemplate | None = None,
) -> TextModel:
    """Make a model that was loaded ready to be asked: its weights are packed once for all passes."""
    model.eval()
    model.compute_dtype = dtype
    keep_packed(model)
    return TextModel(model, tokenizer, batch_size=batch_size, chat_template=chat_template)


def _spaces_moved(pair: tuple[str, str]) -> tuple[str, str]:
    context, continuation = pair
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation
