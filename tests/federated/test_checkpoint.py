"""Checkpoints: continued to the last bit, private to the last byte, sound whatever happens to the files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import warnings
from dataclasses import asdict

import pytest
import safetensors.torch
import torch

from fedkl import lockfile
from fedkl.defenses import KeyLock, NoDefense, PrivateLayers, PrivateNorm
from fedkl.errors import ConfigError, FedKLError, KeyFileError
from fedkl.federated import Checkpoints, Client, Execution, ServerAdam, ServerSGD
from fedkl.federated.manifest import sealed, unsealed
from tests.federated.setting import TwoNorms, WithDropout, differences, everything, federation, seeded
from tests.locking.leaks import patterns

DEFENSES = [NoDefense(), KeyLock(), KeyLock(layers="all"), PrivateNorm(), PrivateLayers()]
HARD = {  # everything that a checkpoint could forget
    "clients": 6,
    "cohort": 4,
    "dropout": 0.25,
    "rounds": 4,
    "eval_every": 4,
    "server": ServerAdam(),
    "local": {"optimizer": "adam", "batch_size": 16},
}
EASY = {"clients": 4, "cohort": 2, "rounds": 8, "eval_every": 8, "server": ServerSGD()}


def build(dataset, defense=None, *, model=TwoNorms, **options):
    return federation(dataset, defense or KeyLock(), model=seeded(model), **options)


def checkpoints(folder, *, passphrase="horse", keep=2):
    return Checkpoints(folder, passphrase=passphrase, keep=keep)


def advanced(run, store, *, first, last):
    """Trains rounds `first` to `last`, with a checkpoint after each."""
    for round in range(first, last + 1):
        run.run_round(round)
        store.save(run, round=round + 1)
    return everything(run)


@pytest.fixture(scope="module")
def original(dataset, tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    torch.manual_seed(0)
    run, store = build(dataset, **EASY), checkpoints(folder)
    store.save(run, round=0)
    return folder, {round + 1: advanced(run, store, first=round, last=round) for round in range(3)}


@pytest.fixture
def saved(original, tmp_path):
    """A folder with the checkpoints of rounds 2 and 3, and what the federation was at each."""
    folder, states = original
    shutil.copytree(folder, tmp_path / "checkpoints")
    return tmp_path / "checkpoints", states


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def comparable(results):
    fields = ("round", "lr", "loss", "updates", "dropped", "failed", "aggregated", "accuracies")
    return [tuple(getattr(result, field) for field in fields) for result in results]


@pytest.mark.parametrize("keep_optimizer", [True, False])
@pytest.mark.parametrize("defense", DEFENSES, ids=lambda d: d.type)
def test_a_restored_training_goes_on_to_the_last_bit(dataset, tmp_path, defense, keep_optimizer):
    local = HARD["local"] | {"keep_optimizer": keep_optimizer}
    options = HARD | {"local": local}
    run, other = (build(dataset, defense, **options) for _ in range(2))
    store = checkpoints(tmp_path)
    store.save(run, round=0)
    advanced(run, store, first=0, last=1)
    assert 0 < sum(client.trained for client in run.clients)
    if run.clients[0].key is not None:
        assert differences(everything(run), everything(other))
    assert checkpoints(tmp_path).restore(other) == 2
    assert not differences(everything(run), everything(other))
    rest, again = list(run.run(start=2)), list(other.run(start=2))
    assert comparable(rest) == comparable(again)
    assert not differences(everything(run), everything(other))
    assert any("/optimizer/" in name for name in everything(run)) == keep_optimizer


@pytest.mark.parametrize(
    ("model", "execution"),
    [(WithDropout, Execution()), (TwoNorms, Execution(channels_last=True))],
    ids=["dropout", "channels-last"],
)
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_so_does_every_kind_of_execution(dataset, tmp_path, model, execution, optimizer):
    options = EASY | {"execution": execution, "local": {"optimizer": optimizer, "batch_size": 16}}
    run, other = (build(dataset, NoDefense(), model=model, **options) for _ in range(2))
    store = checkpoints(tmp_path)
    store.save(run, round=0)
    advanced(run, store, first=0, last=1)
    checkpoints(tmp_path).restore(other)
    for federated in (run, other):
        list(federated.run(start=2))
    assert not differences(everything(run), everything(other))


@pytest.mark.parametrize("forgotten", ["key", "private_state", "optimizer_state", "rounds"])
def test_this_check_can_fail(dataset, tmp_path, monkeypatch, forgotten):
    """A client that forgot any part would not be equal."""
    run, other = (build(dataset, **HARD) for _ in range(2))
    advanced(run, checkpoints(tmp_path), first=0, last=1)
    restore = Client.restore

    def forgetful(self, **state):
        own = {
            "key": self.key,
            "private_state": self.private_state,
            "optimizer_state": self.optimizer_state,
            "rounds": self.rounds,
        }
        restore(self, **state | {forgotten: own[forgotten]})

    monkeypatch.setattr(Client, "restore", forgetful)
    checkpoints(tmp_path).restore(other)
    assert differences(everything(run), everything(other))


def test_without_checkpoints_there_is_nothing_to_restore(dataset, tmp_path):
    run = build(dataset, **EASY)
    before = everything(run)
    assert checkpoints(tmp_path / "none").restore(run) is None
    assert not differences(before, everything(run))


def clients_in(path):
    meta, _ = lockfile.read(path, kind="checkpoint", passphrase="horse")
    return set(meta)


def test_only_clients_that_changed_are_written(dataset, tmp_path):
    run, store = build(dataset, **EASY), checkpoints(tmp_path, keep=9)
    store.save(run, round=0)
    assert clients_in(tmp_path / "private-000000-0.fedkl") == {client.name for client in run.clients}
    for round in range(4):
        before = {client.name: client.rounds for client in run.clients}
        run.run_round(round)
        store.save(run, round=round + 1)
        changed = {client.name for client in run.clients if client.rounds != before[client.name]}
        assert len(changed) == 2
        assert clients_in(tmp_path / f"private-{round + 1:06d}-0.fedkl") == changed


def test_a_resumed_training_writes_only_what_changed_too(dataset, saved):
    folder, _ = saved
    run, store = build(dataset, **EASY), checkpoints(folder)
    store.restore(run)
    advanced(run, store, first=3, last=3)
    assert len(clients_in(folder / "private-000004-0.fedkl")) == 2


def test_nothing_changed_nothing_private_is_written(dataset, saved):
    folder, _ = saved
    run, store = build(dataset, **EASY), checkpoints(folder)
    store.restore(run)
    store.save(run, round=4)
    assert not list(folder.glob("private-000004*"))
    assert checkpoints(folder).restore(build(dataset, **EASY)) == 4


def test_large_states_are_spread_over_files(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr("fedkl.federated.private_files._GROUP_BYTES", 1)
    run, other = (build(dataset, **EASY) for _ in range(2))
    advanced(run, checkpoints(tmp_path), first=0, last=0)
    assert sorted(path.name for path in tmp_path.glob("private*")) == [
        f"private-000001-{number}.fedkl" for number in range(4)
    ]
    checkpoints(tmp_path).restore(other)
    assert not differences(everything(run), everything(other))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_exactly_so_many_are_kept_and_no_orphan(dataset, tmp_path, keep):
    run, store = build(dataset, **EASY), checkpoints(tmp_path, keep=keep)
    store.save(run, round=0)
    states = {}
    for round in range(5):
        states[round + 1] = advanced(run, store, first=round, last=round)
        kept = sorted(tmp_path.glob("round-*.json"))
        assert [path.name for path in kept] == [
            f"round-{number:06d}.json" for number in range(max(0, round + 2 - keep), round + 2)
        ]
        needed = {path.name for path in kept}
        for path in kept:
            manifest = json.loads(path.read_text())
            needed |= {manifest["public"], *manifest["clients"].values()}
        assert {path.name for path in tmp_path.iterdir()} == needed
    for round in range(5, 5 - keep, -1):  # each of them can be gone back to
        other = build(dataset, **EASY)
        assert checkpoints(tmp_path, keep=keep).restore(other) == round
        assert not differences(everything(other), states[round])
        (tmp_path / f"round-{round:06d}.json").unlink()


def litter(folder):
    parts = (f".{name}.0123abcd.part" for name in ("round-000009.json", "private-000003-0.fedkl", "public"))
    names = (*parts, "private-000009-0.fedkl", "public-000009.safetensors", "private-1234567-12.fedkl")
    for name in names:
        (folder / name).write_bytes(b"half")
    return names


@pytest.mark.parametrize("by", ["restore", "save"])
def test_what_killed_writes_have_left_goes(dataset, saved, by):
    folder, _ = saved
    run, store = build(dataset, **EASY), checkpoints(folder)
    if by == "save":
        store.restore(run)
    names = litter(folder)
    if by == "save":
        store.save(run, round=4)
    else:
        store.restore(run)
    assert not {path.name for path in folder.iterdir()}.intersection(names)
    assert checkpoints(folder).restore(build(dataset, **EASY)) == (4 if by == "save" else 3)


FOREIGN = (
    "thesis.tex",
    ".hidden",
    ".round-000009.json.k3j2",
    "round-9.json",
    "round-0000009.json",
    "round-000009.json.bak",
    "round-000009.json\n",
    "public-000009.safetensors.old",
    "a-public-000009.safetensors",
    "private-000009-x.fedkl",
    "private-000009.fedkl",
    "private-٠٠٠٠٠٩-0.fedkl",
)
LINKS = (
    "public-000009.safetensors",
    "private-000009-0.fedkl",
    "round-000001.json",
    ".round-000009.json.0123abcd.part",
)


@pytest.mark.parametrize("by", ["restore", "save"])
def test_other_files_stay_and_links_are_neither_followed_nor_removed(dataset, saved, tmp_path, by):
    folder, _ = saved
    run, store = build(dataset, **EASY), checkpoints(folder)
    if by == "save":
        store.restore(run)
    for name in FOREIGN:
        (folder / name).write_text("precious")
    for name in LINKS:
        (tmp_path / f"of {name}").write_text("precious")
        (folder / name).symlink_to(tmp_path / f"of {name}")
    (folder / "private-000008-0.fedkl").mkdir()
    (folder / "private-000008-0.fedkl" / "round-000009.json").write_text("precious")
    outside = {path for path in tmp_path.iterdir() if path != folder}
    if by == "save":
        store.save(run, round=4)
    else:
        store.restore(run)
    assert all((folder / name).read_text() == "precious" for name in (*FOREIGN, *LINKS))
    assert all((folder / name).is_symlink() for name in LINKS)
    assert {path for path in tmp_path.iterdir() if path != folder} == outside
    assert (folder / "private-000008-0.fedkl" / "round-000009.json").exists()


def test_a_link_to_a_checkpoint_is_none(dataset, saved, tmp_path):
    """Nor does it count among those that are kept."""
    folder, states = saved
    shutil.move(folder / "round-000003.json", tmp_path / "elsewhere.json")
    (folder / "round-000003.json").symlink_to(tmp_path / "elsewhere.json")
    run, store = build(dataset, **EASY), checkpoints(folder, keep=1)
    with pytest.warns(UserWarning, match=r"round-000003\.json: .*symbolic link.*of round 2, is used"):
        assert store.restore(run) == 2
    assert not differences(everything(run), states[2])
    store.save(run, round=3 if (folder / "round-000003.json").unlink() else 4)
    assert checkpoints(folder).restore(run) == 4


@pytest.mark.parametrize("file", ["public-000003.safetensors", "private-000003-0.fedkl"])
def test_nor_is_a_link_to_its_files(dataset, saved, tmp_path, file):
    folder, states = saved
    shutil.move(folder / file, tmp_path / file)
    (folder / file).symlink_to(tmp_path / file)
    run = build(dataset, **EASY)
    with pytest.warns(UserWarning, match=rf"{file}: .*symbolic link.*of round 2, is used"):
        assert checkpoints(folder).restore(run) == 2
    assert not differences(everything(run), states[2])
    assert (tmp_path / file).exists()


@pytest.mark.parametrize("by", ["restore", "save"])
def test_a_folder_that_is_a_link_is_refused(dataset, saved, tmp_path, by):
    folder, _ = saved
    link = tmp_path / "run" / "checkpoints"
    link.parent.mkdir()
    link.symlink_to(folder)
    (folder / "thesis.tex").write_text("precious")
    (folder / "public-000009.safetensors").write_text("precious")
    before, run = content(folder), build(dataset, **EASY)
    store = checkpoints(link)
    with pytest.raises(ConfigError, match=r"run/checkpoints: expected a folder, got a symbolic link"):
        store.restore(run) if by == "restore" else store.save(run, round=9)
    assert content(folder) == before


def test_a_file_in_place_of_the_folder_is_named(dataset, tmp_path):
    (tmp_path / "checkpoints").write_text("precious")
    with pytest.raises(ConfigError, match="checkpoints: cannot be read"):
        checkpoints(tmp_path / "checkpoints").restore(build(dataset, **EASY))


def test_what_is_planted_later_pushes_no_checkpoint_out(dataset, saved):
    folder, _ = saved
    run, store = build(dataset, **EASY), checkpoints(folder)
    store.restore(run)
    for round in (900, 901):
        (folder / f"round-{round:06d}.json").write_text("{}")
    advanced(run, store, first=3, last=3)
    assert {path.name for path in folder.glob("round-*")} == {"round-000003.json", "round-000004.json"}


@pytest.mark.parametrize("by", ["a folder", "a link"])
def test_what_is_no_file_takes_no_checkpoints_place(dataset, saved, tmp_path, by):
    folder, states = saved
    run, store = build(dataset, **EASY), checkpoints(folder)
    store.restore(run)
    place = folder / "round-000003.json"
    shutil.move(place, tmp_path / "elsewhere.json")
    place.mkdir() if by == "a folder" else place.symlink_to(tmp_path / "elsewhere.json")
    advanced(run, store, first=3, last=3)
    (folder / "round-000004.json").unlink()
    with pytest.warns(UserWarning, match="of round 2, is used instead"):
        assert checkpoints(folder).restore(run) == 2
    assert not differences(everything(run), states[2])


def test_rounds_of_seven_digits_are_newer_than_those_of_six(dataset, tmp_path):
    run, store = build(dataset, **EASY | {"rounds": 2_000_000}), checkpoints(tmp_path)
    for round in (999_998, 999_999, 1_000_000):
        store.save(run, round=round)
    assert {path.name for path in tmp_path.glob("round-*")} == {"round-999999.json", "round-1000000.json"}
    assert checkpoints(tmp_path).restore(run) == 1_000_000


def flipped(path, *, at=0.5):
    data = bytearray(path.read_bytes())
    data[int(len(data) * at)] ^= 1
    path.write_bytes(bytes(data))


def truncated(path):
    path.write_bytes(path.read_bytes()[:-20])


def emptied(path):
    path.write_bytes(b"")


def of_another_round(path):
    path.write_bytes((path.parent / "round-000002.json").read_bytes())


def of_other_files(path):
    path.write_text(path.read_text().replace("private-000003-0", "private-000002-0"))


def resealed(path, **changes):
    """A manifest that says something else, with the right digest."""
    path.write_bytes(sealed(asdict(unsealed(path.read_bytes(), source=path)) | changes))


def of_another_version(path):
    resealed(path, version=0)  # a newer one is named: tests/vectors/test_formats.py


def a_list(path):
    path.write_text("[1, 2]")


def unlinked(path):
    path.unlink()


NEWEST = {
    "manifest": "round-000003.json",
    "public": "public-000003.safetensors",
    "private": "private-000003-0.fedkl",
}
DAMAGE = [
    *(
        ("manifest", how)
        for how in (truncated, emptied, of_another_round, of_other_files, of_another_version, a_list)
    ),
    *((file, how) for file in ("public", "private") for how in (truncated, emptied, flipped, unlinked)),
]


@pytest.mark.parametrize(("file", "how"), DAMAGE, ids=lambda x: getattr(x, "__name__", x))
def test_a_damaged_newest_checkpoint_gives_way_to_the_one_before(dataset, saved, file, how):
    folder, states = saved
    before = content(folder)
    how(folder / NEWEST[file])
    assert content(folder) != before
    run, store = build(dataset, **EASY), checkpoints(folder)
    with pytest.warns(UserWarning, match=rf"{NEWEST[file]}.*The checkpoint before it, of round 2, is used"):
        assert store.restore(run) == 2
    assert not differences(everything(run), states[2])
    assert not list(folder.glob("*-000003*"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not differences(advanced(run, store, first=2, last=2), states[3])
        assert checkpoints(folder).restore(run) == 3


CLIENTS = {f"client-{number}": "private-000003-0.fedkl" for number in range(4)}
DEEP = b'{"version": 1, "clients": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
NO_MANIFESTS = [DEEP, b"[1]", b"3", b"null", b"\xff", b'{"version": NaN}', b'{"version": 1}', b"{}"]
MANIFESTS = {
    **{
        f"public {name}": {"public": name}
        for name in (
            "../../precious",
            "/etc/passwd",
            "precious",
            "public-000002.safetensors",
            "public-000009.safetensors",
            "round-000003.json",
        )
    },
    **{
        f"client {name}": {"clients": CLIENTS | {"client-0": name}}
        for name in (
            "../../precious",
            "/etc/passwd",
            "private-000004-0.fedkl",
            "private-000003-0.fedkl\n",
            "private-٠٠٠٠٠٣-0.fedkl",
            3,
            None,
            ["private-000003-0.fedkl"],
        )
    },
    **{f"round {value}": {"round": value} for value in (True, -1, 3.0, "3", None, 10**30, [3])},
    **{f"workers {value!r}": {"workers": value} for value in ("1", None, 1.0, True)},
    **{f"threads {value!r}": {"threads": value} for value in ("1", None)},
    **{f"clients {value!r}": {"clients": value} for value in ([], None, "client-0", ["client-0"])},
    "digest": {"digest": ["x"]},
    "version": {"version": [1]},
    "another field": {"more": 1},
}


@pytest.mark.parametrize("changes", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_names_our_files_up_to_its_round_and_nothing_else(dataset, saved, changes):
    folder, states = saved
    (folder.parent / "precious").write_text("precious")
    resealed(folder / "round-000003.json", **changes)
    run = build(dataset, **EASY)
    with pytest.warns(UserWarning, match=r"round-000003\.json: .*of round 2, is used"):
        assert checkpoints(folder).restore(run) == 2
    assert not differences(everything(run), states[2])
    assert (folder.parent / "precious").read_text() == "precious"


@pytest.mark.parametrize("data", NO_MANIFESTS, ids=range(len(NO_MANIFESTS)))
def test_a_manifest_of_any_other_content_is_damaged(dataset, saved, data):
    folder, _ = saved
    (folder / "round-000003.json").write_bytes(data)
    with pytest.warns(UserWarning, match=r"round-000003\.json: a damaged checkpoint \(.*is used instead"):
        assert checkpoints(folder).restore(build(dataset, **EASY)) == 2


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("file", ["round-000003.json", "public-000003.safetensors", "private-000003-0.fedkl"])
def test_nobody_waits_at_a_pipe(dataset, saved, file):
    folder, _ = saved
    (folder / file).unlink()
    os.mkfifo(folder / file)
    with pytest.warns(UserWarning, match=f"{file}: .*not an ordinary file.*is used instead"):
        assert checkpoints(folder).restore(build(dataset, **EASY)) == 2


@pytest.mark.parametrize("file", ["round-000003.json", "public-000003.safetensors"])
def test_a_file_that_is_far_too_large_is_not_read(dataset, saved, file):
    folder, _ = saved
    with (folder / file).open("ab") as handle:
        handle.truncate(2**40)
    with pytest.warns(UserWarning, match=f"{file}: .*expected at most.*is used instead"):
        assert checkpoints(folder).restore(build(dataset, **EASY)) == 2


def test_a_checkpoint_after_the_last_round_is_of_another_training(dataset, saved):
    folder, _ = saved
    with pytest.warns(UserWarning, match=r"round-000003\.json: later than the last round, 2"):
        assert checkpoints(folder).restore(build(dataset, **EASY | {"rounds": 2})) == 2


def with_public(folder, change):
    """The newest checkpoint with another content of the server's file, which its manifest vouches for."""
    path = folder / "public-000003.safetensors"
    tensors = safetensors.torch.load(path.read_bytes())
    change(tensors)
    path.write_bytes(safetensors.torch.save(tensors))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    resealed(folder / "round-000003.json", digest=digest)


