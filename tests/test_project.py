"""What several files of the project say, they say alike: the version, and what is checked before a commit."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import yaml

import fedkl

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def text(name):
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_version_stands_in_one_place_and_all_else_agrees():
    # tests/test_cli_help.py: `--version` prints it; tests/distribution/smoke.py: what is installed has it.
    assert "version" not in PROJECT["project"]
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["hatch"]["version"] == {"path": "src/fedkl/__init__.py"}
    assert "release = version = fedkl.__version__" in text("docs/conf.py")
    citation = yaml.safe_load(text("CITATION.cff"))
    assert citation["version"] == fedkl.__version__
    sections = re.findall(r"^## \[(\S+)\](?: - (\S+))?$", text("CHANGELOG.md"), re.MULTILINE)
    assert sections[:2] == [("Unreleased", ""), (fedkl.__version__, str(citation["date-released"]))]


def commands_of(target):
    """What a target of the Makefile runs, as in the project's environment."""
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text("Makefile"), re.MULTILINE)
    assert found is not None
    return [line.strip().replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def test_hooks_and_makefile_run_the_same():
    (repository,) = yaml.safe_load(text(".pre-commit-config.yaml"))["repos"]
    assert repository["repo"] == "local"  # from elsewhere they would have versions of their own
    hooks = repository["hooks"]
    assert {(hook["language"], hook["pass_filenames"]) for hook in hooks} == {("system", False)}
    checks = [command for target in ("lint", "types", "imports") for command in commands_of(target)]
    assert [hook["entry"] for hook in hooks] == checks
    tests = re.search(r"^test: ([a-z ]+) ##", text("Makefile"), re.MULTILINE)
    assert tests is not None
    assert tests[1].split() == ["lint", "types", "imports", "unit"]
    assert "make test" in text(".ci/run")


def test_the_page_lists_every_extra():
    listed = re.findall(r"^\| `([a-z]+)` \|", text("docs/install.md"), re.MULTILINE)
    assert sorted(listed) == sorted(PROJECT["project"]["optional-dependencies"])


def test_every_dependency_says_from_which_version_on():
    named = [*PROJECT["project"]["dependencies"]]
    for lines in PROJECT["project"]["optional-dependencies"].values():
        named += lines
    assert not [line for line in named if ">=" not in line]


def test_what_is_tried_after_installing_knows_every_extra():
    """A module that needs an extra is not missing where no extra is installed."""
    smoke = text("tests/distribution/smoke.py")
    (line,) = re.findall(r"^OPTIONAL = \((.*)\)$", smoke, re.MULTILINE)
    extras = PROJECT["project"]["optional-dependencies"]
    for name in sorted(set(extras) - {"dev", "docs"}):
        for requirement in extras[name]:
            package = re.match(r"[\w-]+", requirement)[0].replace("-", "_")
            assert f'"{package}"' in line
