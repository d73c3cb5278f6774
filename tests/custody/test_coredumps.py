"""Processes that open secrets leave no core file when they crash, whatever the shell allows."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

PATTERN = Path("/proc/sys/kernel/core_pattern")
RAISE = "import os, resource, sys\nhard = resource.getrlimit(resource.RLIMIT_CORE)[1]\n"
RAISE += "resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))\n"
LIMIT = "print(resource.getrlimit(resource.RLIMIT_CORE)[0], flush=True)\n"
COMMAND = """
from fedkl import cli
sys.argv = ["fedkl", "--version"]
try:
    cli.main()
except SystemExit:
    pass
"""
MOD = """
from fedkl.flower.node import node_store
node_store({"fedkl-store": "store"})
"""
pytestmark = pytest.mark.skipif(resource.getrlimit(resource.RLIMIT_CORE)[1] == 0, reason="none are allowed")


def crashed(folder, code, signal):
    """Files that are there after a process has run some code and crashed, and its limit before."""
    words = [sys.executable, "-c", f"{RAISE}{code}{LIMIT}os.kill(os.getpid(), {int(signal)})"]
    environment = {**os.environ, "FEDKL_PASSPHRASE": "horse"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == -signal, done.stderr
    return [path.name for path in folder.iterdir() if "core" in path.name], done.stdout.splitlines()[-1]


@pytest.mark.parametrize("code", [COMMAND, MOD], ids=["command", "node"])
@pytest.mark.parametrize("signal", [6, 11])
def test_a_crash_leaves_no_core_file(tmp_path, code, signal):
    assert crashed(tmp_path, code, signal) == ([], "0")


def test_without_it_there_would_be_one(tmp_path):
    left, limit = crashed(tmp_path, "", 6)
    assert limit != "0"
    pattern = PATTERN.read_text().strip() if PATTERN.exists() else "|"
    if "/" not in pattern and not pattern.startswith("|"):  # elsewhere it is not ours to look for it
        assert left