LAYER, MOMENT = "body.0.weight", "optimizer/momentum_buffer/body.0.weight"
PUBLIC = {
    f"{LAYER}' is torch.float32 of shape (1,)": lambda t: t.update({f"state/{LAYER}": torch.ones(1)}),
    f"{LAYER}' is torch.float64": lambda t: t.update({f"state/{LAYER}": t[f"state/{LAYER}"].double()}),
    f"'state/{LAYER}' is missing": lambda t: t.pop(f"state/{LAYER}"),
    "'state/more' is unexpected": lambda t: t.update({"state/more": torch.ones(1)}),
    "'more' is unexpected": lambda t: t.update({"more": torch.ones(1)}),
    "momentum_buffer/body.0.weight' is torch.float32 of shape (1,)": lambda t: t.update(
        {MOMENT: torch.ones(1)}
    ),
    "momentum_buffer/body.0.weight' is torch.float64": lambda t: t.update({MOMENT: t[MOMENT].double()}),
    "'optimizer/momentum_buffer/more' is unexpected": lambda t: t.update(
        {"optimizer/momentum_buffer/more": torch.ones(1)}
    ),
    "'optimizer/exp_avg/body.0.weight' is unexpected": lambda t: t.update(
        {"optimizer/exp_avg/body.0.weight": torch.ones(1)}
    ),
    "'optimizer/step' is unexpected": lambda t: t.update({"optimizer/step": torch.ones(())}),
}


