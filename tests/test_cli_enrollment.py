"""`fedkl enroll` and `fedkl key rotate` of locks: real files, stores and run directories."""

from __future__ import annotations

import sys

import pytest
import torch

import fedkl as library
from fedkl.auditing import target
from fedkl.custody import ClientStore
from fedkl.enrollment import Fitting
from fedkl.modelfile import write_model
from tests.enrollment.setting import DEFENSE, net, public
from tests.test_cli import fedkl as fedkl

PASSPHRASE = "correct horse"
SUBJECT = """
import fedkl
from tests.enrollment.setting import images, net

def subject():
    x, y = images("own")
    return fedkl.Subject(model=net, images=x, labels=y)
"""
FAST = ("--epochs", 2)
LOCK = ("--defense", "keylock:key_length=16")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(SUBJECT)
    write_model("model.safetensors", public(), rounds=3)
    return tmp_path


def enroll(fedkl, *words, lock=LOCK):
    return fedkl("enroll", "mine.py:subject", "--public", "model.safetensors", *lock, *FAST, *words)


def load(path):
    return library.load_lock(path, net(), passphrase=PASSPHRASE, public="model.safetensors")


def test_a_lock_file_of_its_own(fedkl, here):
    code, text = enroll(fedkl, "--out", "d.lock")
    assert code == 0, text
    assert "held-out images right" in text
    assert "fedkl.load_lock('d.lock', Net(), passphrase=…, public='model.safetensors').model.eval()" in text
    lock = load("d.lock")
    assert (here / "d.lock").stat().st_mode & 0o777 == 0o600
    assert all(torch.equal(t, public()[name]) for name, t in lock.public_state().items())
    before = (here / "d.lock").read_bytes()
    code, text = enroll(fedkl, "--out", "d.lock")
    assert code == 2
    assert "exists already" in text
    assert (here / "d.lock").read_bytes() == before


def test_into_a_store_and_never_over_a_lock_that_is_there(fedkl, here):
    words = ("--store", here / "store", "--client", "site-d")
    code, text = enroll(fedkl, *words)
    assert code == 0, text
    assert "fedkl-client=" in text
    store = ClientStore(here / "store", passphrase=PASSPHRASE, new_keys=False)
    with store.client("site-d", model=net(), defense=DEFENSE) as client:
        key = client.lock.key.reveal()
        assert client.ledger.saved == 1
    code, text = enroll(fedkl, *words)
    assert code == 2
    assert "never replaced" in text
    with store.client("site-d", model=net(), defense=DEFENSE) as client:
        assert torch.equal(client.lock.key.reveal(), key)


@pytest.mark.parametrize(
    "words",
    [(), ("--out", "d.lock", "--store", "s", "--client", "d"), ("--store", "s"), ("--client", "d")],
    ids=str,
)
def test_one_place_is_named(fedkl, here, words):
    code, text = enroll(fedkl, *words)
    assert code == 2
    assert "Give --out, or --store FOLDER and" in text
    assert not (here / "d.lock").exists()


def test_another_federations_model_is_refused(fedkl, here):
    code, text = enroll(fedkl, "--out", "d.lock", lock=("--defense", 'keylock:layers="all"'))
    assert code == 2
    assert "not the public tensors of a locked Sequential" in text
    assert not (here / "d.lock").exists()


@pytest.mark.parametrize("keep", [True, False])
def test_a_lock_file_is_rotated(fedkl, here, keep):
    assert enroll(fedkl, "--out", "d.lock")[0] == 0
    old, content = load("d.lock"), (here / "d.lock").read_bytes()
    words = ("key", "rotate", "d.lock", "--target", "mine.py:subject", "--public", "model.safetensors")
    code, text = fedkl(*words, *FAST, *(("--keep-function",) if keep else ()))
    assert code == 0, text
    new = load("d.lock")
    assert not torch.equal(new.key.reveal(), old.key.reveal())
    same = all(torch.allclose(a, b, atol=1e-5) for a, b in zip(affine(new), affine(old), strict=True))
    assert same == keep
    assert ("whoever has seen them knows them still" in text) == keep
    assert "d.lock.old-1: the old one. Destroy it" in text
    assert (here / "d.lock.old-1").read_bytes() == content


def affine(lock):
    plain = lock.bake()
    return [p.detach() for name in lock.layers for p in plain.get_submodule(name).parameters()]


def test_a_store_has_no_locks_in_the_clear(fedkl, here):
    place = ("--store", here / "store", "--client", "d")
    words = ("key", "rotate", "--target", "mine.py:subject", "--public", "model.safetensors", *place)
    assert enroll(fedkl, *place)[0] == 0
    code, text = fedkl(*words, "--unencrypted")
    assert code == 2
    assert "always encrypted" in text


def test_a_stores_client_is_rotated_and_no_new_client_is_made(fedkl, here):
    place = ("--store", here / "store", "--client", "d")
    words = ("key", "rotate", "--target", "mine.py:subject", "--public", "model.safetensors", *FAST, *place)
    code, text = fedkl(*words)
    assert code == 2
    assert "has no key here" in text
    assert not (here / "store").exists()
    assert enroll(fedkl, *place)[0] == 0
    old = load(here / "store" / "d" / "lock.fedkl").key.reveal()
    code, text = fedkl(*words)
    assert code == 0, text
    assert not torch.equal(load(here / "store" / "d" / "lock.fedkl").key.reveal(), old)
    assert torch.equal(load(here / "store" / "d" / "lock.fedkl.old-1").key.reveal(), old)


def test_a_lock_needs_a_target_and_a_key_file_none(fedkl, here):
    assert enroll(fedkl, "--out", "d.lock")[0] == 0
    code, text = fedkl("key", "rotate", "d.lock")
    assert code == 2
    assert "expected a key file, this is a lock file" in text
    code, text = fedkl("key", "rotate", "d.lock", "--target", "mine.py:subject")
    assert code == 2
    assert "--public" in text


def test_of_a_run_directory_with_its_own_defense(fedkl, here):
    flags = (
        "--defense",
        "keylock",
        "--layers",
        "all",
        "--rounds",
        1,
        "--clients",
        2,
        "--data",
        "mnist-sample",
    )
    small = ("--set", "data.train_images=64", "--set", "data.test_images=32", "--set", "auxiliary=20")
    code, text = fedkl("train", "--out", "run", *flags, *small)
    assert code == 0, text
    (here / "mine.py").write_text(
        SUBJECT.replace("model=net", "model=lambda: build_model('lenet', channels=3, classes=10, seed=5)")
        + "\nfrom fedkl.models import build_model\n"
    )
    code, text = fedkl("enroll", "mine.py:subject", "--public", "run", "--out", "d.lock", "--epochs", 1)
    assert code == 0, text
    assert "fedkl export run --out model.safetensors" in text
    network = target.load("mine.py:subject").subject.build()
    lock = library.load_lock("d.lock", network, passphrase=PASSPHRASE)
    assert len(lock.layers) == 3


def test_the_command_lines_defaults_are_the_librarys():
    from inspect import signature

    from fedkl.cli.enrollment import enroll as command

    defaults = signature(command).parameters
    usual = Fitting()
    for name in ("held_out", "epochs", "lr", "seed"):
        assert defaults[name].default == getattr(usual, name)
