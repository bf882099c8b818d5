"""Windows of text: what begins them and which tokens count."""

import pytest

from warploom.data.loader import IGNORE_INDEX
from warploom.data.tokenizer import Tokenizer
from warploom.evaluation.perplexity import text_windows


@pytest.mark.parametrize("begin", [None, [], [5], [5, 6]])
def test_a_text_begins_as_its_tokenizer_says(tokenizer, tmp_path, begin):
    """<|endoftext|> for models trained here, the begin tokens of an imported one, and the end of another text for one
    that begins without; what is given is never a target, what follows always is."""
    (tmp_path / "a.txt").write_text("what is the sun?")
    if begin is not None:
        tokenizer = Tokenizer.adopt(tokenizer.library_json().decode(), eos_id=tokenizer.eos_id, begin_ids=begin)
    ids = tokenizer.encode("what is the sun?")
    for seq_len in (4, 100):
        windows = list(text_windows(tokenizer, [tmp_path], seq_len, batch_size=100))
        tokens = [token for row in windows[0].tokens.tolist() for token in row]
        targets = [token for row in windows[0].targets.tolist() for token in row if token != IGNORE_INDEX]
        first = begin or [tokenizer.eos_id]
        assert tokens[: len(first) + 1] == [*first, ids[0]]
        assert targets == [*ids, tokenizer.eos_id]
        assert windows[0].num_bytes == 16
