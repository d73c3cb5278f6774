"""Key and lock files: private, atomic, and refused with one clear error if they are not what they were."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import fedkl
from fedkl import Key, lockfile
from fedkl.errors import KeyFileError, NewerFormatError
from fedkl.locking import load_memory, read_lock

PASSPHRASE = "correct horse"


@pytest.fixture
def key():
    return Key.generate(length=16)


@pytest.fixture(params=[PASSPHRASE, None], ids=["encrypted", "plain"])
def passphrase(request):
    return request.param


@pytest.fixture
def file(tmp_path, key, passphrase):
    path = tmp_path / "client.key"
    fedkl.save_key(key, path, passphrase=passphrase)
    return path


def net(features=8):
    return nn.Sequential(
        nn.Conv2d(3, features, 3), nn.BatchNorm2d(features), nn.Conv2d(features, 4, 3), nn.BatchNorm2d(4)
    )


def locked(**options):
    return fedkl.lock(net(), **{"key": Key.generate(length=16), "layers": "all", **options})


def test_a_key_comes_back(file, key, passphrase):
    loaded = fedkl.load_key(file, passphrase=passphrase)
    assert torch.equal(loaded.reveal(), key.reveal())
    assert loaded.distribution == key.distribution


def test_with_the_real_cost_of_a_passphrase(real_cost, tmp_path, key):
    fedkl.save_key(key, tmp_path / "k", passphrase=PASSPHRASE)
    assert torch.equal(fedkl.load_key(tmp_path / "k", passphrase=PASSPHRASE).reveal(), key.reveal())
    header = (tmp_path / "k").read_bytes()[12:400]
    assert b'"n": 32768' in header


@pytest.mark.parametrize(
    "options",
    [{}, {"chained": False, "activation": "relu"}, {"layers": "first", "share_statistics": True}],
)
def test_a_lock_comes_back(tmp_path, passphrase, options):
    lock = locked(**options)
    lock.model(torch.rand(4, 3, 8, 8))
    lock.save(tmp_path / "lock", passphrase=passphrase)
    loaded = fedkl.load_lock(tmp_path / "lock", net(), passphrase=passphrase)
    loaded.load_public_state(lock.public_state())
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(loaded.model.eval()(x), lock.model.eval()(x))
    assert repr(loaded) == repr(lock)
    assert loaded.private_names == lock.private_names


def test_a_lock_comes_back_with_what_else_its_client_remembers(tmp_path, passphrase):
    lock, memory = locked(), {"momentum/fc.weight": torch.arange(4.0)}
    lock.save(tmp_path / "lock", passphrase=passphrase, memory=memory)
    loaded = fedkl.load_lock(tmp_path / "lock", net(), passphrase=passphrase)
    assert torch.equal(loaded.key.reveal(), lock.key.reveal())
    found = load_memory(tmp_path / "lock", passphrase=passphrase)
    assert found.keys() == memory.keys()
    assert torch.equal(found["momentum/fc.weight"], memory["momentum/fc.weight"])
    lock.save(tmp_path / "lock", passphrase=passphrase)
    assert load_memory(tmp_path / "lock", passphrase=passphrase) == {}


def test_a_lock_in_execution_order_comes_back(tmp_path):
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.b, self.a = nn.LayerNorm(4), nn.LayerNorm(4)

        def forward(self, x):
            return self.b(self.a(x))

    x = torch.rand(3, 4)
    lock = fedkl.lock(Backwards(), layers="all", example_inputs=x)
    assert lock.layers == ("a", "b")
    lock.save(tmp_path / "lock", passphrase=None)
    loaded = fedkl.load_lock(tmp_path / "lock", Backwards(), passphrase=None)
    assert loaded.layers == ("a", "b")
    torch.testing.assert_close(loaded.model(x), lock.model(x))


def test_the_file_is_private(file, key, passphrase):
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.chmod(0o644)
    fedkl.save_key(key, file, passphrase=passphrase)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_encrypted_file_holds_nothing_in_plain_text(tmp_path):
    lock = locked()
    lock.model(torch.rand(4, 3, 8, 8))
    secrets = {**lock.private_state(), "key": lock.key.reveal()}
    patterns = [t.numpy().tobytes() for t in secrets.values() if t.numel() > 1] + [
        n.encode() for n in secrets if "." in n
    ]
    found = {}
    for passphrase in (PASSPHRASE, None):
        lock.save(tmp_path / "lock", passphrase=passphrase)
        content = (tmp_path / "lock").read_bytes()
        found[passphrase] = [pattern for pattern in patterns if pattern in content]
    assert found[PASSPHRASE] == []
    assert found[None] == patterns


def test_two_files_of_one_key_share_no_randomness(tmp_path, key):
    for name in "ab":
        fedkl.save_key(key, tmp_path / name, passphrase=PASSPHRASE)
    a, b = ((tmp_path / name).read_bytes() for name in "ab")
    assert a[-100:] != b[-100:]


@pytest.mark.parametrize("failure", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("where", ["os.fsync", "pathlib.Path.replace"])
def test_a_failed_write_leaves_the_old_file(file, key, passphrase, failure, where, monkeypatch):
    def fail(*args, **options):
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(where, fail)
        with pytest.raises((KeyFileError, KeyboardInterrupt)):
            fedkl.save_key(Key.generate(length=4), file, passphrase=passphrase)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert torch.equal(fedkl.load_key(file, passphrase=passphrase).reveal(), key.reveal())


def test_a_file_that_cannot_be_written(tmp_path, key):
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError, match="cannot be written"):
        fedkl.save_key(key, tmp_path / "file" / "below", passphrase=None)
    with pytest.raises(KeyFileError, match="cannot be written"):
        fedkl.save_key(key, tmp_path / ("x" * 300), passphrase=None)


def test_every_truncation_is_refused(file, passphrase):
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        with pytest.raises(KeyFileError):
            fedkl.load_key(file, passphrase=passphrase)
    file.write_bytes(content + b"\0")
    with pytest.raises(KeyFileError, match="truncated or extended"):
        fedkl.load_key(file, passphrase=passphrase)


@pytest.mark.parametrize("bit", [0x01, 0x02, 0x10, 0x80])
def test_every_flipped_bit_is_refused(file, passphrase, bit):
    content = bytearray(file.read_bytes())
    for position in range(len(content)):
        content[position] ^= bit
        file.write_bytes(content)
        # a flip in the version makes a newer one of it
        with pytest.raises((KeyFileError, NewerFormatError)):
            fedkl.load_key(file, passphrase=passphrase)
        content[position] ^= bit
    file.write_bytes(content)
    fedkl.load_key(file, passphrase=passphrase)


def test_the_lead_to_each_error(file, passphrase, tmp_path):
    if passphrase:
        with pytest.raises(KeyFileError, match=r"client\.key: wrong passphrase"):
            fedkl.load_key(file, passphrase="wrong")
        with pytest.raises(KeyFileError, match=r"is encrypted. Give its passphrase"):
            fedkl.load_key(file, passphrase=None)
        altered = file.read_bytes()[:-1] + bytes([file.read_bytes()[-1] ^ 1])
        file.write_bytes(altered)
        with pytest.raises(KeyFileError, match="was altered after it was written"):
            fedkl.load_key(file, passphrase=passphrase)
    else:
        with pytest.raises(KeyFileError, match=r"not encrypted. Pass passphrase=None to accept that"):
            fedkl.load_key(file, passphrase=PASSPHRASE)
    with pytest.raises(KeyFileError, match=r"absent: cannot be read \(No such file"):
        fedkl.load_key(tmp_path / "absent", passphrase=passphrase)
    with pytest.raises(KeyFileError, match=r"cannot be read \(Is a directory"):
        fedkl.load_key(tmp_path, passphrase=passphrase)
    (tmp_path / "foreign").write_bytes(b"PK\x03\x04" + os.urandom(500))
    with pytest.raises(KeyFileError, match="not a fedkl key or lock file"):
        fedkl.load_key(tmp_path / "foreign", passphrase=passphrase)


def test_an_empty_passphrase_is_refused(tmp_path, key):
    with pytest.raises(KeyFileError, match=r"passphrase is empty. Give one, or None"):
        fedkl.save_key(key, tmp_path / "k", passphrase="")
    assert list(tmp_path.iterdir()) == []


def test_whether_a_file_is_encrypted_is_always_said(tmp_path, key):
    with pytest.raises(TypeError, match="passphrase"):
        fedkl.save_key(key, tmp_path / "k")


def test_key_and_lock_files_are_not_mixed_up(file, passphrase, tmp_path):
    with pytest.raises(KeyFileError, match="expected a lock file, this is a key file"):
        fedkl.load_lock(file, net(), passphrase=passphrase)
    locked().save(tmp_path / "lock", passphrase=passphrase)
    with pytest.raises(KeyFileError, match="expected a key file, this is a lock file"):
        fedkl.load_key(tmp_path / "lock", passphrase=passphrase)


@pytest.mark.parametrize(
    "other",
    [
        lambda: net(6),
        lambda: net().double(),
        lambda: nn.Sequential(*net(), nn.Conv2d(4, 1, 1)),
        lambda: nn.Linear(2, 2),
    ],
)
def test_a_lock_is_bound_to_its_model(tmp_path, passphrase, other):
    locked().save(tmp_path / "lock", passphrase=passphrase)
    with pytest.raises(KeyFileError, match="belongs to another model"):
        fedkl.load_lock(tmp_path / "lock", other(), passphrase=passphrase)


@pytest.mark.parametrize(
    "damage", ["no-key", "no-distribution", "options", "activation", "structure", "private"]
)
def test_a_wellformed_file_with_a_wrong_content(unchecked, tmp_path, damage):
    lock = locked()
    path = tmp_path / "lock"
    lock.save(path, passphrase=None)
    meta, tensors = lockfile.read(path, kind="lock", passphrase=None)
    if damage == "no-key":
        del tensors["key"]
    elif damage == "private":
        del tensors["private/1.running_mean"]
    elif damage == "activation":
        meta["options"]["activation"] = "gelu"
    else:
        del meta["distribution" if damage == "no-distribution" else damage]
    lockfile.write(path, kind="lock", meta=meta, tensors=tensors, passphrase=None)
    with pytest.raises(KeyFileError):
        fedkl.load_lock(path, net(), passphrase=None)


@pytest.mark.parametrize(
    "fields",
    [
        b"[" * 4000,
        b"[]",
        b"{}",
        b'{"version": 1, "encryption": "none", "length": true, "kind": "key"}',
        b'{"version": 1, "encryption": "none", "length": 1, "kind": ["key"]}',
    ],
)
def test_hostile_headers(tmp_path, fields):
    path = tmp_path / "k"
    path.write_bytes(b"FEDKLSEC" + len(fields).to_bytes(4, "big") + fields + b"\0" * 40)
    with pytest.raises(KeyFileError, match="header is damaged"):
        fedkl.load_key(path, passphrase=None)


@pytest.mark.parametrize(
    "cost",
    [
        ["n", "r", "p"],
        "nrp",
        3,
        None,
        {"n": 3, "r": 1, "p": 1},
        {"n": 2**30, "r": 1, "p": 1},
        {"n": 2, "r": 2**21, "p": 1},
        {"n": 2**15, "r": 8, "p": 9},
        {"n": 2**19, "r": 8, "p": 1},
        {"n": 2**20, "r": 16, "p": 4},
        {"n": 2, "r": -1, "p": -1},
    ],
)
def test_hostile_costs(tmp_path, key, cost):
    path = tmp_path / "k"
    fedkl.save_key(key, path, passphrase=PASSPHRASE)
    content = path.read_bytes()
    length = int.from_bytes(content[8:12], "big")
    fields = json.dumps({**json.loads(content[12 : 12 + length]), "scrypt": cost}).encode()
    path.write_bytes(content[:8] + len(fields).to_bytes(4, "big") + fields + content[12 + length :])
    with pytest.raises(KeyFileError, match="header is damaged"):
        fedkl.load_key(path, passphrase=PASSPHRASE)


def resealed(path, change):
    """Writes a container's header anew, as somebody would who has no key."""
    content = path.read_bytes()
    length = int.from_bytes(content[8:12], "big")
    fields = json.loads(content[12 : 12 + length])
    change(fields)
    header = json.dumps(fields, sort_keys=True).encode()
    path.write_bytes(content[:8] + len(header).to_bytes(4, "big") + header + content[12 + length :])


