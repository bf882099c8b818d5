import numpy as np
import pytest

from warploom.curate.mix import budgets, cluster_repeats, order
from warploom.curate.pipeline import Mix, Source
from warploom.errors import UserError


def sources(*weights, max_epochs=4.0):
    return [Source(name=f"s{i}", paths=("x",), weight=w, max_epochs=max_epochs) for i, w in enumerate(weights)]


def stream(lengths, source_of, given, repeats=None, seed=0):
    lengths, source_of = np.array(lengths), np.array(source_of)
    ones = np.ones_like(lengths) if repeats is None else np.array(repeats)
    return order(lengths, source_of, ones, np.array(given), seed)


def test_by_default_everything_is_seen_once():
    has = np.array([100, 300])
    assert budgets(sources(None, None), has, Mix()).tolist() == [100, 300]


def test_temperature_moves_shares_towards_equal():
    has = np.array([100, 10_000])
    shares = [budgets(sources(None, None, max_epochs=1000), has, Mix(temperature=t)) for t in (1, 2, 1e6)]
    assert [round(float(g[0] / g.sum()), 3) for g in shares] == [0.01, 0.091, 0.5]


def test_a_capped_source_leaves_its_share_to_the_others():
    given = budgets(sources(1.0, 1.0), np.array([100, 10_000]), Mix(tokens=8000))
    assert given.tolist() == [400, 7600]


def test_a_mix_that_the_sources_cannot_give_is_refused():
    with pytest.raises(UserError, match=r"asks for 1,000 tokens, sources and max_epochs allow 800"):
        budgets(sources(1.0, 1.0), np.array([100, 100]), Mix(tokens=1000))
    with pytest.raises(UserError, match="weights"):
        budgets(sources(-1.0, 1.0), np.array([100, 100]), Mix())


def test_each_epoch_is_a_permutation():
    lengths = [5] * 40
    found = stream(lengths, [0] * 40, [3 * 200])
    epochs = [found.documents[found.epochs == epoch].tolist() for epoch in range(3)]
    assert all(sorted(epoch) == list(range(40)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != sorted(epochs[0])


def test_sources_are_interleaved_at_every_point():
    rng = np.random.default_rng(0)
    lengths = rng.integers(5, 60, 900)
    source_of = rng.integers(0, 3, 900)
    has = np.bincount(source_of, weights=lengths).astype(int)
    given = [has[0], 2 * has[1], has[2] // 3]
    found = stream(lengths, source_of, given)
    total = int(found.starts[-1])
    for part in (0.1, 0.37, 0.5, 0.9, 1.0):
        seen = found.seen(int(part * total), 3)
        assert sum(seen) == int(part * total)
        assert np.allclose(np.array(seen) / sum(seen), np.array(given) / sum(given), atol=0.02)


def test_the_order_depends_on_the_seed_alone():
    lengths, source_of = [7] * 50, [0, 1] * 25
    a, b, c = (stream(lengths, source_of, [175, 350], seed=seed) for seed in (1, 1, 2))
    assert np.array_equal(a.documents, b.documents) and not np.array_equal(a.documents, c.documents)


def test_any_token_can_be_found_again():
    lengths = np.random.default_rng(1).integers(1, 9, 30)
    found = stream(lengths, [0] * 30, [int(lengths.sum()) * 2])
    flat = [(slot, offset) for slot, d in enumerate(found.documents.tolist()) for offset in range(lengths[d])]
    assert [found.locate(token) for token in range(len(flat))] == flat
    assert found.locate(len(flat) + 3) == flat[3]


def test_large_clusters_are_seen_more_often():
    assert cluster_repeats(np.array([0, 1, 2, 3, 4, 5, 99, 100, 999, 1000])).tolist() == [1, 1, 2, 3, 3, 5, 5, 8, 8, 1]
    found = stream([4, 4, 4], [0, 0, 0], [4 * 7], repeats=[1, 5, 1])
    assert np.bincount(found.documents).tolist() == [1, 5, 1]
