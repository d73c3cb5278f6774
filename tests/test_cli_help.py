"""What the command line says without doing anything: help and version, at once and with the real defaults."""

from __future__ import annotations

import ast
import dataclasses
import subprocess
import sys
import typing
from pathlib import Path

import pytest

import fedkl
from fedkl import cli, reproduce
from fedkl.attacks import AnyAttack
from fedkl.auditing import standard_arms
from fedkl.cli import options
from fedkl.cli import reproduce as tables

HEAVY = ("torch", "pydantic", "scipy", "matplotlib", "jinja2", "cryptography")
STARTED = f"""
import runpy, sys
sys.argv[0] = "fedkl"
try:
    runpy.run_module("fedkl", run_name="__main__")
finally:
    print("heavy:", *[name for name in {HEAVY} if name in sys.modules])
"""


def run(*command):
    return subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("train", "--help"),
        ("attack", "--help"),
        ("reproduce", "adaptive", "--help"),
        ("--version",),
    ],
    ids=" ".join,
)
def test_help_imports_nothing_heavy(words):
    done = run("-c", STARTED, *words)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy:"


@pytest.mark.parametrize("module", ["fedkl", "fedkl.cli"])
def test_it_runs_as_a_module(module):
    done = run("-m", module, "--version")
    assert (done.returncode, done.stdout) == (0, f"fedkl {fedkl.__version__}\n"), done.stderr
    assert run("-m", module, "magic").returncode == 2


def test_the_package_itself_is_light():
    done = run(
        "-c", f"import sys, fedkl; print([n for n in {HEAVY} if n in sys.modules]); fedkl.lock; fedkl.Key"
    )
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr


def test_every_public_name_is_there():
    assert set(fedkl.__all__) <= set(dir(fedkl))
    tree = ast.parse(Path(fedkl.__file__).read_text(encoding="utf-8"))
    typed = {
        alias.name: node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.startswith("fedkl.")
        for alias in node.names
    }
    assert {name: f"fedkl.{home}" for name, home in fedkl._HOMES.items()} == typed
    assert set(typed) == set(fedkl.__all__)
    for name in fedkl.__all__:
        assert getattr(fedkl, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'magic'"):
        fedkl.magic  # noqa: B018


def test_choices_are_those_of_the_library():
    assert typing.get_args(options.Budget) == typing.get_args(reproduce.Budget)
    assert typing.get_args(options.Pairs) == typing.get_args(reproduce.Pairs)
    assert tables._TABLE1_ARMS == ",".join(reproduce.Table1.arms)


def test_the_lists_name_all_that_can_be_named(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    for words in (["attack", "--list"], ["reproduce", "adaptive", "--list"]):
        monkeypatch.setattr(sys, "argv", ["fedkl", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
    text = capsys.readouterr().out
    for attack in typing.get_args(AnyAttack):
        assert f"\n{attack.type}\n" in text
        for field in dataclasses.fields(attack):
            assert field.name == "type" or f"{field.name}=" in text
    for name in (*(arm.name for arm in standard_arms()), *reproduce.ARRANGEMENTS, *reproduce.RUNGS):
        assert name in text
