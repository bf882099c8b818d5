"""The addresses of pages: their host, and a filter by a list of hosts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from warploom.curate.document import Document, Step, at_most
from warploom.errors import UserError


def domain(url: str) -> str:
    """The host of a URL without www, or "" if it has none."""
    try:
        return (urlsplit(url).hostname or "").removeprefix("www.")
    except ValueError:
        return ""


@dataclass(kw_only=True)
class UrlFilter(Step):
    """Drop pages of listed hosts and of hosts below them: the first step of RefinedWeb and FineWeb, whose lists of
    millions of adult hosts (UT1) are not shipped."""

    NAME = "url_filter"

    hosts: str = ""
    """A text file with a host per line."""
    max_blocked: float = at_most("blocked", 0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.hosts:
            raise UserError("the step url_filter needs hosts = a file with a host per line")
        try:
            lines = Path(self.hosts).read_text(encoding="utf-8").split()
        except OSError as error:
            raise UserError(f"cannot read the list of hosts {self.hosts}: {error.strerror}") from error
        self._hosts = frozenset(line.lower().removeprefix("www.") for line in lines)

    def files(self) -> list[Path]:
        return [Path(self.hosts)]

    def apply(self, document: Document) -> None:
        labels = domain(document.url).split(".")
        blocked = any(".".join(labels[first:]) in self._hosts for first in range(len(labels)))
        self.put(document, {"blocked": blocked})
