"""Flags, TOML files and presets: one dataclass, one parser, one sentence for what is wrong."""

import pytest

from warploom.cli import main as main_module
from warploom.cli.flags import as_flags, parse
from warploom.cli.main import VERBS, main
from warploom.cli.train import Command
from warploom.errors import UserError
from warploom.models.presets import preset


def train_command(*argv):
    return parse(Command, "warploom train", argv)


def test_defaults_come_from_the_dataclasses():
    assert train_command() == Command()


def test_a_flag_wins_over_the_file_and_the_file_over_the_preset(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('preset = "tiny"\n[model]\nd_ff = 100\nbias = true\n[optimizer]\nbetas = [0.8, 0.9]\nlr = 0.5\n')
    command = train_command("--config", str(file), "--optimizer.lr", "0.25")
    assert command.model.d_model == preset("tiny").d_model
    assert (command.model.d_ff, command.model.bias) == (100, True)
    assert command.optimizer.betas == (0.8, 0.9) and command.optimizer.lr == 0.25


def test_values_of_a_file_become_flags():
    values = {"a": {"b_c": 1, "on": True, "off": False}, "list": [1, 2]}
    assert list(as_flags(values)) == ["--a.b-c", "1", "--a.on", "--a.no-off", "--list", "1", "2"]


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["trian"], ["'trian'", "did you mean 'train'?"]),
        (["train", "--preset", "gpt3"], ["'gpt3'", "'gpt3-175b'"]),
        (["train", "--model.num-heads", "7", "--dry-run"], ["num_heads 7", "d_model 384"]),
        (["train", "--budget", "soon"], ["'soon'", "10m"]),
        (["train", "--budget", "10m", "--preset", "tiny"], ["budget 10m", "preset tiny", "leave one"]),
        (["train", "--config", "no/such.toml"], ["no/such.toml does not exist"]),
        (["train", "--data", "no/such/text.txt"], ["no/such/text.txt"]),
        (["sample", "no/such/run"], ["no checkpoint at no/such/run"]),
        (["sample", "x", "--temperature", "2.5"], ["temperature is 2.5", "between 0"]),
        (["eval", "no/such/run"], ["no checkpoint at no/such/run"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_code_2(argv, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    output = capsys.readouterr()
    lines = output.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("warploom: ")
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("argv", "suggestion"),
    [(["--model.d-modl", "3"], "--model.d-model"), (["--optimizer.leraning-rate", "3"], "Unrecognized")],
)
def test_unknown_flags_suggest_the_nearest(argv, suggestion, capsys):
    with pytest.raises(SystemExit) as exit_:
        train_command(*argv)
    assert exit_.value.code == 2
    assert suggestion in capsys.readouterr().err


def test_unknown_keys_of_a_file_suggest_the_nearest(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("[train]\nsave_evry = 3\n")
    with pytest.raises(SystemExit) as exit_:
        train_command("--config", str(file))
    assert exit_.value.code == 2
    assert "--train.save-every" in capsys.readouterr().err


def test_a_file_that_is_no_toml_is_refused_with_its_line(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text("[train\n")
    with pytest.raises(UserError, match="not valid TOML.*line 1"):
        train_command("--config", str(file))


def test_help_names_every_verb_and_flags_carry_their_help(capsys):
    assert main(["--help"]) == 0
    usage = capsys.readouterr().out
    assert all(verb in usage for verb in VERBS)
    with pytest.raises(SystemExit) as exit_:
        train_command("--help")
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
    for flag, meaning in (("--train.patience", "Stop after this many evaluations"), ("--model.d-ff", "4 * d_model")):
        assert flag in text and meaning in text


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_is_a_file_with_a_command(verb, capsys):
    with pytest.raises(SystemExit) as exit_:
        main_module.main([verb, "--help"])
    assert exit_.value.code == 0
    assert "usage: warploom " + verb in capsys.readouterr().out


def test_dry_run_prints_the_cost_and_touches_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--dry-run", "--preset", "gpt2"]) == 0
    out = capsys.readouterr().out
    assert "124,439,808" in out and "FLOPs per token" in out and "memory" in out and "num_heads = 12" in out
    assert list(tmp_path.iterdir()) == []
