"""What makes another subject of a loop or a network, and what does not: in one process and over several."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from dataclasses import replace
from itertools import count

import pytest
import torch

from tests.auditing.subjects import labels, subject

TRAINING = """
import functools
import math
from enum import Enum
import numpy as np
import torch
from . import options
from .steps import step

LR = 0.1
UNUSED = 1
TIMES = 0
WEIGHTS = torch.tensor([1.0, 2.0])
TABLE = np.arange(3)
RATES = {"head": [0.1, (0.2, None)], "stem": {"a", "b"}}
DRAWS = torch.Generator()
loop_of = []
loop_of.append(loop_of)

class Mode(Enum):
    FAST = 1

class Schedule:
    factor = 2.0
    steps: int = 3

    def __init__(self):
        self.rate = 0.5
        self.me = self

    @property
    def now(self):
        return self.factor * self.rate

SCHEDULE = Schedule()

def twice(function):
    @functools.wraps(function)
    def wrapper(*args):
        function(*args)
        return function(*args)
    return wrapper

def even(n):
    return n == 0 or odd(n - 1)

def odd(n):
    return n != 0 and even(n - 1)

@functools.lru_cache
def cached(n):
    return n + 1

@twice
def loop(network, inputs, labels):
    global TIMES
    TIMES += 1  # it is no setting
    rates = [RATES["head"] for _ in range(2) if Mode.FAST]
    def one():
        return LR * SCHEDULE.now + len(loop_of) + cached(1)
    step(network, one() * options.DECAY * WEIGHTS.sum() * TABLE[1], rates, even(2), DRAWS)

def closing(factor=1.0):
    def scaled(x):
        return factor * x
    def loop(network, inputs, labels):
        scaled(network(inputs)).sum().backward()
    return loop

closed = closing()
anonymous = lambda network, inputs, labels, rate=0.1: step(network, rate, None, None, None)

class Trainer:
    def __init__(self, lr=0.1):
        self.lr = lr

    def fit(self, network, inputs, labels):
        step(network, self.lr, None, None, None)

method = Trainer().fit
"""

STEPS = """
MOMENTUM = 0.9

def step(network, *args):
    return MOMENTUM
"""

OPTIONS = """
DECAY = 0.1
SILENT = True
"""

NETWORK = """
import torch
from torch import nn
from torch.nn import functional as F

SCALE = 2.0

def scaled(x):
    return SCALE * x

class Base(nn.Module):
    slope = 0.1

    def forward(self, x):
        return self.fc(self.act(scaled(x).flatten(1)) * self.width * self.mask)

class Net(Base):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 4)
        self.width = 3
        self.act = torch.relu
        self.register_buffer("mask", torch.ones(64), persistent=False)
        self.attention = nn.MultiheadAttention(4, 2, dropout=0.1)
"""

FILES = {"training": TRAINING, "steps": STEPS, "options": OPTIONS, "network": NETWORK, "__init__": ""}
numbers = count()


@pytest.fixture
def written(tmp_path, monkeypatch):
    """The fingerprint with a package of the user's, of another name each time, with some text exchanged."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def print_of(*edits, loop="loop"):
        name, texts = f"of_the_user_{next(numbers)}", dict(FILES)
        for file, old, new in edits:
            assert texts[file].count(old) == 1
            texts[file] = texts[file].replace(old, new)
        (tmp_path / name).mkdir()
        for file, text in texts.items():
            (tmp_path / name / f"{file}.py").write_text(text)
        training, network = (importlib.import_module(f"{name}.{file}") for file in ("training", "network"))
        mine = replace(subject(), model=network.Net, weights=None, procedure=getattr(training, loop))
        return mine.fingerprint()

    yield print_of
    for name in [each for each in sys.modules if each.startswith("of_the_user_")]:
        del sys.modules[name]


