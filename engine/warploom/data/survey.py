"""The pass over a corpus before it is encoded: how its held-out split is cut, a sample to learn a tokenizer from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Literal

from warploom.data.heldout import HASH_RANGE, MIN_HELDOUT_DOCUMENTS, Unit, blocks, text_hash, units
from warploom.errors import UserError

# A vocabulary is learnt from at most so much text: more changes it little and takes time and memory.
SAMPLE_BYTES = 32 << 20

Documents = Callable[[], Iterator[str]]  # begins a new pass at each call


@dataclass(frozen=True)
class Survey:
    unit: Unit  # what the hash decides on
    threshold: int  # a unit is held out if its hash is below
    num_documents: int
    num_bytes: int  # UTF-8 bytes of text
    sample: list[str]  # blocks of the training side, at most SAMPLE_BYTES


def survey(
    documents: Documents, heldout_fraction: float, heldout_unit: Unit | Literal["auto"], progress: Callable[[int], None]
) -> Survey:
    """Read a corpus through. The result does not depend on the order of its documents.

    Raises UserError if there is too little text to train on one part and hold out another.
    """
    unit = _enough_documents(documents, heldout_fraction) if heldout_unit == "auto" else heldout_unit
    threshold = int(heldout_fraction * HASH_RANGE)
    lowest, highest = HASH_RANGE, -1
    num_documents = num_bytes = 0
    sample = _LowestHashes(SAMPLE_BYTES)
    for text in documents():
        num_documents += 1
        num_bytes += len(text.encode("utf-8"))
        for piece in units(text, unit):
            piece_hash = text_hash(piece)
            lowest, highest = min(lowest, piece_hash), max(highest, piece_hash)
            if piece_hash >= threshold:
                for block in blocks(piece):
                    sample.add(piece_hash, text_hash(block), block)
        progress(num_bytes)
    # A corpus so small that nothing fell below the threshold gives its lowest unit to the held-out side.
    threshold = max(threshold, lowest + 1)
    if highest < threshold:
        raise UserError(
            f"the corpus has too little text to hold some out: of its {num_bytes} bytes in {num_documents} document(s) "
            f"no {unit} is left to train on; give more text, or a smaller heldout-fraction than {heldout_fraction}"
        )
    return Survey(unit, threshold, num_documents, num_bytes, sample.texts(threshold))


def _enough_documents(documents: Documents, heldout_fraction: float) -> Unit:
    enough = math.ceil(MIN_HELDOUT_DOCUMENTS / heldout_fraction)
    return "document" if sum(1 for _ in islice(documents(), enough)) == enough else "block"


class _LowestHashes:
    """The blocks of lowest hash that fit into limit_bytes."""

    def __init__(self, limit_bytes: int):
        self._limit_bytes = limit_bytes
        self._kept: list[tuple[int, int, str, int]] = []  # block's hash, hash of its unit, block, bytes
        self._kept_bytes = 0
        self._below = HASH_RANGE

    def add(self, unit_hash: int, block_hash: int, block: str) -> None:
        if block_hash >= self._below:
            return
        size = len(block.encode("utf-8"))
        self._kept.append((block_hash, unit_hash, block, size))
        self._kept_bytes += size
        if self._kept_bytes > 2 * self._limit_bytes:
            self._trim()

    def _trim(self) -> None:
        self._kept.sort()
        total = 0
        for count, (block_hash, _, _, size) in enumerate(self._kept):
            if total + size > self._limit_bytes:
                self._below = block_hash
                del self._kept[count:]
                break
            total += size
        self._kept_bytes = total

    def texts(self, threshold: int) -> list[str]:
        """The blocks whose unit is trained on."""
        self._trim()
        return [block for _, unit_hash, block, _ in self._kept if unit_hash >= threshold]
