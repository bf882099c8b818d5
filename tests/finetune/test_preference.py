"""Direct preference optimization: the formula, the reference, and pairs of the world."""

import gzip
import itertools
import json
import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from warploom.data.chat import ChatTemplate, EncodedChat
from warploom.errors import UserError
from warploom.finetune.data import ExampleData
from warploom.finetune.preference import PreferenceLoss, pair_log_probs, set_reference
from warploom.finetune.rows import read_pairs
from warploom.finetune.run import finetune
from warploom.models.config import TransformerConfig
from warploom.models.transformer import Transformer
from warploom.optim import OptimizerConfig
from warploom.train.batches import inputs_to
from warploom.train.load_model import load_model


def small_model(seed):
    torch.manual_seed(seed)
    return Transformer(TransformerConfig(vocab_size=20, d_model=16, num_layers=2, num_heads=2, max_seq_len=32))


def make_data(count=12):
    chance = torch.Generator().manual_seed(0)

    def side(prompt):
        length = int(torch.randint(1, 5, (), generator=chance))
        answer = torch.randint(1, 20, (length,), generator=chance).tolist()
        return EncodedChat([0, *prompt, *answer], [False] * (1 + len(prompt)) + [True] * length)

    prompts = torch.randint(1, 20, (count, 3), generator=chance).tolist()
    units = [(side(prompt), side(prompt)) for prompt in prompts]
    return ExampleData(units, seq_len=32, seed=0, heldout_fraction=0.3, packing=True, token_bytes=None)


def direct_log_prob(model, example):
    """Of one example alone, without packing."""
    log_probs = F.log_softmax(model.logits(model(torch.tensor([example.ids[:-1]]))).float(), -1)[0]
    return sum(log_probs[at - 1, example.ids[at]] for at, answer in enumerate(example.is_answer) if answer)


def test_loss_and_gradient_are_those_of_the_paper(tmp_path):
    base, model, data = small_model(0), small_model(1), make_data()
    assert set_reference(base, data, tmp_path / "reference.safetensors", "base", 2)
    batch = next(data.train_batches(2))
    PreferenceLoss(model, 0.3)(**inputs_to(batch, torch.device("cpu"))).backward()
    found = [p.grad for p in model.parameters()]
    value = PreferenceLoss(model, 0.3)(**inputs_to(batch, torch.device("cpu")))

    order = [unit for row in data.row_order(0)[:2] for unit in data.train.rows[row]]
    assert batch.num_losses == len(order)
    expected = 0.0
    for unit in order:
        chosen, rejected = data.train.units[unit]
        with torch.no_grad():
            reference = direct_log_prob(base, chosen) - direct_log_prob(base, rejected)
        gained = direct_log_prob(model, chosen) - direct_log_prob(model, rejected) - reference
        expected = expected - F.logsigmoid(0.3 * gained)
    torch.testing.assert_close(value, expected)
    model.zero_grad()
    expected.backward()
    torch.testing.assert_close(found, [p.grad for p in model.parameters()], rtol=1e-3, atol=1e-5)


def test_the_reference_is_computed_once_for_one_base_and_data(tmp_path):
    base, data, path = small_model(0), make_data(), tmp_path / "reference.safetensors"
    assert set_reference(base, data, path, "one", 2)
    first = data.train.reference
    again = make_data()
    assert not set_reference(small_model(1), again, path, "one", 4)  # read, not computed with this other model
    assert (again.train.reference == first).all()
    assert set_reference(base, again, path, "two", 4)
    torch.testing.assert_close(again.train.reference, first)  # whatever the batch
    assert set_reference(base, make_data(13), path, "two", 4)


def test_a_model_that_is_its_base_has_a_loss_of_ln_2(tmp_path):
    model, data = small_model(0), make_data()
    set_reference(model, data, tmp_path / "reference.safetensors", "base", 2)
    batch = next(data.train_batches(1))
    loss = PreferenceLoss(model, 0.1)(**inputs_to(batch, torch.device("cpu")))
    assert loss.item() / batch.num_losses == pytest.approx(math.log(2), abs=1e-5)


def test_preferences_are_learned(base, pairs, short):
    done = finetune(base, [pairs], None, short(steps=30), OptimizerConfig(name="adamw", lr=3e-3, weight_decay=0.0))
    assert done.accuracy > 0.9 and done.result.heldout_loss < 0.5 < math.log(2)
    assert done.forgetting is not None and "preference" in done.report.read_text(encoding="utf-8")
    assert load_model(done.result.checkpoint).chat_template is not None


def test_pairs_of_the_world(base, shared_data, tmp_path):
    """hh-rlhf's file, whose prompts stand inside both sides: their common beginning is no answer of either."""
    source = shared_data / "posttrain" / "hh-rlhf_harmless-base_test.jsonl.gz"
    with gzip.open(source, "rt", encoding="utf-8") as lines:
        rows = list(itertools.islice(lines, 200))
    file = tmp_path / "hh.jsonl"
    file.write_text("".join(rows), encoding="utf-8")
    tokenizer, counts = load_model(base).tokenizer, Counter()
    template = ChatTemplate.named("turns")
    found = read_pairs([file], tokenizer, template, on_bad_line="skip", counts=counts)
    assert len(found) + counts.total() == 200 and len(found) > 180
    for chosen, rejected in found:
        first = chosen.is_answer.index(True)
        assert first == rejected.is_answer.index(True) and chosen.ids[:first] == rejected.ids[:first]
        assert tokenizer.decode(chosen.ids[:first]).endswith("### Assistant\n")
    row, (chosen, _) = json.loads(rows[0]), found[0]
    answer = tokenizer.decode([i for i, is_answer in zip(chosen.ids, chosen.is_answer, strict=True) if is_answer])
    assert row["chosen"].endswith(answer.removesuffix("<|endoftext|>")) and "Human:" not in answer


def test_sides_that_are_the_same_are_refused(base, short, tmp_path):
    file = tmp_path / "same.jsonl"
    file.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "b"}) + "\n")
    with pytest.raises(UserError, match="do not part at an answer"):
        finetune(base, [file], None, short())


def test_log_probabilities_are_those_of_the_examples_alone():
    model, data = small_model(0), make_data()
    found = pair_log_probs(model, data, data.train, 3)
    for unit, values in zip(data.train.units, found, strict=True):
        expected = [direct_log_prob(model, side).item() for side in unit]
        assert values.tolist() == pytest.approx(expected, abs=1e-4)
