"""Completion in a shell: what bash is answered, at once, and how it gets to ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests.test_cli_help import HEAVY

STARTED = f"""
import runpy, sys
sys.argv[0] = "fedkl"
try:
    runpy.run_module("fedkl", run_name="__main__")
finally:
    print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)
"""
# Typer asks which shell started it; a test is started by none.
NAMED_SHELL = {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}


def run(*command, **environment):
    return subprocess.run(
        list(map(str, command)),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("fedkl tra", ["train"]),
        ("fedkl key ", ["new", "info", "rotate", "passphrase"]),
        ("fedkl reproduce tab", ["table1", "table6", "table4", "table5"]),
        ("fedkl audit --base", ["--baseline"]),
        ("fedkl train --lr 1 --mask", ["--masking"]),  # a flag that is gone is no error yet
        ("fedkl train --masking ", ["none", "blind", "pairwise", "both"]),
        ("fedkl audit a.py:s --masking b", ["blind", "both"]),
        ("fedkl train --defense pr", ["private-norm", "private-layers", "pruning", "precode"]),
        ("fedkl attack --defense pu", ["public-norm"]),
        ("fedkl audit a.py:s --defense k", ["keylock"]),
        ("fedkl attack --attack g", ["gauss-newton", "ggl", "grnn"]),
        ("fedkl train --data mni", ["mnist", "mnist-sample"]),
        ("fedkl attack --data i", ["imagefolder"]),
        ("fedkl train --data ./", []),  # bash goes on with files: a folder is as good
        ("fedkl generator train --data fa", ["fashion-mnist"]),
        ("fedkl data fetch cifar", ["cifar10", "cifar100"]),
    ],
)
def test_bash_is_answered_without_anything_heavy(typed, offered):
    words = typed.split(" ")
    asked = {"_FEDKL_COMPLETE": "complete_bash", "COMP_WORDS": typed, "COMP_CWORD": str(len(words) - 1)}
    done = run(sys.executable, "-c", STARTED, **asked)
    assert (done.returncode, done.stderr) == (0, "\n")
    assert done.stdout.split() == offered


@pytest.fixture
def home(tmp_path):
    """A home whose user has `fedkl` on PATH."""
    command = tmp_path / "bin" / "fedkl"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m fedkl "$@"\n', encoding="utf-8")
    command.chmod(0o755)
    return tmp_path


def test_what_is_installed_completes_in_bash(home):
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("no bash on this machine")
    paths = {"HOME": str(home), "PATH": f"{home / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = run("fedkl", "--install-completion", "bash", **paths, **NAMED_SHELL)
    assert done.returncode == 0, done.stderr
    script = (
        f'source "{home}/.bashrc"; COMP_WORDS=(fedkl cohort j); COMP_CWORD=2; '
        '$(complete -p fedkl | sed "s/.*-F \\([^ ]*\\).*/\\1/") fedkl; echo "${COMPREPLY[@]}"'
    )
    done = run(bash, "--noprofile", "--norc", "-c", script, **paths)
    assert (done.returncode, done.stdout) == (0, "join\n"), done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish", "pwsh"])
def test_every_shells_script_asks_fedkl(shell):
    done = run(sys.executable, "-m", "fedkl", "--show-completion", shell, **NAMED_SHELL)
    assert done.returncode == 0, done.stderr
    assert "_FEDKL_COMPLETE" in done.stdout