@pytest.mark.parametrize("message", PUBLIC)
def test_a_public_state_fits_exactly_or_gives_way(dataset, saved, message):
    folder, states = saved
    with_public(folder, PUBLIC[message])
    run = build(dataset, **EASY)
    with pytest.warns(UserWarning, match=r"(?s)public-000003\.safetensors.*of round 2, is used") as caught:
        assert checkpoints(folder).restore(run) == 2
    assert message in str(caught[0].message)
    assert not differences(everything(run), states[2])


def test_tensors_of_a_kind_that_pytorch_does_not_have(dataset, saved):
    folder, _ = saved
    header = b'{"w":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + bytes(4)
    (folder / "public-000003.safetensors").write_bytes(data)
    resealed(folder / "round-000003.json", digest=hashlib.sha256(data).hexdigest())
    with pytest.warns(UserWarning, match=r"public-000003\.safetensors: missing or damaged"):
        assert checkpoints(folder).restore(build(dataset, **EASY)) == 2


def with_private(folder, change):
    """The newest private file with another content, encrypted with the same passphrase."""
    path = folder / "private-000003-0.fedkl"
    facts, tensors = lockfile.read(path, kind="checkpoint", passphrase="horse")
    client = sorted(facts)[-1]
    change(facts, tensors, client)
    lockfile.write(path, kind="checkpoint", meta=facts, tensors=tensors, passphrase="horse")


