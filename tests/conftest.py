"""Fixtures shared by all tests."""

from pathlib import Path

import pytest

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora, models and tokenizer vectors; it lies beside the checkout and is never part of it."""
    if not _SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout: tests on real text are skipped")
    return _SHARED_DATA
