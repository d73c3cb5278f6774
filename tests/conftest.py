"""Fixtures of all tests; shapes are checked while they run."""

from __future__ import annotations

import functools
import gc
import os
from types import SimpleNamespace

import hypothesis
import jaxtyping
import pytest
import torch

from tests import seeding, shapes

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)
shapes.install()
hypothesis.settings.register_profile("suite", derandomize=True, deadline=None)
hypothesis.settings.load_profile("suite")


_LONGEST = (
    "tests/flower/test_deployment.py",
    "tests/notebooks/",
    "tests/hygiene/",
    "tests/test_site.py",
    "tests/fuzzing/test_fuzz.py",
    "tests/test_cli.py",
    "tests/test_experiments.py",
    "tests/flower/test_guard.py",
    "tests/federated/test_checkpoint.py",
    "tests/federated/test_kill_resume.py",
    "tests/locking/test_architectures.py",
    "tests/federated/test_scale.py",
    "tests/fuzzing/test_corpus.py",
    "tests/attacks/",
    "tests/federated/",
    "tests/flower/",
)


def pytest_collection_modifyitems(items):
    """What takes longest comes first, so that no process is left with it while the other one has nothing."""

    def place(item):
        return next((n for n, name in enumerate(_LONGEST) if item.nodeid.startswith(name)), len(_LONGEST))

    items.sort(key=place)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Nothing that is made while tests are collected is garbage, and looking for it takes a third of that."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()


@pytest.fixture(scope="session", autouse=True)
def _nothing_waits_for_a_disk():
    """A test's process does not wait until its files are on the disk: no test cuts the power.

    That they would be is asserted where a test puts a function of its own in the place of `os.fsync`;
    processes that tests start have the system's.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda handle: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def _secrets_from_a_seed():
    """Keys and lock layers are the same in every run: chance must not decide whether a test passes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fedkl.keys.os", SimpleNamespace(urandom=seeding.SECRETS.randbytes))
        yield


@pytest.fixture(scope="module", autouse=True)
def _seeded_module(_secrets_from_a_seed):
    """What a module's fixtures draw does not depend on which module came before it."""
    seeding.seed()


@pytest.fixture(autouse=True)
def _seeded():
    seeding.seed()


@pytest.fixture(scope="module", autouse=True)
def _frozen():
    """The garbage collector looks at what this module's tests make only, not at a million imported objects.

    Flower collects garbage after every round, which took longer than all the rest of its tests.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(10_000)


@pytest.fixture
def unchecked():
    """Switches the type checks off, to see what a user without them sees who passes a wrong type."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session", autouse=True)
def _no_home(tmp_path_factory):
    """No test writes a passphrase into the home of who runs it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(tmp_path_factory.mktemp("config")))
        patch.delenv("FEDKL_PASSPHRASE", raising=False)
        yield


@pytest.fixture(scope="session", autouse=True)
def _cheap_scrypt():
    """A passphrase costs nothing to turn into a key; gives the package's own cost.

    It is a tenth of a second for every encrypted file, on purpose, and most tests are not about that.
    """
    from fedkl import lockfile  # after the import hook

    own = lockfile._SCRYPT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lockfile, "_SCRYPT", {"n": 2, "r": 1, "p": 1})
        yield own


@pytest.fixture
def real_cost(_cheap_scrypt, monkeypatch):
    """The cost of a passphrase as it is for a user."""
    monkeypatch.setattr("fedkl.lockfile._SCRYPT", _cheap_scrypt)


@pytest.fixture
def short_refits(monkeypatch):
    """The server's own model is fitted in 2 steps, not 200, which took longer than the trainings of tests.

    What it comes to then is for tests/federated/test_fill_in.py.
    """
    from fedkl import training

    fill_ins = functools.partial(training.server_fill_ins, refit_steps=2)
    monkeypatch.setattr(training, "server_fill_ins", fill_ins)