def tensor(name, change):
    """Changes a client's tensor, or takes it away."""

    def apply(facts, tensors, client):
        value = change(tensors.pop(f"{client}/{name}", torch.ones(1)))
        tensors |= {} if value is None else {f"{client}/{name}": value}

    return apply


def fact(name, value):
    return lambda facts, tensors, client: facts[client].update({name: value})


GAMMA = "private/body.1.parametrizations.weight.original0"
MOMENTUM = "optimizer/momentum_buffer/body.0.weight"
KEPT = {
    f"'{GAMMA}' is torch.float32 of shape (1,)": tensor(GAMMA, lambda t: torch.ones(1)),
    f"'{GAMMA}' is torch.float64": tensor(GAMMA, lambda t: t.double()),
    f"'{GAMMA}' is missing": tensor(GAMMA, lambda t: None),
    "'private/more' is unexpected": tensor("private/more", lambda t: t),
    "'secret/key' is torch.float64 of shape (5,)": tensor("secret/key", lambda t: t[:5].clone()),
    "'secret/key' is torch.float32": tensor("secret/key", lambda t: t.float()),
    "'secret/key' is missing": tensor("secret/key", lambda t: None),
    "'secret/more' is unexpected": tensor("secret/more", lambda t: t),
    f"'{MOMENTUM}' is torch.float32 of shape (1,)": tensor(MOMENTUM, lambda t: torch.ones(1)),
    f"'{MOMENTUM}' is torch.float64": tensor(MOMENTUM, lambda t: t.double()),
    "'optimizer/momentum_buffer/more' is unexpected": tensor("optimizer/momentum_buffer/more", lambda t: t),
    "'optimizer/step/body.0.weight' is unexpected": tensor("optimizer/step/body.0.weight", lambda t: t),
    "'others/more' is unexpected": tensor("others/more", lambda t: t),
    "'alone' is unexpected": tensor("alone", lambda t: t),
    "holds no usable key": tensor("secret/key", torch.zeros_like),
    **{
        f"has no number of rounds from 0 to 3{end}": fact("rounds", value)
        for end, value in (("", -1), (".", 4), (". ", True), (". T", "1"), (". Th", 1.0), (". The", None))
    },
    "expected a key of distribution 'normal'": fact("distribution", "uniform"),
    "a key of distribution 'normal'": fact("distribution", ["normal"]),
    "holds nothing of client-": lambda facts, tensors, client: facts.update({client: ["rounds"]}),
    "or was once another": fact("file", "private-000002-0.fedkl"),
    "was once another": lambda facts, tensors, client: facts.pop(client),
}


