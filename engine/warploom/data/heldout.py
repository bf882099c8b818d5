"""The held-out split: which text is trained on and which is only measured on, decided by a hash of the text itself.

A unit of text is held out if its hash lies below a threshold. So it falls on the same side whatever its file, its
position or its neighbours, and copies of it fall there too. The unit is the whole document where there are enough of
them. With few (one book, a dozen novels) that would hold out nothing or far too much, so the unit is then a block:
some 4,000 characters of a document, cut at a paragraph where possible. Neighbouring blocks of one side stay together
as one document.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from typing import Literal

import xxhash

Unit = Literal["document", "block"]

BLOCK_CHARS = 4096
# With fewer documents held out than this on average, their number is left too much to chance.
MIN_HELDOUT_DOCUMENTS = 10
HASH_RANGE = 1 << 64


def text_hash(text: str) -> int:
    """64-bit xxh3 of the text in UTF-8."""
    return xxhash.xxh3_64_intdigest(text.encode("utf-8"))


def blocks(text: str) -> Iterator[str]:
    """Cut text into blocks of BLOCK_CHARS to twice as many characters; joined, they are the text.

    The cut is after the first empty line beyond BLOCK_CHARS, or else the first line end, or else the first space.
    """
    start = 0
    while len(text) - start > 2 * BLOCK_CHARS:
        low, high = start + BLOCK_CHARS, start + 2 * BLOCK_CHARS
        for border in ("\n\n", "\n", " "):
            at = text.find(border, low, high)
            if at >= 0:
                end = at + len(border)
                break
        else:
            end = high
        yield text[start:end]
        start = end
    yield text[start:]


def units(text: str, unit: Unit) -> Iterator[str]:
    """The units of one document."""
    return iter((text,)) if unit == "document" else blocks(text)


def sides(text: str, unit: Unit, threshold: int) -> Iterator[tuple[bool, str]]:
    """Yield (held out, text) for the stretches of one document that lie on one side."""
    for heldout, run in groupby(units(text, unit), key=lambda piece: text_hash(piece) < threshold):
        yield heldout, "".join(run)
