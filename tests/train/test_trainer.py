"""The trainer: it learns, evaluates, stops, skips and saves as it should."""

import errno
import itertools
import math

import pytest
import torch
from tests.train.toy import Log, ToyBatch, ToyData, counting, fit_poisoned, ragged, reversing, toy_config, toy_model

from warploom.checkpoint import FolderLock, list_checkpoints, load_checkpoint, save
from warploom.data.shards import TokenDataset, tokenize_corpus
from warploom.errors import UserError
from warploom.optim import lr_multiplier
from warploom.train.budget import Deadline
from warploom.train.trainer import Trainer


def fit(config, data=None, monitor=None, **arguments):
    trainer = Trainer(toy_model(config), data or ToyData(counting), config, monitor=monitor, **arguments)
    return trainer.fit(), trainer


def weights_of(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def is_equal(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("name", "dtype"), [("adamw", "fp32"), ("muon", "bf16")])
def test_the_loss_falls_on_real_text(tmp_path, shared_data, name, dtype):
    data = tokenize_corpus([shared_data / "corpora/tinyshakespeare.txt"], tmp_path / "tokens", vocab_size=512)
    config = toy_config(
        tmp_path / "run",
        vocab_size=512,
        model={"d_model": 64, "num_heads": 4, "max_seq_len": 64, "dropout": 0.0},
        optimizer={"name": name, "lr": 4e-3, "muon_lr": 1e-2},
        steps=60,
        seq_len=64,
        global_batch_size=16,
        micro_batch_size=16,
        eval_every=30,
        eval_tokens=8192,
        dtype=dtype,
    )
    log = Log()
    result, _ = fit(config, data=data, monitor=log)
    assert log.steps[0].loss == pytest.approx(math.log(512), abs=0.2)
    assert log.evaluations[0].heldout_loss > result.heldout_loss + 0.1
    assert result.heldout_loss < 4.6  # the frequencies of single tokens alone give about 5.4
    assert 2.0 < result.bits_per_byte < 3.6


def test_records_say_what_happened(tmp_path):
    log = Log()
    config = toy_config(tmp_path, steps=10, eval_every=4, optimizer={"lr": 2e-3})
    result, trainer = fit(config, monitor=log)
    assert (log.info.steps, log.info.start_step, log.info.tokens_per_step) == (10, 0, 128)
    assert log.info.num_parameters == sum(p.numel() for p in trainer.model.parameters())
    assert log.info.matmul_flops > 1e8 and log.info.dtype == "float32"
    assert [record.step for record in log.steps] == list(range(1, 11))
    assert [record.tokens for record in log.steps] == [128 * step for step in range(1, 11)]
    assert [record.lr for record in log.steps] == [2e-3 * lr_multiplier(config.schedule, i, 10) for i in range(10)]
    assert [record.epoch for record in log.steps] == [step * 8 / 64 for step in range(1, 11)]
    assert all(0 < record.mfu_measured and record.grad_norm > 0 and not record.skipped for record in log.steps)
    assert all(r.tokens_per_s == pytest.approx(128 / r.step_s) and r.memory_bytes > 1e7 for r in log.steps)
    assert [record.step for record in log.evaluations] == [4, 8, 10]
    means = [sum(r.loss for r in log.steps[a:b]) / (b - a) for a, b in ((0, 4), (4, 8), (8, 10))]
    assert [record.train_loss for record in log.evaluations] == pytest.approx(means)
    assert result.heldout_loss == log.evaluations[-1].heldout_loss
    assert result.bits_per_byte == pytest.approx(result.heldout_loss / math.log(2) / 2)  # two bytes per token
    assert log.results == [result] and log.is_closed and result.tokens == 1280


def test_the_heldout_loss_is_the_mean_over_all_heldout_targets(tmp_path):
    data = ToyData(ragged, num_heldout=3)
    result, trainer = fit(toy_config(tmp_path, steps=2), data=data)
    model = trainer.model.eval()
    batches = data.heldout_batches(4)
    whole = ToyBatch(*(torch.cat([getattr(b, name) for b in batches]) for name in ("tokens", "targets")))
    with torch.no_grad():
        assert result.heldout_loss == pytest.approx(model.loss(whole.tokens, whole.targets).item(), rel=1e-5)
    assert math.isnan(result.bits_per_byte)


def test_evaluation_changes_nothing_about_training(tmp_path):
    _, often = fit(toy_config(tmp_path / "often", eval_every=2, log_every=5), monitor=Log())
    _, once = fit(toy_config(tmp_path / "once", eval_every=100))
    assert is_equal(weights_of(often), weights_of(once))


def test_a_seed_decides_the_run(tmp_path, tokens):
    data = TokenDataset(tokens)

    def weights(name, seed):
        config = toy_config(tmp_path / name, vocab_size=data.tokenizer.vocab_size, steps=3, seed=seed)
        return weights_of(fit(config, data=data)[1])

    assert is_equal(weights("a", 7), weights("b", 7))
    assert not is_equal(weights("c", 7), weights("d", 8))


def test_the_split_into_micro_batches_does_not_change_the_model(tmp_path, tokens):
    data = TokenDataset(tokens)
    found = []
    for size in (1, 2, 8):
        config = toy_config(
            tmp_path / str(size),
            vocab_size=data.tokenizer.vocab_size,
            model={"dropout": 0.0},
            steps=4,
            micro_batch_size=size,
        )
        found.append(weights_of(fit(config, data=data)[1]))
    for other in found[:-1]:
        for name, tensor in found[-1].items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-5)