@pytest.mark.parametrize("message", KEPT)
def test_a_clients_state_fits_exactly_or_gives_way(dataset, saved, message):
    folder, states = saved
    with_private(folder, KEPT[message])
    run = build(dataset, **EASY)
    with pytest.warns(UserWarning, match=r"(?s)private-000003-0\.fedkl.*of round 2, is used") as caught:
        assert checkpoints(folder).restore(run) == 2
    assert message in str(caught[0].message)
    assert not differences(everything(run), states[2])


def test_a_client_that_never_trained_has_no_optimizer_state(dataset, saved):
    folder, _ = saved
    with_private(folder, fact("rounds", 0))
    with pytest.warns(UserWarning, match=r"(?s)momentum_buffer/\S+ is unexpected.*of round 2, is used"):
        assert checkpoints(folder).restore(build(dataset, **EASY)) == 2


@pytest.mark.parametrize("local", [{"momentum": 0.0}, {"keep_optimizer": False}, {"optimizer": "adam"}])
def test_an_optimizers_state_is_of_this_optimizer(dataset, saved, local):
    folder, _ = saved
    run = build(dataset, **EASY | {"local": local})
    untouched, before = everything(run), content(folder)
    with pytest.raises(
        ConfigError, match=r"(?s)does not fit\..*  - 'optimizer/momentum_buffer/\S+ is unexpected"
    ):
        checkpoints(folder).restore(run)
    assert not differences(untouched, everything(run))
    assert content(folder) == before


