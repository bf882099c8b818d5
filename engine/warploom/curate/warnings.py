"""What a person should look at before trusting a run: rules that did nothing, or nearly everything."""

from __future__ import annotations

from typing import Any

# A rule judges by chance below this number of documents.
MIN_JUDGED = 20
NEARLY_ALL = 0.9


def warnings(manifest: dict[str, Any]) -> list[str]:
    """Sentences, the gravest first."""
    found = []
    for name, stats in manifest["rules"].items():
        judged, failed = stats["judged"], stats["failed"]
        if judged >= MIN_JUDGED and failed >= NEARLY_ALL * judged:
            found.append(f"{name} does not keep {failed:,} of the {judged:,} documents it judged: look at its samples")
    damaged = manifest["damaged_files"]
    found += [f"damaged: {message}" for message in damaged[:20]]
    if len(damaged) > 20:
        found.append(f"{len(damaged) - 20} more damaged files are named in manifest.json")
    idle_rules = [
        name for name, stats in manifest["rules"].items() if stats["judged"] >= MIN_JUDGED and stats["failed"] == 0
    ]
    if idle_rules:
        found.append(f"rules that keep every document, without effect or with a wrong bound: {', '.join(idle_rules)}")
    for entry in manifest["funnel"]:
        idle = not entry["documents_dropped"] and not entry["counts"]
        if (
            idle
            and entry["documents_in"] >= MIN_JUDGED
            and not any(
                name.startswith(entry["step"] + ".") and stats["judged"] for name, stats in manifest["rules"].items()
            )
        ):
            found.append(f"the step {entry['step']} changed and dropped nothing in {entry['documents_in']:,} documents")
    return found
