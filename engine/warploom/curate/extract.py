"""HTML to text without the boilerplate: resiliparse by default, trafilatura on request.

Each page has a time limit. An extractor that runs over it sits in C code that no exception reaches, so it is run in a
process of its own (trafilatura, which is known to run for ever) or bounded by the page's size (resiliparse, linear).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from warploom.curate.document import Document, Step, at_least
from warploom.curate.optional import optional
from warploom.curate.timeout import TimeLimited
from warploom.errors import UserError

_META_CHARSET = re.compile(rb"<meta[^>]{1,200}charset\s*=\s*[\"']?\s*([A-Za-z0-9_:.-]{2,40})", re.I)


@dataclass(kw_only=True)
class Extract(Step):
    """Make text of pages that were read as HTML; other documents pass."""

    NAME = "extract"
    kind = "edit"

    library: Literal["resiliparse", "trafilatura"] = "resiliparse"
    main_content: bool = True
    """Leave out navigation, headers, footers and comments."""
    timeout_s: float = 10.0
    """A page that takes trafilatura longer is dropped."""
    max_page_bytes: int = 16 << 20
    """A larger page is dropped unread."""
    min_chars: float = at_least("chars", 1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.library not in ("resiliparse", "trafilatura"):
            raise UserError(f"extract.library must be resiliparse or trafilatura, got {self.library!r}")
        optional("trafilatura" if self.library == "trafilatura" else "resiliparse.extract.html2text")
        self._limited = TimeLimited(trafilatura_text, self.timeout_s) if self.library == "trafilatura" else None

    def apply(self, document: Document) -> None:
        html = document.html
        if html is None:
            return
        if len(html) > self.max_page_bytes:
            document.dropped = f"{self.name}.page_too_large"
            document.html = None
            return
        page = decode_html(html, document.charset)
        if self._limited is None:
            html2text = optional("resiliparse.extract.html2text")
            text = html2text.extract_plain_text(page, main_content=self.main_content, alt_texts=False, links=False)
        else:
            answer = self._limited(page)
            if answer is None:
                document.dropped = f"{self.name}.timeout"
                document.html = None
                return
            text = answer
        # Half a surrogate pair, written as a character reference, is no text.
        document.text = text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")
        document.html = None
        document.edits.append(self.name)
        self.put(document, {"chars": len(document.text.strip())})


def trafilatura_text(page: str) -> str:
    """trafilatura's main text, in favour of precision, as FineWeb took it."""
    return optional("trafilatura").extract(page, favor_precision=True, include_comments=False, deduplicate=False) or ""


def decode_html(html: bytes, charset: str | None) -> str:
    """Decode a page: by byte order mark, UTF-8 if it is that, then what the server or the page says, then a guess."""
    if html.startswith((b"\xff\xfe", b"\xfe\xff")):
        return html.decode("utf-16", "replace")
    try:
        return html.decode("utf-8-sig")
    except UnicodeDecodeError:
        pass
    meta = _META_CHARSET.search(html[:4096])
    for name in (charset, meta and meta[1].decode("ascii")):
        if name:
            try:
                return html.decode(name, "replace")
            except LookupError:
                continue
    return html.decode(optional("resiliparse.parse.encoding").detect_encoding(html) or "cp1252", "replace")