def test_adam_keeps_all_of_its_state_or_none(dataset, tmp_path):
    options = HARD | {"server": ServerSGD(), "cohort": None, "dropout": 0.0}
    run = build(dataset, **options)
    advanced(run, checkpoints(tmp_path, keep=1), first=0, last=0)
    path = tmp_path / "private-000001-0.fedkl"
    facts, tensors = lockfile.read(path, kind="checkpoint", passphrase="horse")
    del tensors["client-0/optimizer/step/body.0.weight"]
    lockfile.write(path, kind="checkpoint", meta=facts, tensors=tensors, passphrase="horse")
    with pytest.raises(ConfigError, match=r"'optimizer/step/body\.0\.weight' is missing"):
        checkpoints(tmp_path).restore(build(dataset, **options))


def test_a_file_of_another_round_under_this_ones_name_is_refused(dataset, tmp_path):
    """It opens with the passphrase and holds the same clients; only its own name tells."""
    options = EASY | {"cohort": None}
    run, other = (build(dataset, **options) for _ in range(2))
    store = checkpoints(tmp_path)
    first = advanced(run, store, first=0, last=0)
    advanced(run, store, first=1, last=1)
    shutil.copy(tmp_path / "private-000001-0.fedkl", tmp_path / "private-000002-0.fedkl")
    with pytest.warns(UserWarning, match=r"private-000002-0\.fedkl: .*was once another.*of round 1, is used"):
        assert checkpoints(tmp_path).restore(other) == 1
    assert not differences(everything(other), first)


