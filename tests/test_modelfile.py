"""Model files, and a lock with the public tensors of its training: what is read, and what is refused."""

from __future__ import annotations

import stat

import pytest
import safetensors.torch
import torch
from torch import nn

import fedkl
from fedkl import Key, modelfile
from fedkl.errors import ConfigError, FedKLError, LockError, UpdateError
from fedkl.parsing import parse_tensors

PASSPHRASE = "correct horse"


def net():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))


@pytest.fixture
def trained():
    """A lock none of whose tensors is as it was when it was made."""
    lock = fedkl.lock(net(), key=Key.generate(length=16))
    optimizer = torch.optim.SGD(lock.model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        lock.model(torch.rand(16, 4)).square().sum().backward()
        optimizer.step()
    return lock


@pytest.fixture
def lock_file(tmp_path, trained):
    trained.save(tmp_path / "client.lock", passphrase=PASSPHRASE)
    return tmp_path / "client.lock"


def output(lock):
    return lock.model.eval()(torch.linspace(-1, 1, 20).reshape(5, 4))


@pytest.mark.parametrize("as_file", [True, False], ids=["file", "tensors"])
def test_a_lock_with_its_public_tensors_is_the_trained_model(tmp_path, trained, lock_file, as_file):
    public = trained.public_state()
    if as_file:
        modelfile.write_model(tmp_path / "model.safetensors", public, rounds=3)
        public = tmp_path / "model.safetensors"
    plain = net()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    loaded = fedkl.load_lock(lock_file, plain, passphrase=PASSPHRASE, public=public)
    assert torch.equal(output(loaded), output(trained))
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    without = fedkl.load_lock(lock_file, plain, passphrase=PASSPHRASE)
    assert not torch.allclose(output(without), output(trained)), "a lock alone is not the trained model"


def test_a_file_of_another_program_is_read_too(tmp_path, trained, lock_file):
    safetensors.torch.save_file(trained.public_state(), tmp_path / "model", metadata={"format": "pt"})
    loaded = fedkl.load_lock(lock_file, net(), passphrase=PASSPHRASE, public=str(tmp_path / "model"))
    assert torch.equal(output(loaded), output(trained))


ODD = {
    "missing": (lambda state: state.pop("3.bias"), "'3.bias' is missing"),
    "private": (lambda state: state.update({"1.weight": torch.ones(8)}), "'1.weight' is unexpected"),
    "unexpected": (lambda state: state.update({"a\nb": torch.ones(8)}), r"'a\\nb' is unexpected"),
    "a shape": (lambda state: state.update({"3.bias": torch.ones(1)}), r"'3.bias' has shape \(1,\)"),
    "a dtype": (lambda state: state.update({"3.bias": torch.ones(3).double()}), "'3.bias' has dtype"),
    "NaN": (lambda state: state["3.bias"].fill_(float("nan")), "'3.bias' has non-finite values"),
    "infinite": (lambda state: state["3.bias"].fill_(float("inf")), "'3.bias' has non-finite values"),
    "nothing": (lambda state: state.clear(), "'3.bias' is missing"),
}


@pytest.mark.parametrize(("change", "says"), ODD.values(), ids=ODD)
@pytest.mark.parametrize("as_file", [True, False], ids=["file", "tensors"])
def test_other_tensors_than_the_public_ones_are_refused(tmp_path, trained, lock_file, change, says, as_file):
    public = trained.public_state()
    change(public)
    if as_file:
        (tmp_path / "model").write_bytes(safetensors.torch.save(public))
        public = tmp_path / "model"
    with pytest.raises(UpdateError, match=says):
        fedkl.load_lock(lock_file, net(), passphrase=PASSPHRASE, public=public)


def update(trained, kind):
    tensors = trained.public_state()
    if kind == "gradient":
        tensors = trained.public_gradient(trained.model(torch.rand(8, 4)).sum())
    return trained.public_update(tensors, kind=kind, num_samples=8, round=1).to_bytes()


FILES = {
    "none": (lambda path, trained: None, "cannot be read"),
    "a folder": (lambda path, trained: path.mkdir(), "cannot be read"),
    "empty": (lambda path, trained: path.write_bytes(b""), "not a safetensors file"),
    "a pickle": (lambda path, trained: torch.save(trained.public_state(), path), "not a safetensors file"),
    "a lock": (lambda path, trained: trained.save(path, passphrase=PASSPHRASE), "not a safetensors file"),
    "weights of one client": (
        lambda path, trained: path.write_bytes(update(trained, "weights")),
        "this is 'fedkl-update-1'",
    ),
    "a gradient": (
        lambda path, trained: path.write_bytes(update(trained, "gradient")),
        "this is 'fedkl-update-1'",
    ),
    "a format of before": (
        lambda path, trained: path.write_bytes(
            safetensors.torch.save(trained.public_state(), {"format": "fedkl-model-0", "kind": "public"})
        ),
        "this is 'fedkl-model-0'",
    ),
    "another kind": (
        lambda path, trained: path.write_bytes(
            safetensors.torch.save(trained.public_state(), {"format": "fedkl-model-1", "kind": "a\nb"})
        ),
        r"of kind 'a\\nb'",
    ),
}


@pytest.mark.parametrize(("write", "says"), FILES.values(), ids=FILES)
def test_a_wrong_file_is_refused(tmp_path, trained, lock_file, write, says):
    write(tmp_path / "model", trained)
    with pytest.raises(ConfigError, match=says):
        fedkl.load_lock(lock_file, net(), passphrase=PASSPHRASE, public=tmp_path / "model")


def test_what_is_neither_tensors_nor_a_file_is_refused(unchecked, lock_file):
    with pytest.raises(LockError, match="public= must be tensors by name, or a file, got int"):
        fedkl.load_lock(lock_file, net(), passphrase=PASSPHRASE, public=3)
    with pytest.raises(UpdateError, match=r"'0.weight' is a int, expected a Tensor"):
        fedkl.load_lock(lock_file, net(), passphrase=PASSPHRASE, public={"0.weight": 3})


def test_a_model_file_says_what_it_is(tmp_path):
    shared = torch.rand(3, 4)
    tensors = {"a": shared, "b": shared, "turned": shared.T, "count": torch.tensor(3)}
    modelfile.write_model(tmp_path / "new" / "model", tensors, rounds=12)
    read, about = parse_tensors((tmp_path / "new" / "model").read_bytes())
    assert about == {"format": "fedkl-model-1", "kind": "public", "rounds": "12"}
    assert all(torch.equal(read[name], tensor) for name, tensor in tensors.items())
    assert modelfile.read_model(str(tmp_path / "new" / "model")).keys() == tensors.keys()
    mode = stat.S_IMODE((tmp_path / "new" / "model").stat().st_mode)
    assert mode & 0o600 == 0o600
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["model"]


def test_a_file_that_is_there_is_replaced_only_where_that_is_meant(tmp_path):
    path = tmp_path / "model"
    path.write_text("precious")
    with pytest.raises(ConfigError, match="exists already"):
        modelfile.write_model(path, {"w": torch.ones(2)}, rounds=1)
    assert path.read_text() == "precious"
    modelfile.write_model(path, {"w": torch.ones(2)}, rounds=1, replace=True)
    assert modelfile.read_model(path).keys() == {"w"}


@pytest.mark.parametrize("replace", [True, False])
def test_a_link_is_never_written_through(tmp_path, replace):
    (tmp_path / "theirs").write_text("precious")
    (tmp_path / "model").symlink_to(tmp_path / "theirs")
    try:
        modelfile.write_model(tmp_path / "model", {"w": torch.ones(2)}, rounds=1, replace=replace)
    except ConfigError:
        assert not replace
    assert (tmp_path / "theirs").read_text() == "precious"


@pytest.mark.parametrize("place", ["file/model", "folder", "x" * 5000, "null\0character"])
@pytest.mark.parametrize("replace", [True, False])
def test_a_place_that_cannot_be_written(tmp_path, place, replace):
    (tmp_path / "file").write_text("precious")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=r"cannot be written|exists already"):
        modelfile.write_model(tmp_path / place, {"w": torch.ones(2)}, rounds=1, replace=replace)
    assert (tmp_path / "file").read_text() == "precious"


STORED = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)


@pytest.mark.parametrize(
    "tensors",
    [{}, {"w": torch.tensor([1.0, float("nan")])}, {"w": STORED}],
    ids=["none", "NaN", "a kind that is only stored"],
)
def test_what_is_no_trained_model_is_not_written(tmp_path, tensors):
    with pytest.raises(UpdateError, match="not written"):
        modelfile.write_model(tmp_path / "model", tensors, rounds=1)
    assert not (tmp_path / "model").exists()


def test_a_lock_is_replaced_unless_that_is_not_meant(tmp_path, trained, lock_file):
    before = lock_file.read_bytes()
    with pytest.raises(FedKLError, match="exists already"):
        trained.save(lock_file, passphrase=PASSPHRASE, replace=False)
    assert lock_file.read_bytes() == before
    trained.save(lock_file, passphrase=PASSPHRASE)
    assert lock_file.read_bytes() != before
