"""A trained model keeps its function when it is locked; an untrained one's γ and β are drawn as ever."""

from __future__ import annotations

import copy
import hashlib
import warnings
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedkl
from fedkl import Key, keys, lockfile
from fedkl.attacks import Knowledge
from fedkl.defenses import KeyLock, PrivateNorm, PublicNorm
from fedkl.errors import KeyFileError, LockError
from fedkl.federated.client import clients_of
from fedkl.locking import is_trained
from fedkl.models import build_model
from tests.locking.architectures import LeNet

IMAGES = torch.rand(8, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(8) % 4
ELEMENT = {"granularity": "element", "example_inputs": IMAGES[:1]}


def block(inputs, outputs):
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class Residual(nn.Module):
    """A small ResNet."""

    def __init__(self):
        super().__init__()
        self.stem, self.inner = block(3, 8), nn.Sequential(nn.Conv2d(8, 8, 3, 1, 1), nn.BatchNorm2d(8))
        self.last, self.head = block(8, 6), nn.Linear(6, 4)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.last(torch.relu(x + self.inner(x))).mean((2, 3)))


def plain_lenet():
    return nn.Sequential(block(3, 6), block(6, 4), nn.Flatten(), nn.Linear(64, 4))


def with_layer_norms():
    return nn.Sequential(
        nn.Flatten(), nn.Linear(768, 8), nn.LayerNorm(8), nn.ReLU(), nn.RMSNorm(8), nn.Linear(8, 4)
    )


MODELS = {"resnet": Residual, "lenet": plain_lenet, "layer-norms": with_layer_norms}


def trained(make=Residual, *, low=None, high=None):
    """After a few steps; γ and β squeezed into an interval if one is given."""
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(10):
        optimizer.zero_grad()
        F.cross_entropy(model(IMAGES), LABELS).backward()
        optimizer.step()
    for module in model.modules():
        if low is not None and fedkl.locking.norms.is_affine_norm(module):
            for parameter in module.parameters(recurse=False):
                nn.init.uniform_(parameter, low, high)
    return model.eval()


# Where each activation can give γ and β.
REACH = {
    "softplus": (0.1, 3.0),
    "relu": (0.1, 3.0),
    "sigmoid": (0.1, 0.9),
    "tanh": (-0.9, 0.9),
    "identity": (None, None),
}


def assert_same_function(lock, model):
    with torch.no_grad():
        torch.testing.assert_close(lock.model.eval()(IMAGES), model(IMAGES), rtol=0, atol=1e-5)


