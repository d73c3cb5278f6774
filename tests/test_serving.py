"""A client's trained model as files: equal outputs, what is in them and what is not, and who refuses them."""

from __future__ import annotations

import copy
import io
import json
import stat
import tempfile
import typing
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn

import fedkl
from fedkl import Key, modelfile, serving
from fedkl.cli import export as command
from fedkl.config import AttackConfig
from fedkl.configured import dataset_of, networks_of
from fedkl.defenses import PrivateLayers, PublicNorm
from fedkl.errors import ConfigError, LockError, SecretError, UpdateError
from fedkl.export import Form
from fedkl.locking import is_private
from fedkl.models.lenet import LeNet
from fedkl.models.resnet_cifar import CifarResNet
from fedkl.models.vit import ViT
from fedkl.parsing import parse_tensors
from fedkl.secret_search import SecretSearch
from tests.locking.leaks import secrets_of

pytestmark = pytest.mark.filterwarnings("ignore:.*isinstance.treespec:FutureWarning")
IMAGES = torch.zeros(1, 3, 32, 32)
SAVED = {"format": "fedkl-model-1", "kind": "private", "client": "hospital-a"}


def key():
    return Key.generate(length=16)


def vit():
    return ViT(channels=3, classes=10, features=24, depth=2, heads=3)


SPLITS = {
    "lenet": lambda: fedkl.lock(LeNet(channels=3, classes=10), key=key()),
    "resnet20, all layers": lambda: fedkl.lock(CifarResNet(channels=3, classes=10), key=key(), layers="all"),
    "vit": lambda: fedkl.lock(vit(), key=key(), layers="all"),
    "per element": lambda: fedkl.lock(
        LeNet(channels=3, classes=10),
        key=key(),
        layers="all",
        granularity="element",
        chained=False,
        example_inputs=IMAGES,
    ),
    "private layers": lambda: fedkl.lock(LeNet(channels=3, classes=10), key=key(), private=["head"]),
    "no lock": lambda: PrivateLayers().prepare(LeNet(channels=3, classes=10)),
}


def train(split, inputs, steps=2):
    """No tensor stays as it was, running statistics and private ones included."""
    optimizer = torch.optim.SGD(split.model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        split.model.train()(inputs).square().mean().backward()
        optimizer.step()
    split.model.eval()
    return split


@pytest.fixture(scope="module", params=SPLITS)
def trained(request):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the transformer's first layer is not locked
        split = SPLITS[request.param]()
    return train(split, torch.rand(8, 3, 32, 32))


def batches():
    return [torch.rand(size, 3, 32, 32) for size in (1, 5)]


def expected(split, inputs):
    with torch.no_grad():
        return split.model.eval()(inputs)


def program_of(path):
    return torch.export.load(path).module()


def run_onnx(path, inputs):
    runtime = pytest.importorskip("onnxruntime")
    session = runtime.InferenceSession(path)
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: inputs.numpy()})[0])


def close(output, wanted, within):
    return float((output.detach() - wanted).abs().max()) <= within * max(1.0, float(wanted.abs().max()))


def test_a_program_gives_the_same_outputs_for_every_batch_size(trained, tmp_path):
    trained.model.train()  # it is saved in eval mode all the same
    serving.save_program(trained, tmp_path / "model.pt2", client="a", example_inputs=IMAGES)
    assert trained.model.training
    program = program_of(tmp_path / "model.pt2")
    for images in batches():
        assert close(program(images), expected(trained, images), 1e-6)


def test_onnx_gives_the_same_outputs_for_every_batch_size(trained, tmp_path):
    pytest.importorskip("onnxruntime")
    serving.save_onnx(trained, tmp_path / "model.onnx", client="a", example_inputs=IMAGES)
    for images in batches():
        assert close(run_onnx(tmp_path / "model.onnx", images), expected(trained, images), 1e-5)


