"""The held-out part: whole groups of documents that belong together by near-duplicate cluster and by domain.

Documents that share much of their n-grams, or their domain, lie on one side; what is left in common across the split
is searched for and stated.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import xxhash

from warploom.curate.cut import KEPT, Decisions, linked_pairs
from warploom.curate.dedup import NearDedup, UnionFind
from warploom.curate.pipeline import Heldout
from warploom.curate.segments import Segment
from warploom.curate.urls import domain
from warploom.curate.words import mix

# Below the threshold of near_dedup: pairs that were not similar enough to drop one are similar enough to leak.
LINK_JACCARD = 0.5
LINK_BAND_HASHES = 4


@dataclass(frozen=True)
class SplitProof:
    """What the manifest says of the split. highest_jaccard: across it, None where no near_dedup step wrote hashes."""

    groups: int
    heldout_documents: int
    heldout_bytes: int
    train_documents: int
    train_bytes: int
    highest_jaccard: float | None
    note: str


def split(
    config: Heldout,
    seed: int,
    near: NearDedup | None,
    segments: list[Segment],
    source_of_segment: list[int],
    decisions: Decisions,
) -> SplitProof:
    """Decide the side of every kept document, so that about config.fraction of each source's bytes is held out."""
    kept = decisions.dropped_at == KEPT
    union = UnionFind(decisions.folder / "group.npy", max(decisions.size, 1))
    if config.by == "cluster and domain":
        _join_domains(segments, kept, union)
    num_bands = 0 if near is None else near.num_bands * near.band_hashes // LINK_BAND_HASHES
    for band in range(num_bands):
        for a, b, _ in linked_pairs(segments, kept, band, LINK_BAND_HASHES, LINK_JACCARD):
            union.union(a, b)
    rows = np.flatnonzero(kept)
    roots, first, group = np.unique(union.roots()[rows], return_index=True, return_inverse=True)
    sizes = np.bincount(group, weights=decisions.bytes[rows], minlength=len(roots)).astype(np.int64)
    keys = mix(roots.astype(np.uint64) + np.uint64(seed))
    # Each source gives its share: one of few large groups would else be held out whole, or not at all.
    source_of = np.repeat(source_of_segment, [segment.num_documents for segment in segments])
    source_of_group = source_of[rows[first]]
    chosen = np.zeros(len(roots), np.bool_)
    for source in np.unique(source_of_group):
        members = np.flatnonzero(source_of_group == source)
        chosen[members] = _choose(sizes[members], keys[members], config.fraction)
    if not chosen.any() and len(roots) > 1:
        chosen[np.argmin(sizes)] = True
    decisions.heldout[:] = False
    decisions.heldout[rows] = chosen[group]
    heldout = np.asarray(decisions.heldout)
    highest = None
    if near is not None:
        highest = max(
            (
                similarity
                for band in range(num_bands)
                for a, b, similarity in linked_pairs(segments, kept, band, LINK_BAND_HASHES, 0.0)
                if heldout[a] != heldout[b]
            ),
            default=0.0,
        )
    return SplitProof(
        groups=len(roots),
        heldout_documents=int(heldout.sum()),
        heldout_bytes=int(decisions.bytes[heldout].sum(dtype=np.int64)),
        train_documents=int((kept & ~heldout).sum()),
        train_bytes=int(decisions.bytes[kept & ~heldout].sum(dtype=np.int64)),
        highest_jaccard=None if highest is None else round(highest, 4),
        note=(
            "not searched: there is no near_dedup step"
            if near is None
            else f"searched in {num_bands} bands of {LINK_BAND_HASHES} hashes, which meet a pair of Jaccard 0.5 with "
            f"probability {1 - (1 - 0.5**LINK_BAND_HASHES) ** num_bands:.2f}"
        ),
    )


def _join_domains(segments: Iterable[Segment], kept: np.ndarray, union: UnionFind) -> None:
    first: dict[int, int] = {}
    for segment in segments:
        for row, tags in enumerate(segment.tags(), segment.first):
            host = domain(tags["url"])
            if kept[row] and host:
                union.union(row, first.setdefault(xxhash.xxh3_64_intdigest(host.encode()), row))


def _choose(sizes: np.ndarray, keys: np.ndarray, fraction: float) -> np.ndarray:
    """(num_groups,) bool: groups in the order of their keys, as long as they fit into the fraction of the bytes."""
    chosen = np.zeros(len(sizes), np.bool_)
    room = fraction * int(sizes.sum())
    for group in np.argsort(keys, kind="stable").tolist():
        if sizes[group] <= room:
            chosen[group] = True
            room -= int(sizes[group])
    return chosen
