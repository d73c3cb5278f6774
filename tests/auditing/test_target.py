"""The function that a user names: found, called, and every wrong use told with the user's own line."""

from __future__ import annotations

import re
import sys
import textwrap

import pytest

from fedkl.auditing import target
from fedkl.errors import ConfigError

GOOD = """
import torch
from torch import nn
import fedkl

IMAGES = torch.zeros(40, 1, 4, 4)

def subject():
    return fedkl.Subject(
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 2)),
        images=IMAGES,
        labels=torch.arange(40) % 2,
        name="mine",
    )
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A current folder of its own; what is imported from it is forgotten afterwards."""
    before, path = set(sys.modules), list(sys.path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", path)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(text))


@pytest.mark.parametrize("form", ["audits/mine.py:subject", "audits.mine:subject"])
def test_by_file_and_by_module(here, form):
    write(here / "audits" / "mine.py", GOOD)
    write(here / "audits" / "__init__.py", "")
    found = target.load(form)
    assert (found.subject.name, found.name) == ("mine", form)
    assert (found.source, found.line) == ("audits/mine.py", 8)


def test_a_file_finds_what_lies_beside_it_and_in_the_current_folder(here):
    write(here / "beside" / "net_of_mine.py", "from torch import nn\nfrom shared_of_mine import WIDTH\n")
    write(here / "shared_of_mine.py", "WIDTH = 16\n")
    write(here / "beside" / "mine.py", "from net_of_mine import WIDTH\n" + GOOD)
    assert target.load("beside/mine.py:subject").line == 9


def test_a_file_elsewhere_has_no_place_in_a_report(here, tmp_path_factory):
    file = tmp_path_factory.mktemp("elsewhere") / "mine.py"
    write(file, GOOD)
    found = target.load(f"{file}:subject")
    assert (found.source, found.line) == (None, None)


@pytest.mark.parametrize("form", ["mine", "mine.py", ":subject", "mine:", "mine:a.b", "mine.py:1"])
def test_what_is_no_target(here, form):
    with pytest.raises(ConfigError, match="expected a module or file, a colon and a function"):
        target.load(form)


WRONG = {
    "no such file": ("other.py:subject", "", "other.py: no such file. Give package.module:function"),
    "no such module": ("other:subject", "", "the module does not import: ModuleNotFoundError"),
    "import fails": (
        "mine.py:subject",
        "import torch\nimport of_nobody\n",
        "does not import at mine.py, line 2: ModuleNotFoundError: No module named 'of_nobody'",
    ),
    "syntax": ("mine.py:subject", "a = 1\ndef (:\n", "does not import at mine.py, line 2: SyntaxError"),
    "a script": (
        "mine.py:subject",
        "import sys\nsys.exit(3)\n",
        "at mine.py, line 2: it ends the program (SystemExit: 3). Put what only a script does",
    ),
    "no such function": (
        "mine.py:audit",
        "from math import sqrt\ndef first(): ...\ndef _hidden(): ...\ndef second(): ...\n",
        "no such function; it has first, second.",
    ),
    "no function": ("mine.py:subject", "subject = 3\n", "expected a function, got int"),
    "arguments": (
        "mine.py:subject",
        "def subject(data, *more, size, seed=0): ...\n",
        "a function without arguments, got one that needs data, size",
    ),
    "a class of Python's own": ("builtins:dict", "", "that says which arguments it takes, got type 'dict'"),
    "another one": ("functools:partial", "", "that says which arguments it takes, got type 'partial'"),
    "it raises": (
        "mine.py:subject",
        "def inner():\n    return {}['x']\ndef subject():\n    return inner()\n",
        "the function fails at mine.py, line 2: KeyError: 'x'",
    ),
    "inside a library": (
        "mine.py:subject",
        "import torch\ndef subject():\n    return torch.ones(2) @ torch.ones(3)\n",
        "the function fails at mine.py, line 3: RuntimeError",
    ),
    "an unusable subject": (
        "mine.py:subject",
        GOOD.replace("torch.zeros(40,", "torch.zeros(4,"),
        "the function fails at mine.py, line 9: Subject is not usable.\n  - ",
    ),
    "something else": (
        "mine.py:subject",
        "def subject():\n    return {'model': 1}\n",
        "expected a function that returns a fedkl.Subject, got dict",
    ),
    "CUDA": (
        "mine.py:subject",
        "def subject():\n    raise AssertionError('Torch not compiled with CUDA enabled')\n",
        "with CUDA enabled. Audits run on the CPU: leave out .cuda()",
    ),
    "another device": (
        "mine.py:subject",
        GOOD.replace(
            '        name="mine",', '        weights={"1.weight": torch.zeros(2, 16, device="meta")},'
        ),
        "expected tensors on the CPU, got some on meta",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_uses_are_told(here, case):
    form, text, message = WRONG[case]
    if text:
        write(here / "mine.py", text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        target.load(form)
    assert str(caught.value).startswith(form)
    assert "Traceback" not in str(caught.value)


def test_ctrl_c_in_the_users_code_is_no_error_of_theirs(here):
    write(here / "mine.py", "def subject():\n    raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        target.load("mine.py:subject")


def test_no_message_can_forge_a_line(here):
    write(here / "mine.py", "def subject():\n    raise ValueError('a\\nb\\x1b[31m')\n")
    with pytest.raises(ConfigError) as caught:
        target.load("mine.py:subject")
    assert "a\\nb\\x1b" in str(caught.value)
