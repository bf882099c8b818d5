"""A pipeline file over a few documents of the test's own, run in this process."""

import json

import pytest

from warploom.curate.segments import read_jsonl
from warploom.curate.workers import run_pipeline


@pytest.fixture
def write_documents(tmp_path):
    """Write texts, or (text, url) pairs, to a .jsonl file and return its path."""

    def write(name, documents):
        path = tmp_path / name
        rows = [d if isinstance(d, tuple) else (d, "") for d in documents]
        path.write_text("".join(json.dumps({"text": text, "url": url}) + "\n" for text, url in rows), encoding="utf-8")
        return path

    return write


@pytest.fixture
def curate(tmp_path):
    """Run a pipeline given as TOML and return the Run."""

    def run(toml, out="out", **options):
        file = tmp_path / "pipeline.toml"
        file.write_text(toml, encoding="utf-8")
        return run_pipeline(file, tmp_path / out, options.pop("workers", "inline"), **options)

    return run


@pytest.fixture
def rows_of():
    """All documents a run has written to one of its folders, by id."""

    def rows(run, side):
        files = sorted((run.folder / side).glob("*.jsonl.zst"))
        return [row for file in files for row in read_jsonl(file)]

    return rows
