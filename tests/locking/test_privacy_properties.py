"""Over random models and options: no public path gives a private tensor away; and the search would see it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval

import fedkl
from fedkl.errors import SecretError
from fedkl.locking import keylock, surgery, withholding
from tests.locking.leaks import leaks

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
NORMS = {
    "batch": nn.BatchNorm1d,
    "layer": nn.LayerNorm,
    "rms": nn.RMSNorm,
    "group": lambda features: nn.GroupNorm(1, features),
    "none": lambda features: nn.Identity(),
    "plain": lambda features: nn.BatchNorm1d(features, affine=False),
}


@st.composite
def models(draw):
    widths = draw(st.lists(st.integers(3, 6), min_size=2, max_size=4))
    parts, inputs = [], 5
    for width in widths:
        parts += [nn.Linear(inputs, width), NORMS[draw(st.sampled_from(sorted(NORMS)))](width), nn.Tanh()]
        inputs = width
    return nn.Sequential(*parts, nn.Linear(inputs, 2)).to(draw(st.sampled_from(DTYPES)))


OPTIONS = st.fixed_dictionaries(
    {
        "layers": st.sampled_from(["first", "all", "classifier"]),
        "activation": st.sampled_from(["softplus", "relu", "sigmoid", "tanh", "identity"]),
        "initialization": st.sampled_from(["unit", "published"]),
        "chained": st.booleans(),
    }
)


def locked(model, options):
    lock = fedkl.lock(model, key=fedkl.Key.generate(length=7), **options)
    x = torch.rand(4, 5).to(model[0].weight.dtype)
    optimizer = torch.optim.SGD(lock.model.parameters(), lr=0.1)
    lock.model(x).square().sum().backward()
    optimizer.step()  # private tensors are no constants any more
    return lock, lock.model(x).square().sum()


@pytest.mark.filterwarnings("ignore:.* parametric layers run before the first lock")
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(models(), OPTIONS)
def test_no_public_path_leaks(model, options):
    lock, loss = locked(model, options)
    assert leaks(lock, loss) == []


@pytest.mark.filterwarnings("ignore:.* parametric layers run before the first lock")
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
@given(models(), OPTIONS)
def test_a_released_model_leaks_everything(model, options):
    lock, loss = locked(model, options)
    names = lock.private_names
    withholding.release(lock.model)
    found = "\n".join(leaks(lock, loss))
    assert all(f"state_dict of '': name {name}" in found for name in names)


def model():
    return nn.Sequential(
        nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6)
    )


@pytest.fixture
def options():
    return {"layers": "all"}


def test_the_search_is_silent_on_a_whole_lock(options):
    assert leaks(*locked(model(), options)) == []


def test_the_search_sees_a_split_that_withholds_nothing(options, monkeypatch):
    monkeypatch.setattr(surgery, "withhold", lambda module, names: None)
    monkeypatch.setattr(surgery, "withhold_statistics", lambda module: None)
    found = leaks(*locked(model(), options))
    assert "weights: name 1.parametrizations.weight.original0" in found
    assert "update of weights: bytes of 1.running_mean" in found
    assert "gradient: name 3.parametrizations.bias.original1" in found


def test_the_search_sees_open_statistics(options):
    found = leaks(*locked(model(), {**options, "share_statistics": True}))
    assert {line.split()[-1] for line in found} == {
        "1.running_mean",
        "1.running_var",
        "1.num_batches_tracked",
    }


def test_the_search_sees_one_forgotten_tensor(options):
    lock, loss = locked(model(), options)
    lock.model[3].parametrizations.bias.__dict__[withholding._MARK].names = ("original0",)
    assert {line.split()[-1] for line in leaks(lock, loss)} == {"3.parametrizations.bias.original1"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_search_sees_an_alias_in_every_encoding(options, dtype):
    lock, loss = locked(model(), options)
    secret = lock.private_state()["1.parametrizations.weight.original0"]
    lock.model.register_buffer("harmless", secret.to(dtype))
    found = leaks(lock, loss)
    assert "state_dict of '': bytes of 1.parametrizations.weight.original0" in found
    assert "torch.save of the state of '': bytes of 1.parametrizations.weight.original0" in found


@pytest.mark.parametrize("secret", ["key", "3.weight"])
def test_the_search_sees_the_key_and_generated_scales(options, secret):
    lock, loss = locked(model(), options)
    value = lock.key.reveal() if secret == "key" else lock.model[3].weight
    lock.model.register_buffer("harmless", value.detach().clone())
    assert any(line.endswith(f"bytes of {secret}") for line in leaks(lock, loss))


def test_the_search_sees_a_talkative_repr(options, monkeypatch):
    lock, loss = locked(model(), options)
    secret = lock.private_state()["1.running_mean"]
    text = secret.numpy().tobytes().decode("latin-1")
    monkeypatch.setattr(keylock.Lock, "__repr__", lambda self: text)
    monkeypatch.setattr("tests.locking.leaks.repr", lambda thing: _Latin(repr(thing)), raising=False)
    assert any(line == "repr: bytes of 1.running_mean" for line in leaks(lock, loss))


class _Latin(str):
    def __add__(self, other):
        return _Latin(str.__add__(self, other))

    def encode(self, *_):
        return super().encode("latin-1", "replace")


def fused(lock):
    lock.model.eval()
    lock.model[0] = fuse_conv_bn_eval(lock.model[0], lock.model[1])
    lock.model[1] = nn.Identity()


ALTERATIONS = {
    "scale made ordinary": lambda lock: parametrize.remove_parametrizations(lock.model[1], "weight"),
    "shift made ordinary": lambda lock: parametrize.remove_parametrizations(lock.model[1], "bias"),
    "fused": fused,
    "norm replaced": lambda lock: lock.model.__setitem__(1, nn.Identity()),
    "private layer replaced": lambda lock: lock.model.__setitem__(4, nn.Linear(32, 2)),
}


@pytest.mark.parametrize("alter", ALTERATIONS.values(), ids=ALTERATIONS)
@pytest.mark.filterwarnings("ignore:.*lazy")
def test_an_altered_lock_gives_no_update(alter):
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 2))
    lock, images = fedkl.lock(net, private=["head"]), torch.rand(4, 3, 4, 4)
    lock.model(images)
    state = lock.public_state()
    alter(lock)
    uses = {
        "public_state": lock.public_state,
        "schema": lambda: lock.schema("weights"),
        "schema of gradients": lambda: lock.schema("gradient"),
        "update": lambda: lock.public_update(state, kind="weights", num_samples=1, round=0),
        "gradient": lambda: lock.public_gradient(lock.model(images).sum()),
        "load": lambda: lock.load_public_state(state),
        "parameters": lock.public_parameters,
    }
    for name, use in uses.items():
        with pytest.raises(SecretError, match="the lock was altered") as caught:
            use()
        assert "was private and is no longer there" in str(caught.value), name


def embeddings(secret, like):
    """A private tensor's numbers in a public tensor of this shape, in ways that an accident may take."""
    flat, size = secret.detach().flatten(), like.numel()
    base = like.flatten().clone()

    def put(numbers, start):
        out = base.clone()
        out[start : start + len(numbers)] = numbers.to(out)
        return out.reshape(like.shape)

    part = flat[: min(len(flat), size - 5)]
    for start in (0, 1, 2, 3, 5):
        yield f"at {start}", put(part, start)
    for first in (1, 2, 3):
        yield f"from {first}", put(part[first:], 4)
    yield "end", put(part[-8:], 2)
    for kind in (torch.float16, torch.bfloat16):
        if len(part.to(kind).abs().unique()) == len(part):  # else too coarse to be told from chance
            yield str(kind), put(part.to(kind), 1)
    yield "negative", put(-part, 1)
    if secret.ndim == 2:
        yield "columns", put(secret.detach().T.flatten()[: size - 5], 3)


def test_private_numbers_inside_a_public_tensor_are_refused():
    net = nn.Sequential(nn.Linear(20, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2))
    lock = fedkl.lock(net, key=fedkl.Key.generate(length=64))
    optimizer = torch.optim.SGD(lock.model.parameters(), lr=0.1)
    for _ in range(2):  # so that no private tensor is constant
        optimizer.zero_grad()
        lock.model(torch.rand(8, 20)).square().mean().backward()
        optimizer.step()
    state = lock.public_state()
    lock.public_update(state, kind="weights", num_samples=1, round=0)
    tried = 0
    for secret in [s for s in lock.secrets() if s.is_floating_point() and s.numel() >= 8]:
        for name, tensor in embeddings(secret, state["0.weight"]):
            tried += 1
            tensors = {**state, "0.weight": tensor}
            with pytest.raises(SecretError, match=r"'0\.weight' h.* of a private tensor"):
                assert lock.public_update(tensors, kind="weights", num_samples=1, round=0) is None, name
    assert tried > 60