@pytest.mark.parametrize("change", [{"kind": "lock"}, {"more": 1}])
def test_the_header_is_bound_to_the_body(file, passphrase, change):
    resealed(file, lambda fields: fields.update(change))
    with pytest.raises(KeyFileError, match="was altered after it was written"):
        lockfile.read(file, kind=change.get("kind", "key"), passphrase=passphrase)


def header_of(path):
    content = path.read_bytes()
    return json.loads(content[12 : 12 + int.from_bytes(content[8:12], "big")])


def test_every_file_has_its_own_nonce_and_salt(tmp_path, key):
    for name in "ab":
        fedkl.save_key(key, tmp_path / name, passphrase=PASSPHRASE)
    a, b = (header_of(tmp_path / name) for name in "ab")
    assert a["salt"] != b["salt"]
    assert a["nonce"] != b["nonce"]


def test_files_that_share_a_salt_have_nonces_of_their_own(tmp_path):
    salt = os.urandom(16)
    for name in "abc":
        lockfile.write(
            tmp_path / name, kind="checkpoint", meta={}, tensors={}, passphrase=PASSPHRASE, salt=salt
        )
    headers = [header_of(tmp_path / name) for name in "abc"]
    assert {header["salt"] for header in headers} == {salt.hex()}
    assert len({header["nonce"] for header in headers}) == 3


