"""From flags and a TOML file to a verb's dataclass. The dataclass is the one source of truth: names, defaults, help.

A TOML file and a preset are rewritten as flags and put before those of the command line, where the last one wins. So
one parser checks all three, with the same messages and the same suggestions for a mistyped name.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from warploom.errors import UserError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

CommandT = TypeVar("CommandT")


def parse(command: type[CommandT], prog: str, argv: Sequence[str]) -> CommandT:
    """Build the command from argv; prints help or a message and exits 0 or 2 as argparse does.

    A command with a `config` field (a TOML file) takes that file's values first. A command with a static method
    `expand_preset(name) -> nested values` has those of its `preset` before that.
    """
    fields = {field.name for field in dataclasses.fields(command)}  # type: ignore[arg-type]
    flags: list[str] = []
    if "config" in fields:
        path = _last_value(argv, "--config")
        if path is not None:
            flags = list(as_flags(_read_toml(Path(path))))
    expand = getattr(command, "expand_preset", None)
    if expand is not None:
        name = _last_value([*flags, *argv], "--preset")
        if name is not None:
            flags = [*as_flags(expand(name)), *flags]
    return tyro.cli(command, prog=prog, args=[*flags, *argv])


def as_flags(values: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Rewrite nested values as flags: {"model": {"d_model": 64, "bias": False}} gives --model.d-model 64
    --model.no-bias."""
    for name, value in values.items():
        flag = name.replace("_", "-")
        if isinstance(value, Mapping):
            yield from as_flags(value, f"{prefix}{flag}.")
        elif isinstance(value, bool):
            yield f"--{prefix}{flag}" if value else f"--{prefix}no-{flag}"
        else:
            yield f"--{prefix}{flag}"
            yield from map(str, value) if isinstance(value, (list, tuple)) else (str(value),)


def _last_value(argv: Sequence[str], flag: str) -> str | None:
    value = None
    for index, word in enumerate(argv):
        if word == flag and index + 1 < len(argv):
            value = argv[index + 1]
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
    return value


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"the configuration file {path} does not exist; check the path after --config") from None
    except IsADirectoryError:
        raise UserError(f"{path} is a folder; --config takes a TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid TOML: {error}; mend that line") from None
