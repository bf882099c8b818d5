"""Personal data and secrets: candidates by one linear-time scan over the text, then a validator for each kind.

The scan is RE2's, which cannot be made to backtrack by hostile text. What the pattern takes for a card number must
pass Luhn, an IBAN its check digits and length, a social-security number the ranges ever issued, an address of a
network must be one that reaches a person. What is left becomes a span; the text is replaced when it is written.
"""

from __future__ import annotations

import functools
import ipaddress
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from warploom.curate.document import Document, Step
from warploom.curate.optional import optional
from warploom.errors import UserError, nearest

_NOT_HOSTS = ("png", "jpg", "jpeg", "gif", "svg", "webp", "css", "js", "html", "htm", "php", "pdf")
_PHONE_WORDS = re.compile(
    r"(?i)\b(?:phones?|tel|telephone|calls?|called|calling|fax|mobile|cell|whatsapp|dial|contact|hotline)\b"
)
_PHONE_LABEL = re.compile(_PHONE_WORDS.pattern + r"[.: ]*$")
_THOUSANDS = re.compile(r"[1-9]\d?(?:[ .]\d{3}){2,}")
# Words that speak of other things as often: a number after them must be written in groups, or have the ten digits of
# North America.
_PHONE_HINTS = re.compile(r"(?i)\b(?:ring|text|sms|messages?|answering|reach|desk)\b")
_PHONE_WORDS_AFTER = re.compile(r"(?i)[ \-(,\\]*(?:office|home|mobile|cell|fax|desk)\b")
_CARD_WORDS = re.compile(r"(?i)\b(?:card|visa|mastercard|amex|cc|pan)\b")
_SSN_WORDS = re.compile(r"(?i)\b(?:ssn|social|w-?2)\b")
_SECTION_WORDS = re.compile(r"(?i)(?:\b(?:section|chapter|version)s?|\bv|\u00a7)\.?\s*$")

# Alternatives are tried in this order where they begin at the same place.
_PATTERNS = {
    "key": (
        r"AKIA[0-9A-Z]{16}|ASIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{36,}|github_pat_[A-Za-z0-9_]{60,}"
        r"|xox[abprs]-[A-Za-z0-9-]{10,}|AIza[0-9A-Za-z_-]{35}|sk_live_[0-9A-Za-z]{16,}|sk-[A-Za-z0-9_-]{32,}"
        r"|glpat-[0-9A-Za-z_-]{20}|eyJ[A-Za-z0-9_-]{10,}\.eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}"
        r"|npm_[A-Za-z0-9]{36}|hf_[A-Za-z0-9]{34}|pypi-AgE[A-Za-z0-9_-]{50,}|SG\.[A-Za-z0-9_-]{22}\.[A-Za-z0-9_-]{43}"
        r"|\bSK[0-9a-f]{32}\b|\b[0-9a-f]{32}-us[0-9]{1,2}\b|\b[0-9]{8,10}:AA[A-Za-z0-9_-]{33}\b"
        r"|-----BEGIN [A-Z ]{0,20}PRIVATE KEY-----[A-Za-z0-9+/=\s]*(?:-----END [A-Z ]{0,20}PRIVATE KEY-----)?"
    ),
    "email": r"[A-Za-z0-9][A-Za-z0-9._%+-]{0,63}@[A-Za-z0-9](?:[A-Za-z0-9-]{0,62}\.)+[A-Za-z]{2,24}\b",
    "iban": r"\b[A-Za-z]{2}[0-9]{2}(?:[ ]?[A-Za-z0-9]{4}){2,7}(?:[ ]?[A-Za-z0-9]{1,4})?\b",
    "ip": (
        r"\b[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\.[0-9]{1,3}\b"
        r"|(?:[0-9A-Fa-f]{1,4}:){2,7}(?::?[0-9A-Fa-f]{1,4}){1,7}|(?:[0-9A-Fa-f]{1,4}:){1,7}:"
    ),
    "number": r"(?:\+|\b00|\()?\(?\b[0-9](?:[ ./()\-]{0,2}[0-9]){6,19}(?:[ ]?(?:x|ext\.?)[ ]?[0-9]{1,5})?\b",
}
KINDS = ("email", "phone", "ip", "card", "iban", "ssn", "key")


