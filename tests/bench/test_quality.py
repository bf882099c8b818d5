"""bench.quality: both sides are measured on the whole held-out text in the same unit, and the moment is found."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from bench.plain_char_model import IGNORE_INDEX, Characters, CharModel, CharTrainer, Recipe
from bench.quality import CPU, Point, Run, compare, first_at, halves, read_text, run_recipe, train_engine

from warploom.data.shards import tokenize_corpus
from warploom.evaluation.perplexity import text_windows
from warploom.models.config import TransformerConfig
from warploom.train.config import RunConfig, TrainConfig
from warploom.train.heldout import heldout_loss

TINY = Recipe(num_layers=1, num_heads=2, d_model=16, seq_len=8, batch_size=4, iterations=6, warmup=2)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Training and held-out text with characters of one, two and three bytes, and the tokens of the first."""
    text = "".join(f"Line {i}: caf\u00e9 {i * i} costs {i % 7} \u20ac, as it did {i} times.\n" for i in range(4000))
    train, heldout = halves(text)
    folder = tmp_path_factory.mktemp("quality")
    (folder / "train.txt").write_text(train, encoding="utf-8")
    (folder / "heldout.txt").write_text(heldout, encoding="utf-8")
    return train, heldout, folder, tokenize_corpus([folder / "train.txt"], folder / "data", vocab_size=300)


def test_the_last_tenth_is_held_out():
    assert halves("0123456789" * 3) == ("0123456789" * 2 + "0123456", "789")


def test_every_character_is_a_target_once(corpus):
    train, heldout, _, _ = corpus
    characters = Characters(train + heldout)
    windows = list(characters.windows(train, heldout, seq_len=13))
    targets = torch.cat([batch.targets.flatten() for batch in windows])
    targets = targets[targets != IGNORE_INDEX]
    assert "".join(characters.characters[i] for i in targets.tolist()) == heldout
    assert sum(batch.num_bytes for batch in windows) == len(heldout.encode())
    first = windows[0]
    assert characters.characters[first.tokens[0, 0]] == train[-1]
    assert torch.equal(first.tokens[0, 1:], first.targets[0, :-1])


def test_equal_probabilities_give_equal_bits_per_byte(corpus):
    """Both sides give each byte 3 bits; whether it is read in characters or in tokens must not matter."""
    train, heldout, folder, dataset = corpus
    characters = Characters(train + heldout)
    char_bytes = torch.tensor([len(character.encode()) for character in characters.characters])
    token_bytes = torch.from_numpy(dataset.tokenizer.token_bytes)

    def three_bits(bytes_of):
        def loss_sum(tokens, targets):
            return 3 * math.log(2) * bytes_of[targets[targets != IGNORE_INDEX]].sum()

        return loss_sum

    sides = (
        (three_bits(char_bytes), characters.windows(train, heldout, 64)),
        (three_bits(token_bytes), text_windows(dataset.tokenizer, [folder / "heldout.txt"], 64, 16)),
    )
    for loss_sum, windows in sides:
        found = heldout_loss(loss_sum, windows, CPU)
        assert found.num_bytes == len(heldout.encode())
        assert found.bits_per_byte == pytest.approx(3, rel=1e-5)


def test_the_quick_start_runs_and_learns(corpus):
    train, heldout, _, _ = corpus
    recipe = dataclasses.replace(TINY, iterations=60)
    run = run_recipe(train, heldout, recipe, evaluations=3)
    assert [point.step for point in run.curve] == [20, 40, 60]
    times = [point.train_s for point in run.curve]
    assert 0 < times[0] < times[1] < times[2]
    uniform = math.log2(len(set(train + heldout)))
    assert run.curve[-1].bits_per_byte < run.curve[0].bits_per_byte < uniform


def test_the_quick_starts_schedule():
    recipe = Recipe()
    assert recipe.lr_at(0) == pytest.approx(1e-3 / 101)
    assert recipe.lr_at(100) == pytest.approx(1e-3)
    assert recipe.lr_at(1050) == pytest.approx(5.5e-4)
    assert recipe.lr_at(2000) == pytest.approx(1e-4)


def test_the_quick_starts_model_is_the_published_one():
    """0.80 million parameters with 65 characters, and no character sees a later one."""
    torch.manual_seed(0)
    model = CharModel(65, Recipe())
    assert sum(p.numel() for p in model.parameters()) - model.position.weight.numel() == 795_904
    tokens = torch.randint(65, (2, 64))
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % 65
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :40], after[:, :40])
    assert not torch.allclose(before[:, 40:], after[:, 40:])


def test_weight_decay_is_for_matrices(corpus):
    train, heldout, _, _ = corpus
    trainer = CharTrainer(train, Characters(train + heldout), TINY)
    for group in trainer._optimizer.param_groups:
        assert {p.dim() >= 2 for p in group["params"]} == {group["weight_decay"] > 0}


def test_the_engine_is_measured_on_the_same_held_out_text(corpus, tmp_path):
    """Its own evaluations come from this text, at the steps asked for, and the time is that of its steps."""
    train, heldout, folder, dataset = corpus
    config = RunConfig(
        TransformerConfig(vocab_size=300, max_seq_len=32, d_model=16, num_layers=1, num_heads=2),
        TrainConfig(out_dir=tmp_path, steps=6, seq_len=32, global_batch_size=4, micro_batch_size=4, device="cpu"),
    )
    run = train_engine(config, dataset, folder / "heldout.txt", evaluations=3)
    assert [point.step for point in run.curve] == [2, 4, 6]
    times = [point.train_s for point in run.curve]
    assert 0 < times[0] < times[1] < times[2]
    assert run.curve[-1].bits_per_byte < run.curve[0].bits_per_byte
    # Random weights spread each token's bits over its bytes.
    tokens = len(dataset.tokenizer.encode(heldout))
    assert run.curve[0].bits_per_byte == pytest.approx(math.log2(300) * tokens / len(heldout.encode()), rel=0.1)


def test_the_moment_is_the_first_evaluation_at_the_target():
    curve = (Point(1, 1.0, 3.0), Point(2, 2.0, 2.5), Point(3, 3.0, 2.6), Point(4, 4.0, 2.0))
    assert first_at(curve, 2.5) == curve[1]
    assert first_at(curve, 2.2) == curve[3]
    assert first_at(curve, 1.9) is None


def test_the_comparison():
    recipe = Run((Point(1000, 20.0, 3.0), Point(2000, 40.0, 2.5)), 1.0, 10, 8, "")
    engine = Run((Point(10, 2.0, 2.7), Point(20, 4.0, 2.4), Point(30, 6.0, 2.2)), 6.0, 10, 8, "")
    start, reached, end = compare(recipe, engine)
    assert (start["ratio"], reached["ratio"]) == (1.0, 10.0)
    assert reached["step"] == 20 and reached["ratio_with_preparation"] == pytest.approx(4.1)
    assert end["train_s"] == 6.0
    never = compare(recipe, dataclasses.replace(engine, curve=engine.curve[:1]))
    assert [record["ratio"] for record in never] == [1.0, None]


def test_without_a_path_the_text_is_that_of_the_standard_library():
    text, name = read_text(None)
    assert 300_000 < len(text) < 5_000_000 and "standard library" in name
