"""Steps that mend the characters of a text: encoding, Unicode form, control characters, emoji, look-alikes,
punctuation, white space. Each first asks, in one fast pass, whether there is anything to do."""

from __future__ import annotations

import functools
import re
import unicodedata
from dataclasses import dataclass
from typing import Literal

from warploom.curate.document import Document, Step, at_most
from warploom.curate.optional import optional
from warploom.errors import UserError

# What UTF-8 looks like when it was read as Latin-1 or Windows-1252: a lead byte's letter, then a continuation byte's.
_MOJIBAKE = re.compile(
    "[\u00c2\u00c3\u00c5\u00c6\u00cb\u00cc\u00ce\u00d0\u00d1\u00d7\u00d8\u00d9\u00e2\u00ef\u00f0]"
    "[\u0080-\u00bf\u0152-\u0192\u02c6\u02dc\u2013-\u203a\u20ac\u2122]"
)
# Control characters but tab and line end, zero-width and directional marks, private use, noncharacters, U+FFFD. The
# zero-width joiner stays where letters of Indic and Arabic scripts or emoji need it.
_NO_TEXT = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u00ad\u200b\u200e\u200f\u2028\u2029\u202a-\u202e\u2060-\u206f\ue000-\uf8ff"
    "\ufdd0-\ufdef\ufeff\ufff9-\uffff\U000f0000-\U0010ffff]"
)
_EMOJI = re.compile(
    "[\U0001f000-\U0001faff\u2600-\u27bf\u2b00-\u2bff\u231a\u231b\u23e9-\u23f3\u23f8-\u23fa\u25b6\u25c0"
    "\U000e0020-\U000e007f\u20e3\ufe0f]+(?:\u200d[\U0001f000-\U0001faff\u2600-\u27bf\ufe0f]+)*"
)