@pytest.mark.parametrize(("field", "value"), [("salt", ""), ("salt", "00" * 8), ("nonce", "00" * 16)])
def test_short_salts_and_nonces_are_refused(tmp_path, key, field, value):
    path = tmp_path / "k"
    fedkl.save_key(key, path, passphrase=PASSPHRASE)
    resealed(path, lambda fields: fields.update({field: value}))
    with pytest.raises(KeyFileError, match="header is damaged"):
        fedkl.load_key(path, passphrase=PASSPHRASE)


def test_what_a_file_may_cost_at_most(tmp_path, key):
    path = tmp_path / "k"
    fedkl.save_key(key, path, passphrase=PASSPHRASE)
    resealed(path, lambda fields: fields.update(scrypt={"n": 2**18, "r": 8, "p": 1}))  # the most: 2^21
    code = (
        "import resource, sys, fedkl\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "try: fedkl.load_key(sys.argv[1], passphrase='x')\n"
        "except fedkl.FedKLError as error: assert 'wrong passphrase' in str(error)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    run = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert int(run.stdout) < 300 * 1024  # KiB; one of twice the cost is refused, see above


COMPOSED, DECOMPOSED = "caf\u00e9", "cafe\u0301"


@pytest.mark.parametrize(("written", "given"), [(COMPOSED, DECOMPOSED), (DECOMPOSED, COMPOSED)])
def test_a_passphrase_opens_however_it_was_typed(tmp_path, key, written, given):
    fedkl.save_key(key, tmp_path / "k", passphrase=written)
    for passphrase in (written, given):
        fedkl.load_key(tmp_path / "k", passphrase=passphrase)
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        fedkl.load_key(tmp_path / "k", passphrase="cafe")


def test_files_of_versions_that_took_a_passphrase_as_it_was_typed(tmp_path, key, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(lockfile, "_normal", lambda path, passphrase: passphrase.encode())
        fedkl.save_key(key, tmp_path / "k", passphrase=DECOMPOSED)
    assert torch.equal(fedkl.load_key(tmp_path / "k", passphrase=DECOMPOSED).reveal(), key.reveal())


def test_a_passphrase_that_is_no_text_is_refused_and_not_quoted(tmp_path, key):
    fedkl.save_key(key, tmp_path / "k", passphrase=PASSPHRASE)
    secret = "horse\udcff"
    for use in (
        lambda: fedkl.save_key(key, tmp_path / "other", passphrase=secret),
        lambda: fedkl.load_key(tmp_path / "k", passphrase=secret),
    ):
        with pytest.raises(KeyFileError, match="not text in UTF-8") as caught:
            use()
        assert "horse" not in str(caught.value)
        assert caught.value.__cause__ is None
    assert [path.name for path in tmp_path.iterdir()] == ["k"]


def test_a_key_is_created_once(tmp_path, key):
    fedkl.save_key(key, tmp_path / "k", passphrase=None, replace=False)
    with pytest.raises(KeyFileError, match="exists already"):
        fedkl.save_key(Key.generate(length=16), tmp_path / "k", passphrase=None, replace=False)
    assert torch.equal(fedkl.load_key(tmp_path / "k", passphrase=None).reveal(), key.reveal())


def test_copies_are_numbered_and_private(tmp_path, key):
    fedkl.save_key(key, tmp_path / "k", passphrase=PASSPHRASE)
    names = [lockfile.keep_copy(tmp_path / "k").name for _ in range(3)]
    assert names == ["k.old-1", "k.old-2", "k.old-3"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (tmp_path / "k").read_bytes()
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o600


@pytest.mark.parametrize("new", ["mule", None])
def test_a_passphrase_is_changed_and_nothing_else(tmp_path, passphrase, new):
    lock, memory = locked(), {"momentum": torch.arange(3.0)}
    path = tmp_path / "lock"
    lock.save(path, passphrase=passphrase, memory=memory, about={"client": "a", "saved": 3})
    before = path.read_bytes()
    with pytest.raises(KeyFileError):
        lockfile.change_passphrase(path, old="wrong", new=new)
    assert path.read_bytes() == before
    lockfile.change_passphrase(path, old=passphrase, new=new)
    with pytest.raises(KeyFileError):
        read_lock(path, net(), passphrase="wrong" if new is None else passphrase)
    found = read_lock(path, net(), passphrase=new)
    assert torch.equal(found.lock.key.reveal(), lock.key.reveal())
    assert torch.equal(found.memory["momentum"], memory["momentum"])
    assert found.about == {"client": "a", "saved": 3}


def test_the_passphrase_of_a_checkpoint_is_not_changed(tmp_path):
    lockfile.write(tmp_path / "c", kind="checkpoint", meta={}, tensors={}, passphrase=None)
    with pytest.raises(KeyFileError, match="expected a key or lock file, this is a 'checkpoint' file"):
        lockfile.change_passphrase(tmp_path / "c", old=None, new="x")


def test_key_material_of_killed_writes_is_removed(tmp_path, key):
    left = tmp_path / ".k.0123abcd.part"
    left.write_bytes(b"half a key")
    fedkl.save_key(key, tmp_path / "k", passphrase=None)
    assert not left.exists()


def test_files_of_other_kinds(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(KeyFileError, match="not an ordinary file"):
        fedkl.load_key(tmp_path / "pipe", passphrase=None)
    with pytest.raises(KeyFileError, match="not the name of a file"):
        fedkl.load_key(f"{tmp_path}/k\0", passphrase=None)


@pytest.mark.parametrize("damage", ["about", "nested"])
def test_what_a_file_says_of_itself_is_checked(tmp_path, unchecked, damage):
    path = tmp_path / "lock"
    locked().save(path, passphrase=None)
    meta, tensors = lockfile.read(path, kind="lock", passphrase=None)
    meta["about"] = {"client": ["a"]} if damage == "about" else ["a"]
    lockfile.write(path, kind="lock", meta=meta, tensors=tensors, passphrase=None)
    with pytest.raises(KeyFileError, match="unknown options"):
        fedkl.load_lock(path, net(), passphrase=None)


def test_several_first_users_get_one_passphrase(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDKL_PASSPHRASE", raising=False)
    for attempt in range(10):
        monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / str(attempt)))
        start = threading.Barrier(8)

        def first_use(start=start):
            start.wait(10)
            return lockfile.default_passphrase()

        with ThreadPoolExecutor(8) as pool:
            found = [task.result() for task in [pool.submit(first_use) for _ in range(8)]]
        path = tmp_path / str(attempt) / "fedkl" / "passphrase"
        assert set(found) == {path.read_text()}
        assert len(found[0]) == 64
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert [p.name for p in path.parent.iterdir()] == ["passphrase"]


def test_an_empty_passphrase_file_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("FEDKL_PASSPHRASE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    (tmp_path / "fedkl").mkdir()
    (tmp_path / "fedkl" / "passphrase").touch(mode=0o600)
    (tmp_path / "fedkl" / "passphrase").write_text("\n")
    with pytest.raises(KeyFileError, match=r"passphrase: empty.*FEDKL_PASSPHRASE"):
        lockfile.default_passphrase()


def test_without_a_home_the_variable_is_named(monkeypatch):
    for name in ("FEDKL_PASSPHRASE", "XDG_CONFIG_HOME"):
        monkeypatch.delenv(name, raising=False)

    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.expanduser", no_home)
    with pytest.raises(KeyFileError, match="FEDKL_PASSPHRASE"):
        lockfile.default_passphrase()
