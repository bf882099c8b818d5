"""One HTML page about several results folders: figures with their errors, and differences on the same items."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from warploom.errors import UserError
from warploom.evaluation.figures import Difference, paired_difference
from warploom.evaluation.results import read_results, read_scores
from warploom.evaluation.task import Record

PAGE = "comparison.html"
_NUM_EXAMPLES = 8
# HTML allows no control characters, so they are shown as their Unicode pictures.
_VISIBLE = {code: 0x2400 + code for code in range(0x20) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


@dataclass(frozen=True)
class Example:
    """An item on which the second model scores unlike the first."""

    prompt: str
    wanted: str
    first: str
    second: str


@dataclass(frozen=True)
class Row:
    """A figure of all models."""

    name: str
    figures: list[dict[str, Any] | None]
    differences: list[Difference | None]
    """Of each model after the first against the first; None where they share no items."""


@dataclass(frozen=True)
class Section:
    """A task that any of the models has results of."""

    task: str
    rows: list[Row]
    groups: list[tuple[str, list[dict[str, Any] | None]]]
    """(subject, its main figure by model)."""
    flags: list[tuple[str, list[int]]]
    warnings: list[str]
    examples: list[tuple[str, list[Example]]]
    """(name of a model, items on which it differs from the first)."""


def write_comparison(folders: Sequence[Path], page: Path) -> Path:
    """Write the page, which needs no other file. Folders are named by their last part; the first is what the others are
    compared with. Raises UserError for a folder without results."""
    if not folders:
        raise UserError("there is nothing to compare; name results folders")
    results = [read_results(folder) for folder in folders]
    tasks = list(dict.fromkeys(task for one in results for task in one))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name(PAGE).read_text(encoding="utf-8"))
    text = template.render(
        names=[folder.name for folder in folders],
        sections=[_section(task, folders, results) for task in tasks],
        visible=lambda text: text.translate(_VISIBLE),
    )
    part = page.with_name(f"{page.name}.{os.getpid()}.part")  # evaluations of several models may end at once
    part.write_text(text, encoding="utf-8")
    os.replace(part, page)
    return page


def _section(task: str, folders: Sequence[Path], results: Sequence[Mapping[str, Any]]) -> Section:
    summaries = [one.get(task) for one in results]
    records = [{} if one is None else read_scores(folder, task) for folder, one in zip(folders, summaries, strict=True)]
    known = [one for one in summaries if one is not None]
    names = list(dict.fromkeys(name for one in known for name in one["figures"]))
    groups = list(dict.fromkeys(group for one in known for group in one["groups"]))
    flags = list(dict.fromkeys(flag for one in known for flag in one["flags"]))
    main = names[0] if names else ""
    return Section(
        task,
        [
            Row(
                name,
                [None if one is None else one["figures"].get(name) for one in summaries],
                [_difference(records[0], other, name) for other in records[1:]],
            )
            for name in names
        ],
        [
            (group, [None if one is None else one["groups"].get(group, {}).get(main) for one in summaries])
            for group in groups
        ],
        [(flag, [0 if one is None else one["flags"].get(flag, 0) for one in summaries]) for flag in flags],
        _warnings(known),
        [
            (folder.name, _examples(records[0], other, main))
            for folder, other in zip(folders[1:], records[1:], strict=True)
        ],
    )


def _difference(first: Mapping[str, Record], second: Mapping[str, Record], name: str) -> Difference | None:
    scores = [
        {item: record["scores"][name] for item, record in one.items() if name in record["scores"]}
        for one in (first, second)
    ]
    return paired_difference(*scores) if scores[0].keys() & scores[1].keys() else None


def _warnings(summaries: Sequence[Mapping[str, Any]]) -> list[str]:
    """What makes figures of a task incomparable: other settings, or other items."""
    found = []
    first = summaries[0]["settings"]
    for name in sorted({name for one in summaries for name in one["settings"]}):
        if any(one["settings"].get(name) != first.get(name) for one in summaries):
            found.append(f"The models were not asked alike: {name} differs.")
    if len({one["num_items"] for one in summaries}) > 1:
        found.append("The models were asked different numbers of items; differences are over those that all have.")
    return found


def _examples(first: Mapping[str, Record], second: Mapping[str, Record], name: str) -> list[Example]:
    changed = [
        item for item in first if item in second and first[item]["scores"].get(name) != second[item]["scores"].get(name)
    ]
    return [
        Example(first[item]["prompt"][-600:], _wanted(first[item]), _said(first[item]), _said(second[item]))
        for item in changed[:_NUM_EXAMPLES]
    ]


def _wanted(record: Record) -> str:
    gold = record.get("gold", "")
    return str(record["choices"][gold]) if isinstance(gold, int) and "choices" in record else str(gold)


def _said(record: Record) -> str:
    """What the model answered: the likeliest choice, or its text."""
    if "log_probs" in record:
        return str(record["choices"][max(range(len(record["choices"])), key=lambda n: record["log_probs"][n])])
    answers = record.get("answers")
    return "\n---\n".join(answers) if answers else str(record.get("answer", ""))
