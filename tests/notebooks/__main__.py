"""Executes the notebooks and stores their outputs: ``python -m tests.notebooks [NAME …]``."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import nbformat

from tests.notebooks.executing import NOTEBOOKS, executed, read


def main(names: list[str]) -> None:
    """Stores all notebooks, or those with these names."""
    unknown = set(names) - {path.stem for path in NOTEBOOKS}
    if unknown:
        sys.exit(f"No such notebook: {', '.join(sorted(unknown))}. There are {_listed()}.")
    for path in NOTEBOOKS:
        if names and path.stem not in names:
            continue
        with tempfile.TemporaryDirectory() as folder:
            nbformat.write(executed(read(path), folder=Path(folder)), path)
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def _listed() -> str:
    return ", ".join(path.stem for path in NOTEBOOKS)


if __name__ == "__main__":
    main(sys.argv[1:])
