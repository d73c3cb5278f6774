"""What the command line says without doing anything: help and version, at once and with the real defaults."""

from __future__ import annotations

import ast
import dataclasses
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import typer

import fedkl
from fedkl import cli, data, experiment_flags, reproduce
from fedkl import config as configs
from fedkl.attacks import ATTACKS
from fedkl.auditing.results import Masking
from fedkl.cli import attack, options, train
from fedkl.cli import reproduce as tables
from fedkl.config import AttackConfig
from fedkl.defenses import DEFENSES, KeyLock, arms_of

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
        ("audit", "--help"),
        ("reproduce", "adaptive", "--help"),
        ("reproduce", "defenses", "--help"),
        ("member", "--help"),
        ("cohort", "new", "--help"),
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


def test_packages_are_there_after_importing_fedkl_alone():
    """As pages write it: fedkl.data.load(…) after `import fedkl`."""
    done = run("-c", "import fedkl; fedkl.data.load; [getattr(fedkl, name) for name in fedkl._PACKAGES]")
    assert done.returncode == 0, done.stderr


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
    own = [each for each in ATTACKS if each.__module__.startswith("fedkl.")]  # tests register theirs
    assert options.ATTACKS == tuple(each.type for each in own)
    own = [each for each in DEFENSES if each.__module__.startswith("fedkl.")]
    assert options.DEFENSES == tuple(each.type for each in own)
    assert options.DATASETS == tuple(data.DATASETS)
    assert options.MASKINGS == typing.get_args(Masking)


def test_the_lists_name_all_that_can_be_named(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    for words in (["attack", "--list"], ["reproduce", "adaptive", "--list"]):
        monkeypatch.setattr(sys, "argv", ["fedkl", *words])
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
    text = capsys.readouterr().out
    for kind in ATTACKS:
        assert f"\n{kind.type}\n" in text
        for field in dataclasses.fields(kind):
            assert field.name == "type" or f"{field.name}=" in text
    for name in (
        *arms_of(KeyLock()),
        *reproduce.ARRANGEMENTS,
        *reproduce.RUNGS,
    ):
        assert name in text


COMMANDS = {"train": train, "attack": attack}


def flags_of(name):
    return typer.main.get_command(cli.app).commands[name].params


@pytest.mark.parametrize("name", COMMANDS)
def test_the_defaults_in_the_help_are_those_of_the_library(name):
    values = configs.values_of(configs.parse({"type": name}, source="here"))
    lock = configs.values_of(AttackConfig())["defense"]
    places = dict(COMMANDS[name].FIELDS)
    places |= {"--defense": "defense.type"} | ({"--attack": "attack.type"} if name == "attack" else {})
    expected = dict.fromkeys(places, values)
    for flag, place in places.items():
        for part in place.split("."):
            expected[flag] = expected[flag][part]
    expected |= {"--lock": "default", "--layers": lock["layers"], "--arms": "the defense and its controls"}
    if name == "train":
        expected["--partition"] = expected["--partition"]["type"]
        assert expected["--masking"] == {"type": "plain"}
        expected["--masking"] = "none"
    else:
        assert values["arms"] == []
    shown = {flag.opts[0]: flag.show_default for flag in flags_of(name) if isinstance(flag.show_default, str)}
    assert shown == {flag: str(default) for flag, default in expected.items() if flag in shown}
    without = {flag.opts[0] for flag in flags_of(name) if not flag.is_flag} - set(shown)
    assert without == {"--out", "--config", "--set"}


@pytest.mark.parametrize("name", COMMANDS)
def test_every_former_flag_names_a_field_that_there_is(name):
    command = typer.main.get_command(cli.app).commands[name]
    assert not set(command.removed) & {option for flag in command.params for option in flag.opts}
    examples = {"NUMBER": "1", "FOLDER": "/tmp", "cohort=1": "cohort=1"}
    names = {"initialization": "default", "algorithm": "fedsgd", "augmentation": "flip", "device": "cpu"}
    names |= {"networks": "one", "norm_mode": "eval", "weighting": "sqrt"}
    for now in command.removed.values():
        word, setting = now.split()
        if word != "--set":
            assert word in {option for flag in command.params for option in flag.opts}
            continue
        place, value = setting.split("=")
        value = names[place.split(".")[-1]] if value == "NAME" else examples.get(value, value)
        experiment_flags.from_flags(name, file=None, fields={}, settings=[f"{place}={value}"])


ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_use_flags_that_there_are(document):
    """Pages in docs/results/ are left out: they record commands as they were run."""
    text = document.read_text(encoding="utf-8").replace("\\\n", " ")
    code = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    code += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]
    for command in code:
        found = re.match(r"fedkl (train|attack)\b", command)
        if found:
            known = {option for flag in flags_of(found[1]) for option in flag.opts} | {"--help"}
            assert set(re.findall(r"(?<= )--[a-z-]+", command)) <= known, command


@pytest.mark.parametrize("name", COMMANDS)
def test_the_document_says_what_became_of_every_flag(name):
    text = (ROOT / "docs" / "command-line.md").read_text(encoding="utf-8")
    for flag, now in typer.main.get_command(cli.app).commands[name].removed.items():
        assert f"| `{flag}` | `{now}` |" in text
