"""What all tests share: one thread unless a test asks for more, a small tokenized corpus, the folder of real text."""

import os
import random
from pathlib import Path

# The tensors of tests are small: one thread runs them faster than several, and does not fight what else runs. Set
# before torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

from warploom.data.shards import tokenize_corpus  # noqa: E402
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


@pytest.fixture(scope="session")
def tokens(tmp_path_factory):
    """The folder of a token data set: 40 documents of made-up sentences, vocabulary 300."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)
    words = [f"{a}{b}{c}" for a in ("st", "br", "m", "l") for b in "aeiou" for c in ("nd", "rt", "n", "lk")]
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        sentences = (" ".join(chance.choices(words[number % 8 :: 4], k=chance.randint(3, 12))) for _ in range(20))
        (text / f"{number:02d}.txt").write_text(". ".join(sentences))
    tokenize_corpus([str(text)], folder / "tokens", vocab_size=300, heldout_fraction=0.1, workers=1)
    return folder / "tokens"