def test_the_state_gives_the_same_outputs(trained, tmp_path):
    serving.save_state(trained, tmp_path / "model.safetensors", client="a")
    again = trained.bake().eval()
    with torch.no_grad():
        for tensor in again.state_dict().values():
            tensor.zero_()
    again.load_state_dict(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    for images in batches():
        assert torch.equal(again(images), expected(trained, images))


class Net(nn.Module):
    """Small, and one of its tensors is long enough to be looked for."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.head = nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.a(x))))


@pytest.fixture
def own():
    return train(fedkl.lock(Net(), key=key()), torch.rand(8, 4))


def save(form, split, path, **options):
    options = {"client": "hospital-a", **options}
    if form != "state":
        options.setdefault("example_inputs", torch.zeros(1, 4))
    if form == "onnx":
        pytest.importorskip("onnx")
    {"state": serving.save_state, "torch": serving.save_program, "onnx": serving.save_onnx}[form](
        split, path, **options
    )
    return Path(path)


FORMS = typing.get_args(Form)


def said_by(form, path):
    if form == "state":
        return parse_tensors(path.read_bytes())[1]
    if form == "torch":
        extra = {serving.MARK: ""}
        torch.export.load(path, extra_files=extra)
        return json.loads(extra[serving.MARK])
    onnx = pytest.importorskip("onnx")
    return {each.key: each.value for each in onnx.load(path).metadata_props}


@pytest.mark.parametrize("form", FORMS)
def test_the_file_says_that_it_is_private_and_whose_and_only_its_owner_may_read_it(own, form, tmp_path):
    path = save(form, own, tmp_path / "new" / "model")
    assert said_by(form, path) == SAVED
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    with pytest.raises(ConfigError, match="exists already"):
        save(form, own, path)
    before = path.read_bytes()
    save(form, train(own, torch.rand(8, 4)), path, replace=True)
    assert path.read_bytes() != before


@pytest.mark.parametrize("form", FORMS)
def test_neither_key_nor_lock_layers_nor_images_nor_file_names_are_in_it(own, form, tmp_path):
    images = torch.rand(2, 4)
    options = {} if form == "state" else {"example_inputs": images}
    data = save(form, own, tmp_path / "model", **options).read_bytes()
    names = [name for name in secrets_of(own) if name == "key" or "parametrizations" in name]
    assert len(names) == 5, "the key, W and b of γ and of β"
    hidden = [secrets_of(own)[name] for name in names]
    assert not SecretSearch([*hidden, images]).in_bytes(data)
    assert SecretSearch([own.model.head.weight]).in_bytes(data), "what is in it is found"
    assert Path(__file__).name.encode() not in data


def test_what_is_in_it_is_private(own, tmp_path):
    """So that nobody takes the file for a harmless one."""
    gamma = own.bake().norm.weight
    for form in ("state", "torch"):
        data = save(form, own, tmp_path / form).read_bytes()
        assert SecretSearch([gamma]).in_bytes(data)
        assert SecretSearch([own.model.norm.running_mean]).in_bytes(data)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_is_left_in_folders_for_temporary_files(own, form, tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    monkeypatch.chdir(folder)
    save(form, own, tmp_path / "out" / "model")
    assert not list(folder.iterdir())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["model"]


class FixedBatch(Net):
    def forward(self, x):
        return super().forward(x) + torch.zeros(len(x), 1)


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_a_network_that_cannot_be_written_is_refused_without_its_numbers(form, tmp_path):
    lock = fedkl.lock(FixedBatch(), key=key())
    with pytest.raises(LockError, match=r"batches of any size \(\w+\).*x\.shape\[0\]") as caught:
        save(form, lock, tmp_path / "model")
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__, "PyTorch's own text may quote the model"
    assert not SecretSearch(lock.secrets()).in_text(str(caught.value))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("form", FORMS)
def test_a_model_that_diverged_is_not_written(own, form, tmp_path):
    with torch.no_grad():
        own.model.norm.running_mean[0] = float("nan")
    with pytest.raises(UpdateError, match=r"'norm\.running_mean' has non-finite values"):
        save(form, own, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_arguments_by_name_and_models_of_several(tmp_path):
    class Two(Net):
        def forward(self, x, y, scale):
            return super().forward(x + y) * scale

    lock = fedkl.lock(Two(), key=key())
    x, y = torch.rand(3, 4), torch.rand(3, 4)
    for number, given in enumerate([(x, y, 2.0), {"x": x, "y": y, "scale": 2.0}]):
        serving.save_program(lock, tmp_path / str(number), client="a", example_inputs=given)
        program = program_of(tmp_path / str(number))
        output = program(**given) if isinstance(given, dict) else program(*given)
        torch.testing.assert_close(output, lock.model.eval()(x, y, 2.0))


def test_onnx_without_its_extra_says_what_to_install(own, tmp_path, monkeypatch):
    monkeypatch.setattr(serving, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'fedkl\[serving\]'"):
        serving.save_onnx(own, tmp_path / "model", client="a", example_inputs=torch.zeros(1, 4))


def test_the_command_takes_the_forms_of_the_library():
    assert typing.get_args(command.Form) == FORMS


# Who refuses such a file.


class Flat(Net):
    def forward(self, x):
        return super().forward(x.flatten(1))


@pytest.fixture
def private_file(own, tmp_path):
    return save("state", own, tmp_path / "own.safetensors")


REFUSED = "own.safetensors: the private model of client 'hospital-a'.*never for a server"


def test_no_reader_of_public_tensors_takes_a_private_model(own, private_file, tmp_path):
    own.save(tmp_path / "lock", passphrase=None)
    with pytest.raises(ConfigError, match=REFUSED):
        modelfile.read_model(private_file)
    with pytest.raises(ConfigError, match=REFUSED):
        fedkl.load_lock(tmp_path / "lock", Net(), passphrase=None, public=private_file)
    images, labels = torch.rand(40, 1, 2, 2), torch.arange(40) % 3
    subject = fedkl.Subject(model=Flat, weights=private_file, images=images, labels=labels)
    with pytest.raises(ConfigError, match=REFUSED):
        subject.build()


def test_an_experiment_does_not_start_from_a_private_model(tmp_path):
    """Its names fit: only the mark tells it from a server's model."""
    lock = fedkl.lock(CifarResNet(channels=3, classes=10), key=key())
    serving.save_state(lock, tmp_path / "own.safetensors", client="hospital-a")
    config = AttackConfig.model_validate(
        {
            "type": "attack",
            "model": {"name": "resnet20", "weights": str(tmp_path / "own.safetensors")},
            "attack": {"type": "prior-only"},
        }
    )
    dataset = dataset_of(config.data)
    with pytest.raises(ConfigError, match=REFUSED):
        networks_of(config, dataset)
    tensors = safetensors.torch.load_file(tmp_path / "own.safetensors")
    safetensors.torch.save_file(tensors, tmp_path / "own.safetensors")
    networks_of(config, dataset)


@pytest.mark.parametrize("form", ["torch", "onnx"])
def test_programs_are_no_public_tensors(own, form, tmp_path):
    own.save(tmp_path / "lock", passphrase=None)
    path = save(form, own, tmp_path / "model")
    with pytest.raises(ConfigError, match="not a safetensors file"):
        fedkl.load_lock(tmp_path / "lock", Net(), passphrase=None, public=path)


# Who knows a baked model.


def test_a_baked_model_is_known_as_one(own, tmp_path):
    baked = own.bake()
    assert is_private(baked)
    assert is_private(copy.deepcopy(baked))
    assert is_private(nn.Sequential(baked.norm)), "the mark is on the module that holds γ and β"
    assert not is_private(nn.Sequential(baked.a, baked.head))
    file = io.BytesIO()
    torch.save(baked, file)
    file.seek(0)
    assert is_private(torch.load(file, weights_only=False))
    assert is_private(PrivateLayers().prepare(Net()).bake())
    assert not any(map(is_private, (own.model, Net(), PublicNorm().prepare(Net()).model)))


def test_the_mark_is_on_modules_and_is_lost_with_them(own):
    """What does not hold: docs/serving.md says so."""
    plain = Net()
    plain.load_state_dict(own.bake().state_dict())
    assert not is_private(plain)


def test_the_state_of_a_baked_model_is_not_written_as_a_public_one(own, tmp_path):
    for state in (own.bake().state_dict(), nn.ModuleDict({"inner": own.bake()}).state_dict()):
        with pytest.raises(SecretError, match=r"state_dict\(\) of one client's own model.*public_state"):
            modelfile.write_model(tmp_path / "model", state, rounds=1)
    assert not list(tmp_path.iterdir())
    modelfile.write_model(tmp_path / "model", own.public_state(), rounds=1)
    modelfile.write_model(tmp_path / "locked", own.model.state_dict(), rounds=1)
    modelfile.write_model(tmp_path / "plain", Net().state_dict(), rounds=1)


class Deep(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.first = nn.Linear(4, 8), nn.BatchNorm1d(8)
        self.b, self.second, self.head = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.second(self.b(torch.relu(self.first(self.a(x))))))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"layers": ["first"], "private": ["head"]}, "second.weight"),
        ({"layers": "all", "private": ["head"], "share_statistics": True}, "first.running_mean"),
        ({"layers": "all"}, "head.weight"),
    ],
)
def test_a_baked_model_is_locked_again_only_if_what_was_private_stays_so(options, named, tmp_path):
    before = fedkl.lock(Deep(), key=key(), layers="all", private=["head"])
    baked = before.bake()
    names = set(baked.state_dict())
    for lock in (fedkl.lock, fedkl.lock_):
        with pytest.raises(SecretError, match="these would be sent") as caught:
            lock(baked, key=key(), **options)
        assert f"'{named}'" in str(caught.value)
    assert set(baked.state_dict()) == names, "lock_ has changed nothing"
    fedkl.lock(Deep(), key=key(), **options).save(tmp_path / "lock", passphrase=None)
    with pytest.raises(SecretError, match="these would be sent"):
        fedkl.load_lock(tmp_path / "lock", baked, passphrase=None)
    again = fedkl.lock(baked, key=key(), layers="all", private=["head"])
    assert again.public_state().keys() == before.public_state().keys()
