"""The folder of a model's results: per task a file of records, a line per item, written as answers come; an evaluation
that was interrupted goes on from what is there.

    settings.json     which model, by the checksum of its weights, and in which precision
    <task>.jsonl      first line: how the task was put; then a record per item (evaluate.task.Record), the last of an
                      item is the one that counts
    results.json      the figures of each task that is done
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from warploom.errors import UserError
from warploom.evaluation.figures import figures_of
from warploom.evaluation.task import Record

RESULTS = "results.json"


class ResultsFolder:
    """Results of one model, in a folder that is there and that nobody else writes (checkpoint.lock.FolderLock)."""

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Raises UserError if the folder holds results of another model or precision."""
        self.path = path
        before = _read_json(path / "settings.json")
        if before is None:
            _write(path / "settings.json", dict(settings))
            return
        changed = [name for name in settings if name != "checkpoint" and before.get(name) != settings[name]]
        if changed:
            there, now = before.get(changed[0]), settings[changed[0]]
            raise UserError(
                f"{path} holds results with {changed[0]} {there}, and this model has {now}; give another --out, or "
                "delete the folder"
            )

    def records(self, task: str, settings: Mapping[str, Any]) -> dict[str, Record]:
        """Return the records that are there by item id. A line that was cut by an interruption is taken off the file.

        Raises UserError if they were made with other settings.
        """
        file = self.path / f"{task}.jsonl"
        if not file.is_file():
            file.write_text(_line({"settings": dict(settings)}), encoding="utf-8")
            return {}
        with open(file, "rb+") as stream:
            data = stream.read()
            whole = data.rfind(b"\n") + 1
            stream.truncate(whole)
        if not whole:
            file.unlink()
            return self.records(task, settings)
        try:
            head, *lines = [json.loads(line) for line in data[:whole].splitlines()]
            there = head["settings"]
            found = {line["id"]: line for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} is no file of records ({error}); delete it, or give another --out") from error
        if there != json.loads(json.dumps(settings)):
            name = next(name for name in {**there, **settings} if there.get(name) != settings.get(name))
            raise UserError(
                f"{file} holds answers with {name} {there.get(name)!r}, and now it is {settings.get(name)!r}; delete "
                "the file, or give another --out"
            )
        return found

    @contextmanager
    def appending(self, task: str) -> Iterator[RecordWriter]:
        with open(self.path / f"{task}.jsonl", "a", encoding="utf-8") as stream:
            yield RecordWriter(stream)

    def finish(self, task: str, settings: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
        """Write the figures of a task into results.json and return them."""
        results = _read_json(self.path / RESULTS) or {}
        results[task] = summary = summarise(settings, records)
        _write(self.path / RESULTS, results)
        return summary


class RecordWriter:
    """Appends records; each is on its way to the disk when the next comes."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __call__(self, record: Record) -> None:
        self._stream.write(_line(record))
        self._stream.flush()


def summarise(settings: Mapping[str, Any], records: Sequence[Record]) -> dict[str, Any]:
    """Return {"settings", "num_items", "figures", "groups", "flags"}, JSON values: nan is None."""
    groups = sorted({record["group"] for record in records} - {""})
    flags = [flag for record in records for flag in record["flags"]]
    return {
        "settings": dict(settings),
        "num_items": len(records),
        "figures": _figures(records),
        "groups": {group: _figures([record for record in records if record["group"] == group]) for group in groups},
        "flags": {flag: flags.count(flag) for flag in sorted(set(flags))},
    }


def read_results(folder: Path) -> dict[str, Any]:
    """Return what results.json holds. Raises UserError if there is none."""
    results = _read_json(folder / RESULTS)
    if results is None:
        raise UserError(f"{folder} holds no {RESULTS}; evaluate tasks first")
    return results


def read_scores(folder: Path, task: str) -> dict[str, Record]:
    """Return the records of a task by item id."""
    with open(folder / f"{task}.jsonl", encoding="utf-8") as stream:
        next(stream)
        return {record["id"]: record for record in map(json.loads, stream)}


def _figures(records: Sequence[Record]) -> dict[str, Any]:
    return {
        name: {key: _finite(value) for key, value in dataclasses.asdict(figure).items()}
        for name, figure in figures_of(records).items()
    }


def _finite(value: float | None) -> float | None:
    return None if value is None or value != value else value


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n"


def _read_json(file: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise UserError(f"{file} cannot be read: {error}; delete it, or give another --out") from error
    return value if isinstance(value, dict) else {}


def _write(file: Path, value: Mapping[str, Any]) -> None:
    """Replace the file whole, so that an interruption leaves the old or the new one."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
    os.replace(part, file)
