import itertools
import random

import numpy as np
import pytest

from warploom.curate import dedup
from warploom.curate.dedup import UnionFind, candidate_pairs, equal_groups
from warploom.curate.minhash import jaccard, shingles

WORDS = [f"w{i}" for i in range(5000)]
STEP = '[[step]]\nuse = "near_dedup"\n'


def corpus(num_families=60, seed=0):
    """Families of texts with few to many words changed, so that Jaccard similarities from 0 to 1 occur."""
    rng = random.Random(seed)
    texts = []
    for _ in range(num_families):
        base = rng.choices(WORDS, k=rng.randrange(120, 400))
        for _ in range(rng.randrange(1, 7)):
            words = list(base)
            for _ in range(rng.randrange(0, len(words) // 40)):
                words[rng.randrange(len(words))] = rng.choice(WORDS)
            texts.append(" ".join(words))
    rng.shuffle(texts)
    return texts


def toml(path, steps=STEP):
    return f'keep_dropped = true\n[[source]]\nname = "a"\npaths = ["{path}"]\n{steps}'


def kept_texts(run, rows_of):
    return sorted(row["text"] for side in ("train", "heldout") for row in rows_of(run, side))


def test_recall_and_precision_against_exact_jaccard(curate, write_documents, rows_of):
    texts = corpus()
    run = curate(toml(write_documents("a.jsonl", texts)))
    cluster = {row: int(root) for row, root in enumerate(run.decisions().cluster)}
    hashed = [shingles(text) for text in texts]
    similar = {(a, b) for a, b in itertools.combinations(range(len(texts)), 2) if jaccard(hashed[a], hashed[b]) >= 0.8}
    assert len(similar) > 60
    found = {(a, b) for a, b in similar if cluster[a] == cluster[b]}
    assert len(found) >= 0.95 * len(similar)
    # Precision of what is dropped: each has a similar enough neighbour in its cluster.
    dropped = np.flatnonzero(run.decisions().dropped_at == 0).tolist()
    neighbours = set(itertools.chain.from_iterable(similar))
    assert len(dropped) > 40 and len(neighbours.intersection(dropped)) >= 0.95 * len(dropped)
    # One of each cluster stays.
    assert len(kept_texts(run, rows_of)) == len(set(cluster.values()))


def test_the_longest_stays_and_the_first_of_equals(curate, write_documents, rows_of):
    base = " ".join(WORDS[:200])
    texts = [base, base + " tail", base, " ".join(WORDS[300:400])]
    run = curate(toml(write_documents("a.jsonl", texts)))
    assert kept_texts(run, rows_of) == sorted([base + " tail", texts[3]])
    again = curate(toml(write_documents("b.jsonl", [base, base, texts[3]])), out="again")
    kept = [row for side in ("train", "heldout") for row in rows_of(again, side)]
    assert sorted(row["id"].rpartition(":")[2] for row in kept) == ["1", "3"]


def test_only_documents_that_were_kept_so_far_are_compared(curate, write_documents, rows_of):
    """A longer copy that an earlier rule drops must not take the shorter one with it."""
    short = " ".join(f"{word} the" for word in WORDS[:100])
    texts = [short + " the" * 5, short, " ".join(WORDS[300:400])]
    rule = '[[step]]\nuse = "gopher_quality"\nmin_words = 1\nmax_words = 203\nmin_stop_words = -inf\n'
    rule += "min_word_length = -inf\n"
    run = curate(toml(write_documents("a.jsonl", texts), rule + STEP))
    assert short in kept_texts(run, rows_of)
    assert [row["reason"] for row in rows_of(run, "dropped")] == ["gopher_quality.max_words"]


def test_exact_copies_go_whatever_their_spacing(curate, write_documents, rows_of):
    run = curate(toml(write_documents("a.jsonl", ["a b  c", "other text", "a\nb c "]), '[[step]]\nuse = "exact_dedup"'))
    assert kept_texts(run, rows_of) == ["a b  c", "other text"]


def test_repeated_lines_go_but_for_the_first(curate, write_documents, rows_of):
    line = "This line of boilerplate stands on every page of the site."
    texts = [f"{line}\nown text {i} {'x' * 40}\nshort\n{line if i == 2 else ''}" for i in range(4)]
    run = curate(toml(write_documents("a.jsonl", texts), '[[step]]\nuse = "line_dedup"'))
    written = {row["row"]: row["text"] for side in ("train", "heldout") for row in rows_of(run, side)}
    assert written[0].startswith(line)
    assert [written[i].count(line) for i in range(4)] == [1, 0, 0, 0]
    assert all(f"own text {i}" in written[i] and "short" in written[i] for i in range(4))


@pytest.mark.parametrize("at_once", [1, 7, 1 << 20])
def test_groups_do_not_depend_on_how_many_keys_are_sorted_at_once(monkeypatch, at_once):
    monkeypatch.setattr(dedup, "SORTED_AT_ONCE", at_once)
    rng = np.random.default_rng(0)
    keys = rng.choice(rng.integers(1, 2**64, 30, dtype=np.uint64), 100)
    keys[::9] = 0
    alive = rng.random(100) < 0.8
    expected = {}
    for row, key in enumerate(keys.tolist()):
        if alive[row] and key:
            expected.setdefault(key, []).append(row)
    groups = [group.tolist() for group in equal_groups([keys[:40], keys[40:]], alive)]
    assert sorted(groups) == sorted(rows for rows in expected.values() if len(rows) > 1)


def test_large_groups_are_connected_by_few_pairs(tmp_path):
    rows = np.arange(0, 400, 2)
    pairs = list(candidate_pairs(rows))
    assert len(pairs) < 2 * len(rows)
    union = UnionFind(tmp_path / "parent.npy", 400)
    for a, b in pairs:
        union.union(a, b)
    assert {int(root) for root in union.roots()[rows]} == {0}
    assert np.array_equal(union.roots()[1::2], np.arange(1, 400, 2))


def test_pipelines_with_an_impossible_setting_are_refused(curate, write_documents):
    from warploom.errors import UserError

    path = write_documents("a.jsonl", ["text"])
    with pytest.raises(UserError, match=r"jaccard must be above 0 and at most 1, got 1.5"):
        curate(toml(path, STEP + "jaccard = 1.5"))
