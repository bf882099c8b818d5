"""datatrove's CPU seconds for the stages that bench.curate times: run by an interpreter that has datatrove, and need
not have warploom.

    python bench/curate_peer.py texts.json 3        # a list of texts, rounds; prints {stage: seconds} as JSON
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashDedupSignature
from datatrove.pipeline.filters import (
    C4QualityFilter,
    FineWebQualityFilter,
    GopherQualityFilter,
    GopherRepetitionFilter,
)
from datatrove.pipeline.formatters import PIIFormatter


def filter_chain(texts: list[str]) -> Callable[[], None]:
    filters = [
        GopherRepetitionFilter(),
        GopherQualityFilter(),
        C4QualityFilter(filter_no_terminal_punct=False),
        FineWebQualityFilter(),
    ]

    def call() -> None:
        # Each filter sees every document, as ours do: what one drops must not spare the next its work.
        for i, text in enumerate(texts):
            document = Document(text=text, id=str(i))
            for one in filters:
                one.filter(document)

    return call


def minhash(texts: list[str], folder: str) -> Callable[[], None]:
    def call() -> None:
        signatures = MinhashDedupSignature(output_folder=folder)
        signatures.run((Document(text=text, id=str(i)) for i, text in enumerate(texts)), 0, 1)

    return call


def redaction(texts: list[str]) -> Callable[[], None]:
    formatter = PIIFormatter()

    def call() -> None:
        for text in texts:
            formatter.format(text)

    return call


def cpu_s(call: Callable[[], object], rounds: int) -> float:
    """Median of all threads of this process; what is loaded once is in the first round alone."""
    samples = []
    for _ in range(rounds):
        started = time.process_time()
        call()
        samples.append(time.process_time() - started)
    return statistics.median(samples)


def main() -> None:
    texts, rounds = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(sys.argv[2])
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        calls = {
            "filter chain": filter_chain(texts),
            "minhash signatures": minhash(texts, folder),
            "redaction scan": redaction(texts),
        }
        seconds = {name: cpu_s(call, rounds) for name, call in calls.items()}
    print(json.dumps({"version": version("datatrove"), "seconds": seconds}))


if __name__ == "__main__":
    main()
