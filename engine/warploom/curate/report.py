"""report.html of a curation run: the funnel, every rule with samples of what it kept and dropped, sources, the mix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jinja2

from warploom.curate.warnings import warnings

# HTML allows no control characters, so they are shown as their Unicode pictures.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


def write_report(path: Path, name: str, manifest: dict[str, Any], excerpts: dict[int, str]) -> None:
    """Write the page, which needs no other file. excerpts: the beginnings of sampled documents, by row."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("report.html").read_text(encoding="utf-8"))
    kept = sum(sides.get(side, {}).get("documents", 0) for sides in manifest["sources"].values() for side in _KEPT)
    kept_bytes = sum(sides.get(side, {}).get("bytes", 0) for sides in manifest["sources"].values() for side in _KEPT)
    page = template.render(
        name=name,
        manifest=manifest,
        warnings=warnings(manifest),
        documents=manifest["funnel"][0]["documents_in"] if manifest["funnel"] else kept,
        kept=kept,
        kept_bytes=kept_bytes,
        samples={
            rule: {kind: [excerpts.get(row, "") for row in stats[f"{kind}_samples"]] for kind in ("kept", "dropped")}
            for rule, stats in manifest["rules"].items()
        },
        visible=lambda text: text.translate(_VISIBLE),
        count=lambda number: "" if number is None else f"{number:,}",
        megabytes=lambda size: f"{size / 1e6:,.2f}",
    )
    path.write_text(page, encoding="utf-8")


_KEPT = ("train", "heldout")
