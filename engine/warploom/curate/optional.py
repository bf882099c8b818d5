"""Libraries of the extra `curate`, imported where they are used: the engine itself trains without them."""

from __future__ import annotations

import importlib
from types import ModuleType

from warploom.errors import UserError


def optional(module: str, extra: str = "curate") -> ModuleType:
    """Import a library, or raise UserError naming the extra that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"this needs {module.split('.')[0]}: pip install 'warploom[{extra}]' ({error})") from error
