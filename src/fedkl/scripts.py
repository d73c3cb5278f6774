"""A Python file of the user's, run as a module: a plug-in, or the target of an audit."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType


def find_modules_in(folder: Path) -> None:
    """As `python file.py` does. It stays so: a model may import modules when it is built."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


def spec_of(path: Path, *, role: str) -> ModuleSpec | None:
    """Under which name a file is run, or None where it is no Python file.

    Args:
        path: The file.
        role: What it is, a word of the name: another file may be called the same, or an installed module.
    """
    place = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]
    spec = importlib.util.spec_from_file_location(f"fedkl_{role}_{path.stem}_{place}", path)
    return None if spec is None or spec.loader is None else spec


def run(spec: ModuleSpec) -> ModuleType:
    """Runs the file, which may import its neighbors; whatever it raises goes through."""
    assert spec.loader is not None  # noqa: S101 (as `spec_of` gives it)
    assert spec.origin is not None  # noqa: S101
    find_modules_in(Path(spec.origin).resolve().parent)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
