"""A notebook executed from a clean kernel, and what is kept of it."""

from __future__ import annotations

import copy
import hashlib
import os
import tempfile
from pathlib import Path
from unittest import mock

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from traitlets.config import Config

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = tuple(sorted((ROOT / "examples" / "notebooks").glob("*.ipynb")))

_METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
"""The same on every machine: versions and paths would change with each."""

# torchmetrics imports transformers if it is there, which warns in notebooks that have no widgets.
_QUIET = {"PYTHONWARNINGS": "ignore:IProgress not found"}

# Before anything else imports it. About one key in fifty lets the closed form read a picture less well.
_SEEDED = """
import torch
from fedkl import keys
keys.secure_uniform = keys.imitated_uniform(torch.Generator().manual_seed({seed}))
"""

_OWN = ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR")


def read(path: Path) -> NotebookNode:
    """A notebook as it lies there."""
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """In their order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def fingerprint(notebook: NotebookNode) -> str:
    """Of all code: stored outputs belong to code with theirs."""
    code = "\0".join(cell.source for cell in code_cells(notebook))
    return hashlib.sha256(code.encode()).hexdigest()


def executed(notebook: NotebookNode, *, folder: Path, seed: int | None = None) -> NotebookNode:
    """A copy with the outputs of a clean kernel.

    Args:
        notebook: Its stored outputs are not looked at.
        folder: Where the kernel works.
        seed: Of keys and lock layers; None: they come from the operating system, as for every user.

    Raises:
        nbclient.exceptions.CellExecutionError: A cell raised.
    """
    fresh = copy.deepcopy(notebook)
    for cell in code_cells(fresh):
        cell.outputs, cell.execution_count = [], None
    # Nothing of a user's configuration is read; the path is short, as those of sockets have to be.
    with tempfile.TemporaryDirectory(prefix="fedkl-") as own:
        if seed is not None:
            startup = Path(own, "profile_default", "startup")
            startup.mkdir(parents=True)
            (startup / "seeded.py").write_text(_SEEDED.format(seed=seed), encoding="utf-8")
        with mock.patch.dict(os.environ, dict.fromkeys(_OWN, own) | _QUIET):
            NotebookClient(
                fresh,
                config=Config(KernelManager={"transport": "ipc", "ip": f"{own}/kernel"}),
                kernel_name="python3",
                timeout=None,
                record_timing=False,
                coalesce_streams=True,
                resources={"metadata": {"path": str(folder)}},
            ).execute()
    fresh.metadata = NotebookNode(_METADATA | {"fedkl": {"executed": fingerprint(fresh)}})
    for cell in fresh.cells:
        cell.metadata = NotebookNode()
    return fresh