CHANGES = {
    "a number": ("training", "LR = 0.1", "LR = 1e-7"),
    "a tensor": ("training", "torch.tensor([1.0, 2.0])", "torch.tensor([1.0, 3.0])"),
    "an array": ("training", "np.arange(3)", "np.arange(3) + 1"),
    "deep in a dict": ("training", "(0.2, None)", "(0.3, None)"),
    "a set": ("training", '{"a", "b"}', '{"a", "c"}'),
    "an enumeration": ("training", "FAST = 1", "FAST = 2"),
    "a class": ("training", "factor = 2.0", "factor = 3.0"),
    "an object": ("training", "self.rate = 0.5", "self.rate = 0.6"),
    "a property": ("training", "self.factor * self.rate", "self.factor + self.rate"),
    "a decorator": ("training", "        function(*args)\n        return", "        return"),
    "a function that a function names": ("training", "n != 0 and", "n != 1 and"),
    "a function with a cache": ("training", "return n + 1", "return n + 2"),
    "a function within": ("training", "len(loop_of)", "2 * len(loop_of)"),
    "a function of another file": ("steps", "return MOMENTUM", "return -MOMENTUM"),
    "a number that it names": ("steps", "MOMENTUM = 0.9", "MOMENTUM = 0.5"),
    "a variable of a module": ("options", "DECAY = 0.1", "DECAY = 0.2"),
    "what forward calls": ("network", "return SCALE * x", "return SCALE + x"),
    "what forward names": ("network", "SCALE = 2.0", "SCALE = 2.5"),
    "an attribute of a network": ("network", "self.width = 3", "self.width = 4"),
    "of its class": ("network", "slope = 0.1", "slope = 0.2"),
    "a function in C": ("network", "torch.relu", "torch.tanh"),
    "a buffer that is not kept": ("network", "torch.ones(64)", "torch.zeros(64)"),
    "what PyTorch's repr does not say": ("network", "dropout=0.1", "dropout=0.2"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_whatever_a_loop_or_a_network_names_makes_another_subject(written, change):
    assert written() != written(CHANGES[change])


@pytest.mark.parametrize(
    ("loop", "change"),
    [
        ("closed", ("training", "return factor * x", "return factor + x")),
        ("closed", ("training", "closing(factor=1.0)", "closing(factor=2.0)")),
        ("anonymous", ("training", "rate=0.1:", "rate=0.2:")),
        ("anonymous", CHANGES["a number that it names"]),
        ("method", ("training", "lr=0.1)", "lr=0.2)")),
        ("method", ("training", "self.lr, None", "-self.lr, None")),
    ],
)
def test_loops_of_every_kind_are_followed(written, loop, change):
    assert written(loop=loop) == written(loop=loop) != written(change, loop=loop)


@pytest.mark.parametrize(
    "change",
    [
        ("training", "UNUSED = 1", "UNUSED = 2"),
        ("training", "TIMES = 0", "TIMES = 1"),
        ("training", "LR = 0.1", "LR = 0.1  # as in the paper"),
        ("options", "SILENT = True", "SILENT = False"),
        ("training", "DRAWS = torch.Generator()", "DRAWS = [torch.Generator()][0]"),
    ],
    ids=["not named", "set by the loop", "a comment", "another variable of a module", "an address"],
)
def test_what_changes_nothing_makes_no_other_subject(written, change):
    """In a package of another name, too."""
    assert written() == written(change)


def test_hooks_of_a_network_count():
    def with_a(hook):
        def model():
            network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4))
            network.register_forward_hook(hook)
            return network

        return replace(subject(), model=model, weights=None).fingerprint()

    assert with_a(lambda module, args, output: output) != with_a(lambda module, args, output: 2 * output)


def test_code_of_no_file_is_told_by_what_it_does():
    """At the prompt of an interpreter, say."""

    def looped(text):
        names = {"__name__": "__main__", "RATE": 1.0}
        exec(f"def loop(network, inputs, labels):\n    return {text}\n", names)
        return subject(procedure=names["loop"]).fingerprint()

    assert looped("RATE * 2") == looped("(RATE * 2)") != looped("RATE * 3")


def test_images_and_labels_count():
    other = labels(200).flip(0)
    assert (
        subject().fingerprint() == subject().fingerprint() != replace(subject(), labels=other).fingerprint()
    )


PROGRAM = """
from dataclasses import replace
import mine.network, mine.training
from tests.auditing.subjects import subject
mine = replace(subject(), model=mine.network.Net, weights=None, procedure=mine.training.loop)
print(mine.fingerprint())
"""


def test_a_fingerprint_is_the_same_in_every_process(written, tmp_path):
    """Though addresses and the order of sets are not."""
    (tmp_path / "mine").mkdir()
    for file, text in FILES.items():
        (tmp_path / f"mine/{file}.py").write_text(text)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env={**os.environ, "PYTHONHASHSEED": "1", "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=300,
        check=True,
    )
    assert done.stdout.strip() == written()
