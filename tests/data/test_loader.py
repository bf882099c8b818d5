"""The loader against a plain reading of its definition, and the properties that training relies on."""

import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from warploom.data.loader import IGNORE_INDEX, Loader, evaluation_batches, permute
from warploom.data.shards import tokenize_corpus
from warploom.errors import UserError


@dataclass
class Ring:
    """A split whose token at place i is i, so that a token tells where it was read."""

    lengths: list[int]
    name: str = "training"
    fingerprint: str = "f"

    def __post_init__(self):
        self.document_starts = np.cumsum([0, *self.lengths[:-1]]).astype(np.uint64)
        self.num_tokens = sum(self.lengths)
        self.token_bytes = np.arange(self.num_tokens) % 5

    def read(self, starts, length):
        return (starts[:, None] + np.arange(length)) % self.num_tokens


rings = st.lists(st.integers(1, 12), min_size=1, max_size=12).map(Ring)
seeds = st.integers(0, 2**64 - 1)


def loader_of(ring, T, B=2, **options):
    return Loader(ring, seq_len=T, micro_batch_size=B, **{"seed": 0, **options})


def take(loader, count):
    return [next(loader) for _ in range(count)]


def rows(batches):
    return [row for batch in batches for row in batch.tokens.tolist()]


@st.composite
def rings_and_windows(draw):
    ring = draw(rings)
    return ring, draw(st.integers(1, ring.num_tokens))


def check_batch(ring, batch, T):
    """Targets are one further; positions and cu_seqlens restart where the ring has a document's first token."""
    N = ring.num_tokens
    starts = set(ring.document_starts.tolist())
    tokens = batch.tokens
    assert batch.tokens.dtype == batch.targets.dtype == batch.positions.dtype == torch.int64
    assert torch.equal(tokens[:, 1:], (tokens[:, :-1] + 1) % N)
    assert torch.equal(batch.targets, (tokens + 1) % N)
    cuts, positions = [], []
    for b, row in enumerate(tokens.tolist()):
        position = 0
        for t, token in enumerate(row):
            position = 0 if t == 0 or token in starts else position + 1
            positions.append(position)
            if position == 0:
                cuts.append(b * T + t)
    assert batch.positions.flatten().tolist() == positions
    assert batch.cu_seqlens.dtype == torch.int32
    assert batch.cu_seqlens.tolist() == [*cuts, tokens.numel()]
    assert batch.num_bytes == sum(target % 5 for target in batch.targets.flatten().tolist())


@given(rings_and_windows(), st.integers(1, 4), seeds, st.booleans())
def test_batches_are_what_the_definition_says(ring_and_window, B, seed, shuffle):
    ring, T = ring_and_window
    for batch in take(loader_of(ring, T, B, seed=seed, shuffle=shuffle), 4):
        assert batch.tokens.shape == (B, T)
        check_batch(ring, batch, T)


@given(rings_and_windows(), seeds)
def test_an_epoch_has_every_window_once(ring_and_window, seed):
    ring, T = ring_and_window
    loader = loader_of(ring, T, 1, seed=seed)
    assert loader.windows_per_epoch == ring.num_tokens // T
    for epoch in range(3):
        assert loader.epoch == epoch
        seen = [token for row in rows(take(loader, loader.windows_per_epoch)) for token in row]
        assert len(seen) == len(set(seen)) == ring.num_tokens // T * T


def test_what_an_epoch_drops_is_seen_in_another():
    ring = Ring([3, 4, 4])
    loader = loader_of(ring, 8, 1)
    seen = {token for row in rows(take(loader, 20)) for token in row}
    assert seen == set(range(11))


LAYOUTS = [(micro, ranks) for micro in (1, 2, 4) for ranks in (1, 2, 4) if micro * ranks <= 4]  # of 4 sequences a step
kills = st.lists(st.tuples(st.integers(0, 5), st.sampled_from(LAYOUTS)), max_size=5)


