"""Libraries of the extra `curate`, imported where they are used: the engine itself trains without them."""

from __future__ import annotations

from types import ModuleType

from warploom import errors


def optional(module: str, extra: str = "curate") -> ModuleType:
    """Import a library, or raise UserError naming the extra that installs it."""
    return errors.optional(module, extra)