def test_nothing_changes_before_everything_was_found_to_fit(dataset, saved):
    folder, _ = saved
    for path in folder.glob("round-*"):
        resealed(
            path, clients=dict.fromkeys(CLIENTS, path.name.replace("round", "private")[:-5] + "-9.fedkl")
        )
    run = build(dataset, **EASY)
    untouched, before = everything(run), content(folder)
    with pytest.raises(FedKLError, match=r"private-000003-9\.fedkl"):
        checkpoints(folder).restore(run)
    assert not differences(untouched, everything(run))
    assert content(folder) == before


@pytest.mark.parametrize("byte", range(0, 100, 7))
def test_no_flipped_bit_is_taken_for_sound(dataset, saved, byte):
    """Anywhere in the files of the newest checkpoint: what is restored is the newest or the one before."""
    folder, states = saved
    run = build(dataset, **EASY)
    for file in NEWEST.values():
        copy = folder.with_name(f"{folder.name}-{file}")
        shutil.copytree(folder, copy)
        flipped(copy / file, at=byte / 100)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            round = checkpoints(copy).restore(run)
        assert round in (2, 3)
        assert not differences(everything(run), states[round])


@pytest.mark.parametrize("how", [truncated, emptied, flipped])
def test_if_all_are_damaged_the_error_names_the_file(dataset, saved, how):
    folder, _ = saved
    for path in folder.glob("public-*"):
        how(path)
    run = build(dataset, **EASY)
    untouched, before = everything(run), content(folder)
    with pytest.raises(FedKLError, match=r"public-000003\.safetensors"):
        checkpoints(folder).restore(run)
    assert not differences(untouched, everything(run))
    assert content(folder) == before


def test_a_wrong_passphrase_deletes_nothing(dataset, saved):
    folder, states = saved
    before = content(folder)
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        checkpoints(folder, passphrase="donkey").restore(build(dataset, **EASY))
    assert content(folder) == before
    run = build(dataset, **EASY)
    assert checkpoints(folder).restore(run) == 3
    assert not differences(everything(run), states[3])