@settings(max_examples=1000, deadline=None)
@given(rings_and_windows(), seeds, st.integers(1, 3), kills, st.sampled_from(LAYOUTS))
def test_through_kills_and_changes_of_layout_every_sample_is_seen_once(ring_and_window, seed, save_every, kills, last):
    """kills: after how many steps each attempt dies, and how it was spread; steps since its last save are made again
    by the next one, on another number of ranks and with other micro batches."""
    ring, T = ring_and_window
    num_steps = 6
    expected = rows(take(loader_of(ring, T, 4, seed=seed), num_steps))
    seen, saved = [], None
    for lives, (micro, ranks) in [*kills, (num_steps, last)]:
        loaders = [loader_of(ring, T, micro, seed=seed, rank=rank, world_size=ranks) for rank in range(ranks)]
        first = 0 if saved is None else saved[0]
        if saved is not None:
            for loader in loaders:
                loader.load_state_dict(saved[1])
        del seen[4 * first :]
        for step in range(first + 1, min(num_steps, first + lives) + 1):
            for _ in range(4 // (micro * ranks)):
                parts = [next(loader).tokens for loader in loaders]
                seen += torch.stack(parts, dim=1).flatten(0, 1).tolist()  # dealt out in turn
            if step % save_every == 0:
                saved = step, json.loads(json.dumps(loaders[0].state_dict()))
    assert seen == expected


def test_without_shuffle_the_order_is_that_of_the_text():
    assert rows(take(loader_of(Ring([5, 6]), 3, 1, shuffle=False), 4)) == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [0, 1, 2]]


@given(rings_and_windows(), seeds, st.integers(0, 40), st.integers(1, 5), st.integers(1, 5))
def test_resuming_anywhere_goes_on_with_the_same_samples(ring_and_window, seed, steps, B, new_B):
    ring, T = ring_and_window
    loader = loader_of(ring, T, B, seed=seed)
    take(loader, steps)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = rows(take(loader, 10 * new_B))[: 10 * new_B]
    resumed = loader_of(ring, T, new_B, seed=seed)
    take(resumed, 3)  # what it has planned by then must be forgotten
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    assert rows(take(resumed, 10)) == expected[: 10 * new_B]


@given(rings_and_windows(), seeds, st.integers(1, 3), st.integers(1, 4), st.integers(0, 5))
def test_ranks_share_the_order_of_one(ring_and_window, seed, B, world, steps):
    """Each global batch is the same set of samples in the same order, dealt out in turn; so it is after a resume on
    another number of ranks."""
    ring, T = ring_and_window
    alone = loader_of(ring, T, B * world, seed=seed)
    ranks = [loader_of(ring, T, B, seed=seed, rank=rank, world_size=world) for rank in range(world)]
    for _ in range(steps):
        expected = next(alone).tokens
        for rank, loader in enumerate(ranks):
            assert torch.equal(next(loader).tokens, expected[rank::world])
    states = [loader.state_dict() for loader in ranks]
    assert states == [alone.state_dict()] * world
    one = loader_of(ring, T, B, seed=seed)
    one.load_state_dict(states[-1])
    assert rows(take(one, world)) == rows([next(alone)])


@given(st.integers(1, 300), seeds)
def test_permute_is_a_permutation(size, key):
    place = permute(np.arange(size, dtype=np.uint64), size, np.full(size, key, dtype=np.uint64))
    assert sorted(place.tolist()) == list(range(size))


@pytest.mark.parametrize("size", [3, 5, 7, 16, 17])
def test_every_order_is_about_as_likely(size):
    """Chi-square of (index, place) over 4,000 keys, against its 99.99 % point in normal approximation."""
    keys = 4000
    index = np.tile(np.arange(size, dtype=np.uint64), keys)
    place = permute(index, size, np.repeat(np.arange(keys, dtype=np.uint64), size) * np.uint64(0x9E3779B97F4A7C15))
    counts = np.zeros((size, size))
    np.add.at(counts, (index.astype(int), place.astype(int)), 1)
    chi2 = ((counts - keys / size) ** 2 / (keys / size)).sum()
    freedom = (size - 1) ** 2
    assert chi2 < freedom + 3.8 * math.sqrt(2 * freedom) + 5


def test_a_large_permutation_has_no_trend():
    size = 100_003
    place = permute(np.arange(size, dtype=np.uint64), size, np.zeros(size, dtype=np.uint64)).astype(float)
    assert abs(np.corrcoef(np.arange(size), place)[0, 1]) < 4 / math.sqrt(size)
    assert abs(np.corrcoef(place[:-1], place[1:])[0, 1]) < 4 / math.sqrt(size)


def test_seeds_and_epochs_have_orders_of_their_own():
    ring = Ring([50] * 10)
    loader = loader_of(ring, 5, 100)
    orders = [tuple(next(loader).tokens[:, 0].tolist()) for _ in range(3)]
    orders += [tuple(next(loader_of(ring, 5, 100, seed=seed)).tokens[:, 0].tolist()) for seed in (1, 2, 2**64, -1)]
    assert len(set(orders)) == 6
    assert orders[5] == orders[0], "seeds are taken modulo 2**64"


def test_documents_may_be_left_together():
    ring = Ring([3, 4, 4])
    batch = next(loader_of(ring, 6, 2, separate_documents=False))
    assert batch.cu_seqlens is None
    assert batch.positions.tolist() == [[0, 1, 2, 3, 4, 5]] * 2
    assert torch.equal(batch.tokens, next(loader_of(ring, 6, 2)).tokens)