def test_gradient_checkpointing_gives_the_same_bits(tmp_path):
    config = toy_config(tmp_path / "plain", steps=4)
    _, plain = fit(config)
    checkpointed_config = toy_config(tmp_path / "checkpointed", steps=4, grad_checkpointing="blocks")
    calls = []
    model = toy_model(checkpointed_config)
    model.stack.blocks[0].register_forward_pre_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    Trainer(model, ToyData(counting), checkpointed_config).fit()
    assert is_equal(weights_of(plain), model.state_dict())
    assert sum(calls) == 2 * 4 * 2  # each of 4 steps has 2 micro batches, and each forward pass runs twice


def test_an_encoder_decoder_learns_a_toy_translation(tmp_path):
    config = toy_config(
        tmp_path,
        model={"architecture": "encoder-decoder", "position": "learned", "dropout": 0.0, "d_model": 64},
        optimizer={"name": "muon", "lr": 5e-3, "muon_lr": 2e-2},
        steps=150,
        global_batch_size=32,
        micro_batch_size=32,
        eval_every=75,
        save_every=1000,
        keep_best=0,
    )
    result, trainer = fit(config, data=ToyData(reversing))
    assert result.heldout_loss < 0.5 * math.log(28)
    batch = reversing(64, torch.Generator().manual_seed(9))
    model = trainer.model.eval()
    with torch.no_grad():
        hidden = model(batch.tokens, source=batch.source, source_lengths=batch.source_lengths)
        shuffled = model(batch.tokens, source=batch.source.roll(1, 0), source_lengths=batch.source_lengths)
        right, wrong = ((model.logits(h).argmax(-1) == batch.targets).float().mean() for h in (hidden, shuffled))
    assert right > 0.6 and wrong < 0.3  # it reads the source


def test_a_step_that_is_not_finite_is_skipped_counted_and_stops_the_schedule(tmp_path):
    log = Log()
    result, weights, trainer = fit_poisoned(toy_config(tmp_path, steps=8), [3, 4, 6], log)
    assert result.steps == 8 and result.skipped_steps == 3
    assert [record.step for record in log.steps if record.skipped] == [3, 4, 6]
    unmoved = [step for step in range(1, 8) if is_equal(weights[step - 1], weights[step])]
    assert unmoved == [3, 4, 6]
    schedule = trainer.config.schedule
    updates = [0, 1, 2, 2, 2, 3, 3, 4]
    assert [record.lr for record in log.steps] == [3e-3 * lr_multiplier(schedule, u, 8) for u in updates]
    assert math.isfinite(result.heldout_loss) and math.isnan(log.steps[2].loss)


def test_three_in_a_row_stop_the_run_and_name_the_last_checkpoint(tmp_path):
    config = toy_config(tmp_path, steps=12, save_every=2, keep_best=0, max_rewinds=0)
    log = Log()
    error, weights, _ = fit_poisoned(config, [6, 7, 8], log)
    assert isinstance(error, UserError)
    assert "3 steps in a row were skipped, and the last of them, 8, was not finite" in str(error)
    assert "step-00000006" in str(error)
    assert len(weights) == 8 and is_equal(weights[5], weights[7]) and log.is_closed
    assert is_equal(load_checkpoint(tmp_path / "step-00000006").weights, weights[5])