@dataclass(kw_only=True)
class Unicode(Step):
    """Undo mojibake, bring characters to one form, remove what is no text."""

    NAME = "unicode"
    kind = "edit"

    mend_mojibake: bool = True
    form: Literal["NFC", "NFKC", "none"] = "NFC"
    """Unicode normal form. NFKC also turns ligatures, full-width letters and superscripts into plain ones."""
    remove_controls: bool = True
    """Remove control, zero-width, private-use and replacement characters."""
    max_replaced: float = at_most("replaced", 0.02)
    """Share of U+FFFD, which stand where a text was decoded wrongly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form not in ("NFC", "NFKC", "none"):
            raise UserError(f"unicode.form must be NFC, NFKC or none, got {self.form!r}")

    def apply(self, document: Document) -> None:
        text = document.text
        replaced = 0
        if not text.isascii():
            replaced = text.count("\ufffd")
            if self.mend_mojibake and _MOJIBAKE.search(text):
                mended = optional("ftfy").fix_encoding(text)
                self.stats.counts["mojibake"] += mended != text
                text = mended
            if self.form != "none" and not unicodedata.is_normalized(self.form, text):
                text = unicodedata.normalize(self.form, text)
                self.stats.counts["other form"] += 1
        self.put(document, {"replaced": replaced / max(len(text), 1)})
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        if self.remove_controls:
            text, count = _NO_TEXT.subn("", text)
            self.stats.counts["characters that are no text"] += count
        self.change(document, text)


@dataclass(kw_only=True)
class Emoji(Step):
    """Remove emoji and pictographs, or only measure them."""

    NAME = "emoji"
    kind = "edit"

    remove: bool = True
    max_share: float = at_most("share", float("inf"))
    """Share of the characters."""

    def apply(self, document: Document) -> None:
        text = document.text
        if text.isascii():
            self.put(document, {"share": 0.0})
            return
        found = _EMOJI.findall(text)
        self.put(document, {"share": sum(map(len, found)) / max(len(text), 1)})
        self.stats.counts["emoji"] += len(found)
        if self.remove and found:
            self.change(document, _EMOJI.sub("", text))


_PUNCTUATION = str.maketrans(
    {
        **dict.fromkeys("\u2018\u2019\u201a\u201b\u2032", "'"),
        **dict.fromkeys("\u201c\u201d\u201e\u201f\u2033", '"'),
        **dict.fromkeys("\u2010\u2011\u2012\u2212", "-"),
        **dict.fromkeys("\u2013\u2014\u2015", "-"),
        "\u2026": "...",
        **dict.fromkeys(
            "\u00a0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u202f\u205f\u3000", " "
        ),
    }
)
_TRAILING = re.compile(r"[ \t]+$", re.M)
_SPACES = re.compile(r"(?<=\S)[ \t]{2,}")
_BLANK_LINES = re.compile(r"\n{3,}")
_REPEATED_MARKS = re.compile(r"([!?,;:])\1{2,}|(\.)\2{3,}|([-=_*~#])\3{9,}")


@dataclass(kw_only=True)
class Punctuation(Step):
    """One kind of quotation mark, dash and space; no run of spaces, blank lines or marks."""

    NAME = "punctuation"
    kind = "edit"

    plain_marks: bool = True
    """Typographic quotation marks, dashes and ellipses become ASCII."""
    collapse_space: bool = True
    """Runs of spaces inside a line become one, of blank lines one; spaces at line ends go. Indents stay."""
    collapse_marks: bool = True
    """!!!!! becomes !, ...... becomes ..., a drawn line of ten marks or more becomes three."""

    def apply(self, document: Document) -> None:
        text = document.text
        if self.plain_marks and not text.isascii():
            text = text.translate(_PUNCTUATION)
        if self.collapse_space:
            text = _BLANK_LINES.sub("\n\n", _SPACES.sub(" ", _TRAILING.sub("", text))).strip("\n")
        if self.collapse_marks:
            text = _REPEATED_MARKS.sub(lambda m: m[1] or (m[2] and "...") or m[3] * 3, text)
        self.change(document, text)


_MIXED = re.compile("[^\\W\\d_]*(?:[A-Za-z][^\\W\\d_A-Za-z]|[^\\W\\d_A-Za-z][A-Za-z])[^\\W\\d_]*")


@dataclass(kw_only=True)
class Confusables(Step):
    """Inside a word of Latin letters, replace letters of other scripts that look like Latin ones (a Cyrillic a in
    "paypal"). Words of one script, whole Russian or Greek texts above all, are never touched."""

    NAME = "confusables"
    kind = "edit"

    max_words: float = at_most("words", float("inf"))
    """Words per text that had to be mended."""

    def apply(self, document: Document) -> None:
        count = 0
        if not document.text.isascii():
            table = _lookalikes()

            def mend(match: re.Match[str]) -> str:
                nonlocal count
                word = match[0]
                folded = word.translate(table)
                # Only if nothing but Latin is left: a Greek word with one Latin letter is not ours to judge.
                if folded == word or not all(_is_latin(char) for char in folded):
                    return word
                count += 1
                return folded

            text = _MIXED.sub(mend, document.text)
            self.stats.counts["words"] += count
            self.change(document, text)
        self.put(document, {"words": count})


def _is_latin(char: str) -> bool:
    return char.isascii() or unicodedata.name(char, "").startswith("LATIN")


@functools.cache
def _lookalikes() -> dict[int, str]:
    """Letter of another script -> the Latin letter that Unicode's table of confusables (TR 39) gives for it."""
    table: dict[int, str] = {}
    for char, rows in optional("confusable_homoglyphs.confusables").confusables_data.items():
        if len(char) != 1 or not char.isalpha() or _is_latin(char):
            continue
        twins = sorted(row["c"] for row in rows if len(row["c"]) == 1 and row["c"].isascii() and row["c"].isalpha())
        same_case = [twin for twin in twins if twin.isupper() == char.isupper()]
        if same_case:
            table[ord(char)] = same_case[0]
    return table