@dataclass(kw_only=True)
class Redact(Step):
    """Find personal data and secrets, and have each replaced by the name of its kind, such as <EMAIL>."""

    NAME = "redact"
    kind = "span"

    kinds: tuple[str, ...] = KINDS
    private_addresses: bool = False
    """Count IP addresses of private and reserved networks too."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"redact.kinds has {kind!r}{nearest(kind, KINDS)}")
        _scanner()

    def apply(self, document: Document) -> None:
        counts: Counter[str] = Counter()
        for start, end, kind in find(document.text, self.private_addresses):
            if kind in self.kinds:
                document.spans.append((start, end, f"<{kind.upper()}>"))
                counts[kind] += 1
        if counts:
            self.stats.counts.update(counts)
            self.put(document, dict(counts))


def find(text: str, private_addresses: bool = False) -> Iterator[tuple[int, int, str]]:
    """Yield (start, end, kind) in characters of text, in order, not overlapping; kind is one of KINDS."""
    data = text.encode("utf-8", "replace")
    is_ascii = len(data) == len(text)
    done_bytes = done_chars = 0
    for match in _scanner().finditer(data):
        low, high = match.span()
        if is_ascii:
            start, end = low, high
        else:
            start = done_chars + len(data[done_bytes:low].decode("utf-8"))
            end = start + len(data[low:high].decode("utf-8"))
            done_bytes, done_chars = high, end
        found = _VALIDATORS[match.lastgroup.decode()](text, start, end)
        if found is None or (found[2] == "ip" and not private_addresses and _is_private(text[found[0] : found[1]])):
            continue
        yield found


@functools.cache
def _scanner() -> Any:
    re2 = optional("re2")
    options = re2.Options()
    options.max_mem = 64 << 20
    options.encoding = re2.Options.Encoding.LATIN1  # bytes: positions are those of UTF-8, mapped once per match
    pattern = "|".join(f"(?P<{name}>{pattern})" for name, pattern in _PATTERNS.items())
    return re2.compile(pattern.encode("ascii"), options)


Found = tuple[int, int, str] | None


def _email(text: str, start: int, end: int) -> Found:
    local, _, domain = text[start:end].rpartition("@")
    labels = domain.lower().split(".")
    valid = (
        ".." not in local
        and not local.endswith(".")
        and all(label and not label.startswith("-") and not label.endswith("-") for label in labels)
        and labels[-1] not in _NOT_HOSTS
        and len(domain) <= 253
    )
    return (start, end, "email") if valid else None


def _ip(text: str, start: int, end: int) -> Found:
    longer = re.compile(r"[0-9]{2}(?:\.[0-9]{2}){4}(?![.0-9])").match(text, start)
    if longer:
        return _number(text, start, longer.end())
    if _SECTION_WORDS.search(text[max(0, start - 12) : start]):
        return None
    if text[start - 1 : start] in (".", ":") or text[end : end + 1] == ":" or text[end : end + 2].strip(".").isdigit():
        return None  # a version number, a clock time, part of something longer
    value = text[start:end]
    if ":" in value and value.count(":") < 7 and "::" not in value:
        return None
    try:
        ipaddress.ip_address(value)
    except ValueError:
        return None
    return start, end, "ip"


def _is_private(value: str) -> bool:
    return not ipaddress.ip_address(value).is_global


# Country code -> length, of the IBAN registry (SWIFT, release 97).
_IBAN_LENGTHS = {
    "AD": 24, "AE": 23, "AL": 28, "AT": 20, "AZ": 28, "BA": 20, "BE": 16, "BG": 22, "BH": 22, "BR": 29, "BY": 28,
    "CH": 21, "CR": 22, "CY": 28, "CZ": 24, "DE": 22, "DK": 18, "DO": 28, "EE": 20, "EG": 29, "ES": 24, "FI": 18,
    "FO": 18, "FR": 27, "GB": 22, "GE": 22, "GI": 23, "GL": 18, "GR": 27, "GT": 28, "HR": 21, "HU": 28, "IE": 22,
    "IL": 23, "IQ": 23, "IS": 26, "IT": 27, "JO": 30, "KW": 30, "KZ": 20, "LB": 28, "LC": 32, "LI": 21, "LT": 20,
    "LU": 20, "LV": 21, "LY": 25, "MC": 27, "MD": 24, "ME": 22, "MK": 19, "MR": 27, "MT": 31, "MU": 30, "NL": 18,
    "NO": 15, "PK": 24, "PL": 28, "PS": 29, "PT": 25, "QA": 29, "RO": 24, "RS": 22, "SA": 24, "SC": 31, "SE": 24,
    "SI": 19, "SK": 24, "SM": 27, "ST": 25, "SV": 28, "TL": 23, "TN": 24, "TR": 26, "UA": 29, "VA": 22, "VG": 24,
    "XK": 20,
}  # fmt: skip


def _iban(text: str, start: int, end: int) -> Found:
    length = _IBAN_LENGTHS.get(text[start : start + 2].upper())
    if length is None:
        return None
    # The pattern may have run on into the next word: the country tells where it ends.
    kept = 0
    for position in range(start, end):
        kept += text[position] != " "
        if kept == length:
            compact = text[start : position + 1].replace(" ", "")
            digits = "".join(str(int(char, 36)) for char in compact[4:] + compact[:4])
            return (start, position + 1, "iban") if int(digits) % 97 == 1 else None
    return None


def _number(text: str, start: int, end: int) -> Found:
    """What a run of digits and separators is: a card, a social-security or a telephone number, or nothing."""
    value = text[start:end]
    before, after = text[start - 1 : start], text[end : end + 1]
    card = _CARD.match(value)
    if card and _is_card(card[0], before, "" if card.end() < len(value) else after, text[max(0, start - 30) : start]):
        return start, start + card.end(), "card"  # what follows is its date
    if before and (before in "_=#$%/\\@&?" or before.isalpha()) or after and (after in "_=%/\\@&" or after.isalpha()):
        return None  # part of an address, an identifier, a price
    ssn = re.fullmatch(r"\(?(\d{3})([- ]?)(\d{2})\2(\d{4})", value)
    if ssn and (ssn[2] or _SSN_WORDS.search(text[max(0, start - 40) : start])):
        issued = ssn[1] not in ("000", "666") and ssn[1] < "900" and ssn[3] != "00" and ssn[4] != "0000"
        return (start + (value[0] == "("), end, "ssn") if issued else None
    lead = text[max(0, start - 40) : start]
    announced = _PHONE_WORDS.search(lead) or _PHONE_WORDS_AFTER.match(text, end)
    hinted = _PHONE_HINTS.search(lead) and re.search(r"\d[-. ()]+\d|^[2-9]\d\d[2-9]\d{6}$", value)
    if _THOUSANDS.fullmatch(value) and not _PHONE_LABEL.search(lead):
        return None
    return (start, end, "phone") if _is_phone(value, bool(announced or hinted)) else None


_CARD = re.compile(r"\d{12,19}(?!\d)|\d{4,6}(?:[ -]\d{4,6}){2,3}(?:[ -]\d{3})?(?![\d-])")
_CARD_ISSUERS = re.compile(r"3[0-9]|4|5[0-9]|6|1800|2131|2[2-7]")


def _is_card(value: str, before: str, after: str, lead: str) -> bool:
    """A known issuer's first digits, a length that cards have, and the Luhn check digit; a number that the text calls a
    card's may have a mistyped digit, and be a parameter's value. before, after: the characters beside it; lead: the
    text that leads to it."""
    announced = bool(_CARD_WORDS.search(lead))
    if before and (before in "_#$%/\\@&?." or before.isalpha() or before == "=" and not announced):
        return False
    if after and (after in "_=%/\\@" or after.isalpha() or after == "&" and not announced):
        return False
    digits = re.sub(r"\D", "", value)
    if not 12 <= len(digits) <= 19 or not _CARD_ISSUERS.match(digits) or len(set(digits)) < 2:
        return False
    doubled = [int(digit) * (2 if index % 2 else 1) for index, digit in enumerate(reversed(digits))]
    return announced or sum(digit - 9 if digit > 9 else digit for digit in doubled) % 10 == 0


def _is_phone(value: str, announced: bool) -> bool:
    """A number in a form that is written for telephones alone, or in a looser one where the text speaks of calling."""
    value = re.split(r"(?i)x|ext", value)[0].strip()
    digits = re.sub(r"\D", "", value)
    groups = re.findall(r"\d+", value)
    if not 7 <= len(digits) <= 15 or len(set(digits)) < 3:
        return False
    if re.fullmatch(r"(?:\d{1,2}[-./ ]\d{1,2}[-./ ](?:19|20)\d\d|(?:19|20)\d\d[-./ ]\d{1,2}[-./ ]\d{1,2}.*)", value):
        return False  # a date
    if len(groups) >= 2 and all(re.fullmatch(r"(?:1[5-9]|20)\d\d", group) for group in groups):
        return False  # years
    if value[0] == "+":
        return len(digits) >= 9
    if value.startswith("00"):
        return value[2] in "123456789" and "/" not in value and len(digits) >= 11
    if announced or re.fullmatch(r"(?:1[-. ])?\(?[2-9]\d\d\)?[-. ]{1,2}\d{3}[-. ]\d{4}", value):
        return True
    in_pairs = len(groups) == 5 and all(len(group) == 2 for group in groups)
    grouped = len(groups) > 1 and (max(map(len, groups)) >= 3 or in_pairs)
    area = re.match(r"(?:\d{1,3} ?)?\(", value)  # an area code in brackets, a trunk or country code before it
    return grouped and bool(area or digits[0] == "0") and 9 <= len(digits) <= 12


def _key(text: str, start: int, end: int) -> Found:
    value = text[start:end]
    if value.startswith("-----BEGIN"):
        return start, end, "key"
    # A placeholder in documentation repeats itself; a secret is near random.
    counts = Counter(value)
    entropy = -sum(count / len(value) * math.log2(count / len(value)) for count in counts.values())
    return (start, end, "key") if entropy >= 3.0 else None


_VALIDATORS: dict[str, Callable[[str, int, int], Found]] = {
    "key": _key,
    "email": _email,
    "iban": _iban,
    "ip": _ip,
    "number": _number,
}


def apply_spans(text: str, spans: list[tuple[int, int, str]]) -> str:
    """Replace each span of text by its third member; spans that overlap are taken as the first of them."""
    parts = []
    done = 0
    for start, end, replacement in sorted(spans):
        if start >= done:
            parts += [text[done:start], replacement]
            done = end
    return "".join([*parts, text[done:]])