def test_three_in_a_row_go_back_to_the_checkpoint_before_and_leave_out_their_data(tmp_path):
    config = toy_config(tmp_path, steps=12, save_every=4, keep_best=0)
    log = Log()
    result, weights, trainer = fit_poisoned(config, [6, 7, 8], log)
    assert result.steps == 12 and trainer.progress.rewinds == 1
    # Step 9 begins with the weights that step 5 began with, step 5's update undone, on the 9th batch.
    assert is_equal(weights[8], weights[4]) and not is_equal(weights[5], weights[4])
    assert any("taking the weights of step-00000004" in text for text in log.messages)
    # Updates 1 to 4, then from the 9th batch on, and the schedule with them: 4 + 4 of 12.
    assert result.skipped_steps == 4
    rates = [3e-3 * lr_multiplier(trainer.config.schedule, u, 12) for u in (0, 1, 2, 3, 4, 5, 5, 5, 4, 5, 6, 7)]
    assert [record.lr for record in log.steps] == rates
    assert [(skip.step, skip.num_sequences, skip.position) for skip in log.skips] == [
        (step, 8, {"position": 2 * (step - 1)}) for step in (6, 7, 8)
    ]


def test_rewinds_go_back_further_each_time_and_end(tmp_path):
    config = toy_config(tmp_path, steps=40, save_every=2, keep_best=0, keep_last=3, max_rewinds=2)
    log = Log()
    error, _, _ = fit_poisoned(config, range(7, 40), log)
    taken = [text.split("weights of ")[1][:13] for text in log.messages if "weights of" in text]
    assert isinstance(error, UserError) and "after 2 returns" in str(error)
    # Step 8 was saved among bad ones, with the weights of step 6; the second return passes it over.
    assert taken == ["step-00000006", "step-00000006"]


def test_a_run_that_never_was_finite_says_that_there_is_no_checkpoint(tmp_path):
    error, *_ = fit_poisoned(toy_config(tmp_path), [1, 2, 3])
    assert "no checkpoint yet" in str(error)


def test_early_stopping_keeps_the_best_checkpoint(tmp_path):
    # Labels that are noise: the training loss falls by heart, the held-out loss cannot.
    def noise(batch_size, generator):
        return ToyBatch(*torch.randint(29, (2, batch_size, 16), generator=generator))

    class Few(ToyData):
        def train_batches(self, micro_batch_size):
            stream = super().train_batches(micro_batch_size)
            batches = itertools.cycle([next(stream) for _ in range(2)])
            stream.make_batch = lambda *_: next(batches)
            return stream

    log = Log()
    config = toy_config(
        tmp_path, steps=300, eval_every=4, patience=3, keep_last=1, save_every=1000, optimizer={"lr": 1e-2}
    )
    result, trainer = fit(config, data=Few(noise), monitor=log)
    losses = [record.heldout_loss for record in log.evaluations]
    best = losses.index(min(losses))
    assert result.steps < 300 and len(losses) == best + 1 + 3
    assert result.stopped_because == "the held-out loss was no better for 3 evaluations"
    assert result.best_heldout_loss == losses[best] < losses[-1] == result.heldout_loss
    assert result.best_checkpoint == tmp_path / f"step-{log.evaluations[best].step:08d}"
    assert load_checkpoint(result.best_checkpoint).heldout_loss == result.best_heldout_loss
    assert result.checkpoint == list_checkpoints(tmp_path)[0] != result.best_checkpoint
    assert len(list_checkpoints(tmp_path)) == 2
    assert any(warning.startswith("Overfitting") for warning in result.warnings)
    assert set(result.warnings) <= set(log.messages)


def test_epochs_give_the_number_of_steps(tmp_path):
    assert fit(toy_config(tmp_path / "a", steps=None, epochs=1.5))[0].steps == 12
    assert fit(toy_config(tmp_path / "b", steps=None))[0].steps == 8


def test_the_micro_batch_is_found_and_kept_when_the_run_goes_on(tmp_path, monkeypatch):
    log = Log()
    fit(toy_config(tmp_path, steps=2, micro_batch_size=0), monitor=log)
    assert "Memory holds micro batches of 8 sequences." in log.messages
    monkeypatch.setattr("warploom.train.trainer.find_micro_batch_size", None)
    _, resumed = fit(toy_config(tmp_path, steps=4, micro_batch_size=0))
    assert load_checkpoint(resumed.config.train.out_dir / "step-00000004").meta["progress"]["micro_batch_size"] == 8


