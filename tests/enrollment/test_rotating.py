"""Another key: drawn and fitted anew, or with the same γ and β; the old one is nowhere in the new file."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fedkl
from fedkl.custody import ClientStore
from fedkl.custody.journal import Journal
from fedkl.defenses import KeyLock
from fedkl.enrollment import Fitting, rotate, rotate_file
from fedkl.errors import KeyFileError, LockError, UpdateError
from fedkl.locking import load_memory, read_lock
from fedkl.metrics import evaluate
from tests.enrollment.setting import DEFENSE, FITTING, images, member_lock, net, public

KINDS = {
    "first": DEFENSE,
    "all": KeyLock(key_length=16, layers="all"),
    "unchained": KeyLock(key_length=16, layers="all", chained=False),
    "published": KeyLock(
        key_length=16, layers="all", key_distribution="uniform", activation="relu", initialization="published"
    ),
    "private head": KeyLock(key_length=16, private=("head",)),
}


def rotated(lock, **options):
    x, y = images("own")
    return rotate(lock, images=x, labels=y, **{"fitting": FITTING, **options})


def affine(lock):
    """γ and β of all locks."""
    plain = lock.bake()
    return torch.cat([p.detach() for name in lock.layers for p in plain.get_submodule(name).parameters()])


def lock_layers(lock):
    return {name: t for name, t in lock.private_parameters().items() if "original" in name}


def outputs(lock):
    with torch.no_grad():
        return lock.model.eval()(images("test")[0])


@pytest.mark.parametrize("kind", KINDS)
def test_with_the_function_kept_outputs_stay_and_all_secrets_are_new(kind):
    old = member_lock(KINDS[kind])
    done = rotated(old, keep_function=True)
    new = done.lock
    torch.testing.assert_close(outputs(new), outputs(old), rtol=1e-4, atol=1e-5)
    assert done.after.accuracy == done.before.accuracy
    assert not torch.equal(new.key.reveal(), old.key.reveal())
    assert new.key.distribution == old.key.distribution
    for name, tensor in lock_layers(new).items():
        # Under ReLU the published chain may be at zeros behind its first link: what follows is b.
        if kind != "published" or name.endswith("original0") or name.startswith("1."):
            assert not torch.allclose(tensor, lock_layers(old)[name]), name
    assert done.steps == 0


@pytest.mark.parametrize("kind", ["first", "all"])
def test_a_rotation_draws_γ_and_β_anew_and_costs_little(kind):
    old = member_lock(KINDS[kind])
    done = rotated(old, fitting=Fitting(epochs=30))
    new = done.lock
    assert not torch.equal(new.key.reveal(), old.key.reveal())
    assert float((affine(new) - affine(old)).abs().min()) > 0
    assert float((affine(new) - affine(old)).abs().mean()) > 0.1
    still = rotated(old, fitting=Fitting(epochs=1, lr=1e-9)).lock  # no fitting: only the drawing moves them
    assert float((affine(still) - affine(old)).abs().mean()) > 0.05
    test = images("test")
    assert evaluate(new.model, *test) > evaluate(old.model, *test) - 0.15  # drawn by the operating system
    assert all(torch.equal(t, old.public_state()[name]) for name, t in new.public_state().items())


def test_the_old_lock_is_not_changed():
    old = member_lock()
    key, private, before = old.key.reveal(), old.private_state(), outputs(old)
    for keep in (True, False):
        rotated(old, keep_function=keep)
        assert torch.equal(old.key.reveal(), key)
        assert all(torch.equal(tensor, private[name]) for name, tensor in old.private_state().items())
        assert torch.equal(outputs(old), before)


def test_a_kept_start_stays_that_of_the_lock():
    """`redraw` starts at what the model had when it was locked, not at the γ of a rotation."""
    model = net()
    with torch.no_grad():
        model[1].weight.copy_(torch.linspace(0.5, 2, 8))
        model[1].running_mean.fill_(0.1)
    lock = fedkl.lock(model, key=fedkl.Key.generate(length=16), activation="identity")
    with torch.no_grad():
        lock.private_parameters()["1.parametrizations.weight.original1"].add_(1)
    changed = affine(lock)
    lock.rekey()
    torch.testing.assert_close(affine(lock), changed)
    lock.redraw()
    torch.testing.assert_close(affine(lock)[:8], model[1].weight)


def test_a_key_of_another_length_changes_nothing():
    lock = member_lock()
    key, private = lock.key.reveal(), lock.private_state()
    with pytest.raises(LockError, match="keys of length 16, got one of 8"):
        lock.rekey(key=fedkl.Key.generate(length=8))
    assert torch.equal(lock.key.reveal(), key)
    assert all(torch.equal(tensor, private[name]) for name, tensor in lock.private_state().items())


def moments(lock):
    """Of an optimizer that trains this lock, as a client remembers them."""
    optimizer = torch.optim.SGD(lock.model.parameters(), lr=0.01, momentum=0.9)
    x, y = images("own")
    nn.functional.cross_entropy(lock.model.train()(x[:32]), y[:32]).backward()
    optimizer.step()
    named = lock.model.named_parameters()
    return {f"momentum/{n}": optimizer.state[p]["momentum_buffer"] for n, p in named if p in optimizer.state}


def tells_the_key(memory, key):
    """Whether a row of a moment is the key up to a factor."""
    rows = [row.double() for t in memory.values() if t.dim() == 2 and t.shape[1] == len(key) for row in t]
    return any(abs(float(nn.functional.cosine_similarity(row, key, dim=0))) > 0.999 for row in rows)


@pytest.mark.parametrize("keep", [True, False])
def test_a_rotated_file_remembers_nothing_of_the_old_key(tmp_path, keep):
    old = member_lock()
    path, key = tmp_path / "a.lock", old.key.reveal()
    memory = moments(old)
    assert tells_the_key(memory, key)  # which is why it must not survive
    old.save(path, passphrase="horse", memory=memory, about={"client": "a", "saved": 3})
    before = path.read_bytes()
    x, y = images("own")
    done, kept = rotate_file(
        path,
        net(),
        passphrase="horse",
        public=public(),
        images=x,
        labels=y,
        keep_function=keep,
        fitting=FITTING,
    )
    saved = read_lock(path, net(), passphrase="horse")
    assert saved.memory == {}
    assert saved.about == {"client": "a", "saved": 3}
    assert torch.equal(saved.lock.key.reveal(), done.lock.key.reveal())
    assert not torch.equal(saved.lock.key.reveal(), key)
    assert kept == tmp_path / "a.lock.old-1"
    assert kept.read_bytes() == before
    assert kept.stat().st_mode & 0o777 == path.stat().st_mode & 0o777 == 0o600


def test_a_rotation_that_fails_leaves_the_file(tmp_path):
    path = tmp_path / "a.lock"
    member_lock().save(path, passphrase="horse")
    before = path.read_bytes()
    x, y = images("own")
    for changes, error in (
        ({"passphrase": "mule"}, KeyFileError),
        ({"public": {}}, UpdateError),
        ({"fitting": Fitting(lr=1e30)}, fedkl.FedKLError),
    ):
        options = {"passphrase": "horse", "public": public(), "fitting": FITTING, **changes}
        with pytest.raises(error):
            rotate_file(path, net(), images=x, labels=y, **options)
    assert [each.name for each in tmp_path.iterdir()] == ["a.lock"]
    assert path.read_bytes() == before


def test_a_stores_client_forgets_its_memory_and_goes_on(tmp_path):
    store = ClientStore(tmp_path / "store", passphrase="horse")
    lock = member_lock()
    store.add("a", lock)
    with store.client("a", model=net(), defense=DEFENSE) as client:
        client.memory.update(moments(lock))
        store.save(client)
        old = client.lock.key.reveal()
        client.lock.load_public_state(public())
        copy = store.rotate(client, rotated(client.lock).lock)
        assert client.memory == {}
        new = client.lock.key.reveal()
    path = store.path("a")
    entries, _ = Journal(path.parent).read()
    assert [entry.what for entry in entries if entry.what in ("born", "rotated")] == ["born", "rotated"]
    assert load_memory(path, passphrase="horse") == {}
    assert tells_the_key(load_memory(copy, passphrase="horse"), old)
    with store.client("a", model=net(), defense=DEFENSE) as client:  # the ledger agrees
        assert torch.equal(client.lock.key.reveal(), new)
        assert client.ledger.saved == 3
    path.write_bytes(copy.read_bytes())
    with pytest.raises(KeyFileError, match="an older file"), store.client("a", model=net(), defense=DEFENSE):
        pass


def test_an_enrolled_lock_is_never_put_over_one_that_is_there(tmp_path):
    store = ClientStore(tmp_path / "store", passphrase="horse")
    store.add("a", member_lock())
    before = store.path("a").read_bytes()
    with pytest.raises(KeyFileError, match="has a lock here, which is never replaced"):
        store.add("a", member_lock())
    assert store.path("a").read_bytes() == before
    store.path("a").unlink()
    with pytest.raises(KeyFileError, match="had a lock here"):
        store.add("a", member_lock())
    closed = ClientStore(tmp_path / "store", passphrase="horse", new_keys=False)
    with pytest.raises(KeyFileError, match="fedkl-new-keys is false"):
        closed.add("b", member_lock())


def test_an_enrolled_client_is_remembered_outside_of_the_store(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path / "tmp"))
    store = ClientStore(tmp_path / "store", passphrase="horse")
    store.add("a", member_lock())
    (tmp_path / "store").rename(tmp_path / "unmounted")
    with pytest.raises(KeyFileError, match=r"had a key in this store \(since 20"):
        store.check_new("a")


def test_a_stores_lock_is_rotated_as_the_stores_client_only(tmp_path):
    store = ClientStore(tmp_path / "store", passphrase="horse")
    store.add("a", member_lock())
    path = store.path("a")
    before = path.read_bytes()
    x, y = images("own")
    given = {"passphrase": "horse", "public": public(), "images": x, "labels": y, "keep_function": True}
    with pytest.raises(KeyFileError, match="in a store"):
        rotate_file(path, net(), **given)
    link = tmp_path / "link.lock"
    link.symlink_to(path)
    with pytest.raises(KeyFileError, match="symbolic link"):
        rotate_file(link, net(), **given)
    assert path.read_bytes() == before
    assert not list(path.parent.glob("*.old-*"))
