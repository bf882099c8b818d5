"""MinHash signatures of a text's word 5-grams (Broder, 1997), a band of 8 hashes at a time for locality-sensitive
hashing: texts that agree in any of the 14 bands are candidates, and exact Jaccard of their 5-grams decides.
"""

from __future__ import annotations

import functools

import numpy as np

from warploom.curate.words import gram_hashes, mix, split_words

_CHUNK = 1024  # shingles hashed at once: the products stay in the second-level cache


def shingles(text: str, n: int = 5) -> np.ndarray:
    """Sorted distinct 32-bit hashes of the word n-grams, uint32; of the words together if they are fewer than n.

    Words are runs of letters and digits in lower case, so punctuation, case and spacing make no difference.
    """
    words = split_words(text, "letters")
    grams = gram_hashes(words.hashes, min(n, len(words)) if len(words) else n)
    hashes = (grams >> np.uint64(32)).astype(np.uint32)
    hashes.sort()  # np.unique goes through a hash table, which takes six times as long
    first = np.ones(len(hashes), dtype=bool)
    np.not_equal(hashes[1:], hashes[:-1], out=first[1:])
    return hashes[first]


@functools.cache
def multipliers(num_hashes: int, seed: int) -> np.ndarray:
    """(num_hashes, 1) odd uint32: multiplied by one, modulo 2**32, all shingles are permuted."""
    values = mix(np.arange(1, num_hashes + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15) + np.uint64(seed))
    return ((values >> np.uint64(32)).astype(np.uint32) | np.uint32(1))[:, None]


def signature(shingle_hashes: np.ndarray, num_hashes: int = 112, seed: int = 1) -> np.ndarray:
    """(num_hashes,) uint32: the least hash of the shingles under each permutation; all ones if there are none."""
    factors = multipliers(num_hashes, seed)
    least = np.full(num_hashes, 0xFFFFFFFF, dtype=np.uint32)
    for start in range(0, len(shingle_hashes), _CHUNK):
        hashes = factors * shingle_hashes[start : start + _CHUNK]
        np.minimum(least, hashes.min(axis=1), out=least)
    return least


def bands(signatures: np.ndarray, num_bands: int) -> np.ndarray:
    """(num_bands, N) uint64 from signatures (N, num_hashes): one hash of each band's num_hashes // num_bands values."""
    rows = signatures.shape[1] // num_bands
    keys = np.empty((num_bands, len(signatures)), dtype=np.uint64)
    for band in range(num_bands):
        key = np.full(len(signatures), band, dtype=np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            key = mix(key + signatures[:, column])
        keys[band] = key
    return keys


def jaccard(a: np.ndarray, b: np.ndarray) -> float:
    """Share of common members of two sorted sets; 0 if both are empty."""
    if not len(a) or not len(b):
        return 0.0
    places = np.searchsorted(b, a)
    common = int(np.count_nonzero(b[np.minimum(places, len(b) - 1)] == a))
    return common / (len(a) + len(b) - common)