def full_disk(monkeypatch, fails):
    """Let the writes of those saves, counted from 1, fail as on a full disk; return the list of failures."""
    true_write, true_mkdir = save._write, save._write_files
    count, failures = itertools.count(1), []
    state = {}

    def write_files(folder, checkpoint):
        state["save"] = next(count)
        return true_mkdir(folder, checkpoint)

    def write(fd, data):
        if state["save"] in fails:
            failures.append(state["save"])
            raise OSError(errno.ENOSPC, "No space left on device")
        return true_write(fd, data)

    monkeypatch.setattr(save, "_write_files", write_files)
    monkeypatch.setattr(save, "_write", write)
    return failures


def test_a_disk_full_in_between_leaves_the_last_checkpoint_and_the_run_goes_on(tmp_path, monkeypatch):
    failures = full_disk(monkeypatch, {2, 3})
    log = Log()
    kept = []
    log.message = lambda text: kept.append((text, [path.name for path in tmp_path.iterdir()]))
    config = toy_config(tmp_path, steps=12, save_every=3, keep_best=0, eval_every=100)
    result, _ = fit(config, monitor=log)
    assert failures == [2, 3]
    messages = [text for text, _ in kept if "could not be saved" in text]
    assert "No space left" in messages[0] and "step-00000003 is kept" in messages[0] and "goes on" in messages[0]
    assert len(messages) == 2 and all(".tmp" not in name for _, names in kept for name in names)
    assert result.checkpoint.name == "step-00000012" and result.steps == 12
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000012", "step-00000003"]


def test_a_disk_full_at_the_end_is_an_error_that_names_what_is_kept(tmp_path, monkeypatch):
    failures = full_disk(monkeypatch, {2})
    with pytest.raises(UserError, match="No space left.*step-00000003 is kept"):
        fit(toy_config(tmp_path, steps=6, save_every=3, keep_best=0, eval_every=100))
    assert failures == [2]
    assert load_checkpoint(list_checkpoints(tmp_path)[0]).step == 3


def test_one_folder_takes_one_trainer(tmp_path):
    config = toy_config(tmp_path, steps=1)
    with FolderLock(tmp_path), pytest.raises(UserError, match="in use by process"):
        fit(config)
    assert fit(config)[0].steps == 1


def test_a_deadline_moves_the_end_of_the_run(tmp_path, monkeypatch):
    clock = itertools.count(0.0, 0.5)  # two looks at the clock a second
    monkeypatch.setattr("warploom.train.trainer.time.monotonic", lambda: next(clock))
    log = Log()
    log.set_steps = lambda steps: log.messages.append(steps)
    deadline = Deadline(at=25.0, budget_s=25.0, reserve_s=5.0, step_s=0.5)
    result, trainer = fit(toy_config(tmp_path, steps=1000), monitor=log, deadline=deadline)
    assert 36 <= result.steps <= 40 and result.steps == log.messages[-1] and trainer.progress.num_steps == result.steps
    assert load_checkpoint(result.checkpoint).step == result.steps


def test_a_vocabulary_that_does_not_fit_the_tokens_is_refused(tmp_path, tokens):
    with pytest.raises(UserError, match="model.vocab_size is 29, and the tokenizer of .* has 300 tokens"):
        fit(toy_config(tmp_path), data=TokenDataset(tokens))


def test_a_gpu_out_of_memory_is_a_sentence(tmp_path, monkeypatch):
    def loss(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    log = Log()
    monkeypatch.setattr("warploom.train.trainer.training_step", loss)
    with pytest.raises(UserError, match="a micro batch of 4 sequences does not fit"):
        fit(toy_config(tmp_path), monitor=log)
    assert log.is_closed


def test_a_device_that_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="train.device is 'cuda', but PyTorch finds no CUDA device"):
        fit(toy_config(tmp_path, device="cuda"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in torch._dynamo and torch._inductor
def test_compiled_training_gives_the_same_losses(tmp_path):
    data = ToyData(counting, num_heldout=0)  # an evaluation would be compiled too
    logs = []
    for compile in (False, True):
        log = Log()
        config = toy_config(
            tmp_path / str(compile), steps=3, model={"dropout": 0.0, "num_layers": 1}, compile=compile, keep_best=0
        )
        fit(config, data=data, monitor=log)
        logs.append(log)
    plain, compiled = ([record.loss for record in log.steps] for log in logs)
    assert compiled == pytest.approx(plain, rel=1e-4)