def test_an_empty_passphrase_is_refused(dataset, tmp_path):
    with pytest.raises(FedKLError, match="passphrase is empty"):
        checkpoints(tmp_path, passphrase="").save(build(dataset, **EASY), round=0)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_other_clients_is_refused(dataset, saved):
    folder, _ = saved
    before = content(folder)
    with pytest.raises(ConfigError, match="a checkpoint of 4 clients, expected 3"):
        checkpoints(folder).restore(build(dataset, **EASY | {"clients": 3}))
    assert content(folder) == before


def forms_of(run):
    """Bytes of all that is private: keys, lock layers, statistics and the optimizer's moments."""
    private = {name: t for name, t in everything(run).items() if name.startswith("client-")}
    found = {name: patterns(tensor) for name, tensor in private.items()}
    kinds = ["/key", "original0", "running_mean", "/optimizer/"]
    assert all(any(kind in name and forms for name, forms in found.items()) for kind in kinds)
    return found


def found_in(folder, forms):
    files = content(folder)
    return {
        name for name, patterns in forms.items() for data in files.values() for p in patterns if p in data
    }


def private_training(dataset, folder):
    """Byte patterns of three rounds' secrets, and the folder that must not hold them."""
    run, store = build(dataset, KeyLock(layers="all", key_length=64), **EASY), checkpoints(folder, keep=9)
    store.save(run, round=0)
    forms = {}
    for round in range(3):
        advanced(run, store, first=round, last=round)
        forms |= {f"{round}/{name}": patterns for name, patterns in forms_of(run).items()}
    return forms


def test_no_private_byte_is_in_any_file(dataset, tmp_path):
    forms = private_training(dataset, tmp_path)
    assert not found_in(tmp_path, forms)
    for data in content(tmp_path).values():
        assert b"parametrizations" not in data
        assert b"momentum_buffer/body" not in data.replace(b"optimizer/momentum_buffer/body", b"")


def test_the_search_for_private_bytes_can_fail(dataset, tmp_path, monkeypatch):
    """Without encryption it finds keys, lock layers, statistics and moments."""
    write = lockfile.write
    monkeypatch.setattr(lockfile, "write", lambda *a, **k: write(*a, **k | {"passphrase": None}))
    found = found_in(tmp_path, private_training(dataset, tmp_path))
    for kind in ("/key", "original0", "running_mean", "/optimizer/"):
        assert any(kind in name for name in found)


def test_private_files_are_for_their_owner_only(dataset, saved):
    folder, _ = saved
    before = os.umask(0)
    try:
        run, store = build(dataset, **EASY), checkpoints(folder)
        store.restore(run)
        advanced(run, store, first=3, last=4)
    finally:
        os.umask(before)
    private = list(folder.glob("private-*"))
    assert private
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}


def test_other_threads_are_warned_about(dataset, saved, two_threads):
    folder, _ = saved
    with pytest.warns(UserWarning, match="1 workers on 1 threads, resumed with 2 on 2.*OMP_NUM_THREADS=1"):
        checkpoints(folder).restore(build(dataset, execution=Execution(workers=2), **EASY))


def failing(monkeypatch, *, at):
    """The disk is full from the `at`-th write on."""
    count, fsync = [0], os.fsync

    def full(handle):
        count[0] += 1
        if count[0] >= at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    return count


@pytest.mark.parametrize("at", range(1, 7))  # each file is synced, and its folder after it
def test_a_full_disk_loses_nothing(dataset, saved, monkeypatch, at):
    folder, states = saved
    run, store = build(dataset, **EASY), checkpoints(folder)
    store.restore(run)
    run.run_round(3)
    with monkeypatch.context() as patch:
        count = failing(patch, at=at)
        said = r"cannot be written \(No space left on device\).*is kept: make room, then the same command"
        with pytest.raises(ConfigError, match=rf"{folder}.*{said}"):
            store.save(run, round=4)
        assert count[0] == at
    assert not list(folder.glob(".*"))
    other = build(dataset, **EASY)
    complete = at == 6  # only the folder's own sync was missing
    shutil.copytree(folder, copy := folder.with_name(f"{folder.name}-copy"))
    assert checkpoints(copy).restore(other) == (4 if complete else 3)
    if not complete:
        assert not differences(everything(other), states[3])
    store.save(run, round=4)  # there is room again
    assert checkpoints(folder).restore(other) == 4
    assert not differences(everything(other), everything(run))


def test_a_folder_that_cannot_be_made_is_named(dataset, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="file"):
        checkpoints(tmp_path / "file").save(build(dataset, **EASY), round=0)