@pytest.mark.parametrize("activation", REACH)
@pytest.mark.parametrize("chained", [True, False])
@pytest.mark.parametrize("initialization", ["unit", "published"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_trained_model_keeps_its_logits(kind, activation, chained, initialization):
    low, high = REACH[activation]
    model = trained(MODELS[kind], low=low, high=high)
    before = copy.deepcopy(model.state_dict())
    options = {"activation": activation, "chained": chained, "initialization": initialization}
    lock = fedkl.lock(model, key=Key.generate(length=64), layers="all", **options)
    assert lock.kept == lock.layers
    assert_same_function(lock, model)
    secrets = lock.private_state()
    lock.redraw()
    assert_same_function(lock, model)
    drawn = [name for name in secrets if name.endswith("original0")]
    assert drawn
    assert not any(torch.equal(lock.private_state()[name], secrets[name]) for name in drawn)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("activation", ["softplus", "tanh", "identity"])
@pytest.mark.parametrize("kind", ["resnet", "lenet"])
def test_so_does_a_lock_per_element(kind, activation):
    low, high = REACH[activation]
    model = trained(MODELS[kind], low=low, high=high)
    for layers in ("first", "all"):
        lock = fedkl.lock(
            model, key=Key.generate(length=16), layers=layers, activation=activation, chained=False, **ELEMENT
        )
        assert_same_function(lock, model)
        lock.redraw()
        assert_same_function(lock, model)
    baked = lock.bake()  # whose norms are per element already
    assert_same_function(
        fedkl.lock(baked, layers="all", activation="identity", chained=False, **ELEMENT), model
    )


@pytest.mark.parametrize("share", [True, False])
def test_in_place_baked_saved_and_redrawn(tmp_path, share):
    model = trained()
    lock = fedkl.lock_(copy.deepcopy(model), layers="all", activation="identity", share_statistics=share)
    assert_same_function(lock, model)
    with torch.no_grad():
        torch.testing.assert_close(lock.bake()(IMAGES), model(IMAGES), rtol=0, atol=1e-5)
    optimizer = torch.optim.SGD(lock.model.parameters(), lr=0.1)
    F.cross_entropy(lock.model(IMAGES), LABELS).backward()
    optimizer.step()
    lock.save(tmp_path / "lock", passphrase=None)
    untrained = Residual().eval()
    untrained.load_state_dict(lock.public_state(), strict=False)
    loaded = fedkl.load_lock(tmp_path / "lock", untrained, passphrase=None)
    assert torch.equal(loaded.model(IMAGES), lock.model(IMAGES))
    assert loaded.kept == lock.kept
    for one in (lock, loaded):
        one.redraw()
        gamma = one.bake().stem[1].weight
        torch.testing.assert_close(gamma, model.stem[1].weight)  # not what this client has made of it


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_to_the_precision_of_the_norm(dtype):
    model = trained().to(dtype)
    lock = fedkl.lock(model, activation="identity", layers="all")
    for name in lock.layers:
        locked, norm = lock.model.get_submodule(name), model.get_submodule(name)
        bound = 16 * torch.finfo(dtype).eps
        torch.testing.assert_close(locked.weight, norm.weight, rtol=bound, atol=bound)
        torch.testing.assert_close(locked.bias, norm.bias, rtol=bound, atol=bound)


def test_what_starts_in_no_state_and_on_no_path():
    model = trained()
    lock = fedkl.lock(model, activation="identity", layers="all")
    gamma = model.stem[1].weight.detach()
    tensors = [*lock.model.parameters(), *lock.model.buffers(), *lock.public_state().values()]
    assert not any(tensor.shape == gamma.shape and torch.equal(tensor, gamma) for tensor in tensors)


# What the activation cannot give.


def test_the_refusal_names_layers_and_activations():
    model = trained(low=-0.5, high=0.5)
    with pytest.raises(LockError) as caught:
        fedkl.lock(model, layers="all")
    message = str(caught.value)
    assert "This model is trained, and activation='softplus' cannot give all of its γ and β." in message
    assert "'stem.1.weight' is not above 0 everywhere" in message
    assert "'inner.1.bias' is not above 0 everywhere" in message
    assert "activation='tanh' or 'identity', which can" in message
    assert "start='drawn'" in message
    with pytest.raises(LockError, match=r"'stem\.1\.weight' is not in \(0, 1\) everywhere"):
        fedkl.lock(model, activation="sigmoid")
    with pytest.raises(LockError, match=r"activation='softplus' or 'relu' or 'identity', which can"):
        fedkl.lock(trained(low=0.5, high=1.5), activation="tanh", layers="all", key=Key.generate(length=8))


@pytest.mark.parametrize("activation", ["relu", "softplus"])
def test_zeros_are_not_given(activation):
    model = trained(low=0.1, high=1.0)
    with torch.no_grad():
        model.stem[1].bias[2] = 0
    with pytest.raises(LockError, match=r"'stem\.1\.bias' is not above 0"):
        fedkl.lock(model, activation=activation)
    assert_same_function(fedkl.lock(model, activation="identity"), model)


def test_values_that_are_not_finite_are_refused():
    model = trained()
    model.stem[1].weight.data[0] = torch.nan
    with pytest.raises(LockError, match="Mend non-finite values"):
        fedkl.lock(model, activation="identity")


def test_a_refused_model_is_unchanged_in_place():
    model = trained()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(LockError):
        fedkl.lock_(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_drawn_starts_are_drawn_in_any_case(unchecked):
    lock = fedkl.lock(trained(), start="drawn")
    assert lock.kept == ()
    assert lock.bake().stem[1].bias.min() > 0
    with pytest.raises(LockError, match=r"start='nothing' is unknown. Choose one of model, drawn"):
        fedkl.lock(trained(), start="nothing")


def test_an_inserted_norm_in_a_trained_model_is_warned_about():
    with pytest.warns(UserWarning, match=r"trained, and the norms that are inserted at last\.0 change"):
        fedkl.lock(trained(), layers=["stem.1", "last.0"], activation="identity")


# What counts as trained.


def test_what_counts_as_trained():
    assert not is_trained(Residual())
    assert is_trained(trained())
    residual = Residual()
    nn.init.zeros_(residual.inner[1].weight)  # as residual branches may begin
    residual(IMAGES)
    assert not is_trained(residual)
    uniform = build_model("resnet20", channels=3, classes=10, seed=0, initialization="uniform")
    assert not is_trained(uniform)  # no batch has changed its statistics
    assert not is_trained(LeNet())
    vit = build_model("vit-tiny", channels=3, classes=10, seed=0, initialization="uniform")
    assert is_trained(vit)  # or looks so
    with pytest.warns(UserWarning, match="parametric layers run before"):
        assert KeyLock().for_untrained().prepare(vit).kept == ()


def test_one_trained_norm_keeps_all_of_them():
    model = trained()
    nn.init.ones_(model.stem[1].weight)  # frozen, say
    nn.init.zeros_(model.stem[1].bias)
    assert_same_function(fedkl.lock(model, activation="identity"), model)
    with pytest.raises(LockError, match=r"'stem\.1\.bias' is not above 0"):
        fedkl.lock(model)


# An untrained model, bit for bit.


class Stream:
    """The operating system's generator, replaced by a fixed stream; notes how much was asked for."""

    def __init__(self):
        self.sizes = []

    def __call__(self, size):
        self.sizes.append(size)
        return hashlib.shake_256(b"%d" % len(self.sizes)).digest(size)


@pytest.fixture
def stream(monkeypatch):
    result = Stream()
    monkeypatch.setattr(keys.os, "urandom", result)
    return result


def digest(state):
    content = b"".join(name.encode() + state[name].numpy().tobytes() for name in sorted(state))
    return hashlib.sha256(content).hexdigest()


# Recorded before trained models kept their function; every step of it is exact.
PUBLISHED = "2af96e9f69dabce280aa97480f080d43ebcb5d3d7c0c6c5b7da4b3d3b7256cad"


def untrained():
    torch.manual_seed(0)
    return plain_lenet()


@pytest.mark.parametrize("activation", ["relu", "sigmoid", "tanh"])
@pytest.mark.parametrize("start", [{}, {"start": "drawn"}])
def test_the_published_lock_is_drawn_as_it_was(stream, activation, start):
    key = Key.generate(length=16, distribution="uniform")
    lock = fedkl.lock(
        untrained(), key=key, layers="all", activation=activation, initialization="published", **start
    )
    private = {n: t for n, t in lock.private_state().items() if "parametrizations" in n}
    assert stream.sizes == [8 * n for n in (16, 96, 6, 96, 6, 24, 4, 24, 4)]
    assert digest(private) == PUBLISHED


@pytest.mark.parametrize("activation", ["softplus", "relu", "sigmoid", "tanh", "identity"])
def test_the_unit_lock_is_drawn_as_it_was(stream, activation):
    key = Key.generate(length=16)
    lock = fedkl.lock(untrained(), key=key, layers="all", activation=activation)
    assert stream.sizes == [8 * n for n in (16, 96, 96, 24, 24)]
    again, bias = Stream(), {"softplus": 0.5413, "relu": 1, "identity": 1}.get(activation, 0)
    again(128)
    for norm in (lock.model[0][1], lock.model[1][1]):
        for name, start in (("weight", bias), ("bias", 0)):
            before = getattr(lock.model[0][1], name).detach() if norm is lock.model[1][1] else key.reveal()
            part = norm.parametrizations[name]
            keys.os.urandom = again
            drawn = keys.secure_normal(*part.original0.shape) / before.float().double().norm()
            torch.testing.assert_close(part.original0.detach(), drawn.float(), rtol=1e-6, atol=0)
            assert part.original1.tolist() == pytest.approx([start] * len(part.original1), abs=1e-4)


# Clients, controls and the server.


def test_every_client_of_a_federation_starts_at_the_model():
    model, defense = trained(), KeyLock(layers="all", activation="identity", key_length=16)
    split = defense.prepare(model)
    clients = clients_of([torch.arange(2)] * 3, defense, model)
    for client in clients:
        client.enter(split, split.public_state())
        assert_same_function(split, model)
    names = [name for name in split.private_parameters() if name.endswith("original0")]
    first, second = (client.private_state for client in clients[:2])
    assert not any(torch.equal(first[name], second[name]) for name in names)


def test_the_controls_start_at_the_model_too():
    model, like = trained(), KeyLock(layers="all", activation="identity", key_length=16)
    for control in (PublicNorm(like=like), PrivateNorm(like=like)):
        assert_same_function(control.prepare(model), model)
    drawn = PrivateNorm(like=like).for_untrained().prepare(model)
    assert torch.equal(drawn.model.stem[1].weight, torch.ones(8))
    assert PublicNorm(like=like).for_untrained().like.start == "drawn"


def test_the_server_knows_the_start_and_not_what_the_client_made_of_it():
    model, defense = trained(), KeyLock(activation="identity", key_length=16)
    victim = defense.prepare(model)
    optimizer = torch.optim.SGD(victim.model.parameters(), lr=0.5)
    F.cross_entropy(victim.model(IMAGES), LABELS).backward()
    optimizer.step()
    now = victim.bake().stem[1].weight
    assert not torch.allclose(now, model.stem[1].weight, atol=1e-4)
    seen = defense.server_view(victim, model, granted=Knowledge()).model.stem[1].weight
    torch.testing.assert_close(seen, model.stem[1].weight)
    torch.manual_seed(2)
    fresh = defense.server_view(victim, Residual(), granted=Knowledge()).model.stem[1].weight
    for known in (now, model.stem[1].weight):
        assert not torch.allclose(fresh, known, atol=0.05)
    hidden = replace(defense, start="drawn").server_view(victim, model, granted=Knowledge())
    assert not torch.allclose(hidden.model.stem[1].weight, model.stem[1].weight, atol=0.05)


# Files.


@pytest.mark.parametrize(
    "damage",
    [
        {"start/nowhere.weight": torch.ones(8)},
        {"start/stem.1.weight": torch.ones(7)},
        {"start/stem.1.weight": torch.full((8,), torch.inf)},
        {"start/stem.1.weight": torch.ones(8, dtype=torch.int64)},
    ],
)
def test_starts_that_do_not_fit_are_refused(tmp_path, damage):
    path = tmp_path / "lock"
    fedkl.lock(trained(), activation="identity").save(path, passphrase=None)
    meta, tensors = lockfile.read(path, kind="lock", passphrase=None)
    lockfile.write(path, kind="lock", meta=meta, tensors=tensors | damage, passphrase=None)
    with pytest.raises(KeyFileError, match=r"this lock belongs to another model|finite"):
        fedkl.load_lock(path, Residual(), passphrase=None)


def test_an_untrained_lock_has_no_start_in_its_file(tmp_path):
    fedkl.lock(Residual()).save(tmp_path / "lock", passphrase=None)
    _, tensors = lockfile.read(tmp_path / "lock", kind="lock", passphrase=None)
    assert not any(name.startswith("start/") for name in tensors)


def test_a_warning_free_lock_of_a_trained_model():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fedkl.lock(trained(), activation="identity")
