"""The lock on models of many kinds: it trains, it withholds, it bakes, and the model stays the user's own."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import fedkl
from fedkl.errors import LockError
from tests.locking.architectures import ARCHITECTURES, FunctionalNorms
from tests.locking.leaks import leaks

OPEN_LAYERS_WARNING = r"ignore:.* parametric layers run before the first lock"
pytestmark = pytest.mark.filterwarnings(OPEN_LAYERS_WARNING)
CASES = [(name, layers) for name in ARCHITECTURES for layers in ("first", "all")]


@pytest.fixture(params=CASES, ids="-".join)
def case(request):
    """An architecture, its plain model and a lock of it."""
    name, layers = request.param
    architecture = ARCHITECTURES[name]
    plain = architecture.model().train(architecture.trains)
    return architecture, plain, fedkl.lock(plain, key=fedkl.Key.generate(length=32), layers=layers)


def states_equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_training_changes_the_lock_layers_and_the_public_parameters(case):
    architecture, _, lock = case
    before_private, before_public = lock.private_state(), lock.public_state()
    optimizer = torch.optim.SGD(lock.model.parameters(), lr=10)
    architecture.loss(lock.model).backward()
    optimizer.step()
    private, public = lock.private_state(), lock.public_state()
    scales = [name for name in lock.private_parameters() if ".weight.original" in f".{name}"]
    assert scales
    assert all(not torch.equal(private[name], before_private[name]) for name in scales)
    assert not states_equal(public, before_public)


def test_no_private_tensor_is_on_a_public_path(case):
    architecture, _, lock = case
    loss = architecture.loss(lock.model)
    assert lock.private_names
    assert lock.private_names.isdisjoint(lock.model.state_dict())
    assert leaks(lock, loss) == []


def test_the_baked_model_gives_the_same_outputs_and_is_plain(case):
    architecture, plain, lock = case
    architecture.loss(lock.model)  # running statistics move
    baked = lock.bake()
    assert baked.state_dict().keys() >= plain.state_dict().keys()
    for training in {False, architecture.trains}:
        a, b = (architecture.call(model.train(training)) for model in (lock.model, baked))
        torch.testing.assert_close(a, b)
    with torch.no_grad():
        torch.testing.assert_close(architecture.call(lock.model.eval()), architecture.call(baked.eval()))
    assert [type(m) for m in baked.modules() if "Parametri" in type(m).__name__] == []


def test_the_model_stays_the_users_own(case):
    _, plain, lock = case
    modules = dict(lock.model.named_modules())
    assert type(lock.model) is type(plain) or "" in lock.layers
    assert inspect.signature(lock.model.forward) == inspect.signature(plain.forward)
    for name, module in plain.named_modules():
        assert isinstance(modules[name], type(module)), name
    assert not any("parametrizations" in name for name, _ in plain.named_modules())


def test_the_public_gradient_covers_every_other_parameter(case):
    architecture, plain, lock = case
    generated = {f"{name}.{tensor}" for name in lock.layers for tensor in ("weight", "bias")}
    expected = {name for name, _ in plain.named_parameters()} - generated
    gradient = lock.public_gradient(architecture.loss(lock.model))
    assert set(gradient) == set(lock.public_parameters()) == expected
    assert all(gradient[name].shape == p.shape for name, p in lock.public_parameters().items())


def test_a_public_state_loads_strictly_into_another_clients_model(case):
    architecture, _, lock = case
    sender, receiver = (
        lock,
        fedkl.lock(lock.bake(), layers=list(lock.layers), key=fedkl.Key.generate(length=32)),
    )
    with torch.no_grad():
        for parameter in sender.model.parameters():
            parameter.add_(0.01)
    private = receiver.private_state()
    receiver.model.load_state_dict(sender.model.state_dict(), strict=True)
    assert states_equal(receiver.public_state(), sender.public_state())
    assert states_equal(receiver.private_state(), private)
    receiver.load_public_state(sender.public_state())
    receiver.load_private_state(sender.private_state())
    receiver.use_key(sender.key)
    a, b = (architecture.call(side.model.eval()) for side in (sender, receiver))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("layers", ["first", "all"])
def test_functional_norms_are_refused(layers):
    with pytest.raises(LockError, match=r"model itself \(FunctionalNorms\) calls layer_norm as a function"):
        fedkl.lock(FunctionalNorms(), layers=layers)


def test_the_frozen_original_is_not_changed_by_lock():
    plain = ARCHITECTURES["lenet"].model()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    fedkl.lock(plain, layers="all")
    assert states_equal(plain.state_dict(), before)
    assert len(list(plain.modules())) == 5


def test_unregistered_norms_of_convnext_are_named_in_the_warning():
    with pytest.warns(UserWarning, match=r"(?s)not registered: .*ConvNextLayerNorm.*register_norm"):
        fedkl.lock(ARCHITECTURES["hf-convnext"].model())


def test_transformer_encoder_in_eval_mode_agrees_with_its_fast_path():
    architecture = ARCHITECTURES["torch-transformer"]
    lock = fedkl.lock(architecture.model(), layers="all")
    lock.model.eval()
    slow = architecture.call(lock.model)
    with torch.no_grad():
        torch.testing.assert_close(architecture.call(lock.model), slow.detach(), rtol=1e-4, atol=1e-5)


def test_the_gradient_of_one_image_is_right_where_tokens_follow_the_norm():
    """PyTorch's batch norm (2.13, CPU) takes the transposed gradient of one image for another."""

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, 8, 2, stride=2)

        def forward(self, x):
            return self.patches(x).flatten(2).transpose(1, 2)

    model = fedkl.lock(Tokens().double(), layers=("patches",)).model
    weights = torch.randn(1, 9, 8, dtype=torch.float64)
    image = torch.rand(1, 3, 6, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: (model(x) * weights).sum(), (image,))
