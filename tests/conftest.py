"""What all tests share: one thread unless a test asks for more, and the folder of real text."""

import os
from pathlib import Path

# The tensors of tests are small: one thread runs them faster than several, and does not fight what else runs. Set
# before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from warploom.ops import _extension  # noqa: E402

_SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def memory_stays_as_it_is(monkeypatch):
    """The trainer changes the allocator of its whole process, which here is the process of all other tests too. The
    arena can be taken out again; where it is malloc that would be changed, it is not."""
    has_arena = _extension.why_missing("arena_install") is None
    if not has_arena:
        for user in ("trainer", "probe"):
            monkeypatch.setattr(f"warploom.train.{user}.keep_freed_memory", lambda: True)
    yield
    if has_arena:
        torch.ops.warploom_cpu.arena_uninstall()
        torch.ops.warploom_cpu.arena_give_back()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real corpora, models and tokenizer vectors; it lies beside the checkout and is never part of it."""
    if not _SHARED_DATA.is_dir():
        pytest.skip("no ../shared/data beside this checkout: tests on real text are skipped")
    return _SHARED_DATA
