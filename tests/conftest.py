"""What all tests share: one thread unless a test asks for more, and the folder of real text."""

import os
from pathlib import Path

# The tensors of tests are small: one thread runs them faster than several, and does not fight what else runs. Set
# before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def malloc_stays_as_it_is(monkeypatch):
    """The trainer changes malloc for its whole process, which here is the process of all other tests too."""
    for user in ("trainer", "probe"):
        monkeypatch.setattr(f"warploom.train.{user}.keep_freed_memory", lambda: True)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora, models and tokenizer vectors; it lies beside the checkout and is never part of it."""
    if not _SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout: tests on real text are skipped")
    return _SHARED_DATA
