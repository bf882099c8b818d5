import itertools
import random

import numpy as np

from warploom.curate.minhash import bands, jaccard, shingles, signature

WORDS = [f"w{i}" for i in range(3000)]


def edited(text, rng, changes):
    words = text.split()
    for _ in range(changes):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words)


def word_sets(texts, n=5):
    return [set(zip(*(t.split()[i:] for i in range(n)), strict=False)) for t in texts]


def test_jaccard_of_hashes_is_that_of_the_word_sets():
    rng = random.Random(0)
    base = " ".join(rng.choices(WORDS, k=400))
    texts = [base, edited(base, rng, 5), edited(base, rng, 40), " ".join(rng.choices(WORDS, k=300))]
    sets = word_sets(texts)
    hashed = [shingles(text) for text in texts]
    for a, b in itertools.combinations(range(len(texts)), 2):
        exact = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        assert abs(jaccard(hashed[a], hashed[b]) - exact) < 1e-3
    assert jaccard(hashed[0], hashed[0]) == 1.0
    assert jaccard(hashed[0], np.empty(0, np.uint32)) == 0.0


def test_signatures_estimate_jaccard():
    """The share of equal values has mean J and standard deviation sqrt(J (1 - J) / 112)."""
    rng = random.Random(1)
    errors = []
    for _ in range(60):
        base = " ".join(rng.choices(WORDS, k=300))
        a, b = shingles(base), shingles(edited(base, rng, rng.randrange(1, 40)))
        exact = jaccard(a, b)
        estimate = float(np.mean(signature(a) == signature(b)))
        errors.append((estimate - exact) / max((exact * (1 - exact) / 112) ** 0.5, 1e-3))
    assert abs(np.mean(errors)) < 0.5
    assert 0.6 < np.std(errors) < 1.5


def test_case_punctuation_and_spacing_make_no_difference():
    assert np.array_equal(shingles("One, two; three -- FOUR five\nsix!"), shingles("one two three four five six"))


def test_text_without_spaces_has_shingles():
    a = "\u4eca\u5929\u5929\u6c14\u5f88\u597d\u6211\u4eec\u53bb\u516c\u56ed"
    assert len(shingles(a)) == len(a) - 4


def test_long_documents_are_the_sum_of_their_parts():
    """Signatures are minima, so they may be taken in chunks."""
    rng = random.Random(2)
    text = " ".join(rng.choices(WORDS, k=5000))
    hashes = shingles(text)
    whole = signature(hashes)
    parts = np.minimum(signature(hashes[:1500]), signature(hashes[1500:]))
    assert np.array_equal(whole, parts)


def test_bands_agree_where_their_values_do():
    signatures = np.random.default_rng(0).integers(0, 2**32, (3, 112), dtype=np.uint32)
    signatures[1, 8:16] = signatures[0, 8:16]
    keys = bands(signatures, 14)
    assert keys.shape == (14, 3)
    assert np.flatnonzero(keys[:, 0] == keys[:, 1]).tolist() == [1]
    assert not (keys[:, 0] == keys[:, 2]).any()