def test_a_split_shorter_than_a_window_is_refused():
    loader_of(Ring([4, 4]), 8)
    with pytest.raises(UserError, match="the training split has 8 tokens, fewer than one context of 9; give more text"):
        loader_of(Ring([4, 4]), 9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ring": Ring([50, 50], fingerprint="g")}, "was saved with fingerprint 'f', this run has 'g'"),
        ({"ring": Ring([50, 60])}, "was saved with windows_per_epoch 20, this run has 22"),
        ({"T": 4}, "was saved with windows_per_epoch 20, this run has 25"),
        ({"seed": 1}, "was saved with seed 0, this run has 1"),
        ({"shuffle": False}, "was saved with shuffle True, this run has False"),
    ],
)
def test_a_state_of_other_data_is_refused(change, message):
    state = loader_of(Ring([50, 50]), 5).state_dict()
    other = loader_of(**{"ring": Ring([50, 50]), "T": 5, **change})
    with pytest.raises(UserError, match=message + "; go on with the same data and settings"):
        other.load_state_dict(state)


def test_a_state_without_fields_is_refused():
    with pytest.raises(UserError, match="was saved with fingerprint None"):
        loader_of(Ring([50, 50]), 5).load_state_dict({})


@given(rings, st.integers(1, 40), st.integers(1, 4))
def test_evaluation_takes_every_token_as_a_target_once(ring, T, B):
    N = ring.num_tokens
    targets, num_bytes, expected_start = [], 0, 0
    for batch in evaluation_batches(ring, seq_len=T, micro_batch_size=B):
        real = batch.targets != IGNORE_INDEX
        for row, keep in zip(batch.tokens.tolist(), real.tolist(), strict=True):
            assert row == [(expected_start + t) % N for t in range(T)]
            assert keep == sorted(keep, reverse=True), "padding only at the end"
            expected_start += T
        targets += batch.targets[real].tolist()
        num_bytes += batch.num_bytes
        assert batch.positions.flatten().tolist() == [
            t for low, high in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True) for t in range(high - low)
        ]
    assert targets == [*range(1, N), 0]
    assert num_bytes == ring.token_bytes.sum()


@given(rings, st.integers(1, 10), st.integers(1, 3), st.integers(1, 8), st.integers(1, 3))
def test_evaluation_of_a_part_and_on_ranks(ring, T, B, max_windows, world):
    def starts(**options):
        batches = evaluation_batches(ring, seq_len=T, micro_batch_size=B, **options)
        return [row[0] for row in rows(batches)]

    everything = starts()
    part = starts(max_windows=max_windows)
    assert len(part) == min(max_windows, len(everything))
    assert set(part) <= set(everything) and part == sorted(part) and part[0] == 0
    shares = [starts(rank=rank, world_size=world) for rank in range(world)]
    assert shares == [everything[rank::world] for rank in range(world)]


def test_bits_per_byte_of_a_uniform_model_is_exact(dataset):
    """log2(V) bits for each token and each end of a document, over the bytes of the text."""
    split, V = dataset.heldout, dataset.tokenizer.vocab_size
    loss_sum = num_bytes = 0.0
    for batch in evaluation_batches(split, seq_len=64, micro_batch_size=3):
        logits = torch.zeros(*batch.tokens.shape, V, dtype=torch.float64)
        loss_sum += torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum")
        num_bytes += batch.num_bytes
    assert num_bytes == split.num_bytes
    assert loss_sum / math.log(2) / num_bytes == pytest.approx(math.log2(V) * split.num_tokens / split.num_bytes)


def test_real_text_through_the_loader(shared_data, tmp_path):
    """One epoch of Tiny Shakespeare: rows decode to pieces of the text, and cu_seqlens stand before documents."""
    path = shared_data / "corpora/tinyshakespeare.txt"
    dataset = tokenize_corpus(path, tmp_path / "set", vocab_size=512)
    text, tokenizer = path.read_text(), dataset.tokenizer
    loader = Loader(dataset.train, seq_len=256, micro_batch_size=16, seed=3)
    for batch in take(loader, 20):
        assert batch.tokens.max() < tokenizer.vocab_size
        flat, cuts = batch.tokens.flatten(), batch.cu_seqlens.tolist()
        for low, high in zip(cuts[:-1], cuts[1:], strict=True):
            assert tokenizer.decode(flat[low:high].tolist()).removeprefix("<|endoftext|>") in text
        inside = [cut for cut in cuts[:-1] if cut % 256]
        ends = torch.nonzero(flat == tokenizer.eos_id).flatten().tolist()
        assert inside == [end for end in ends if end % 256]
