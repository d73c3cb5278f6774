"""The lock under what PyTorch does to models: copies, dtypes, compilation, functional calls, checkpoints."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import fedkl
from fedkl.locking.layers import LockLayer
from fedkl.locking.surgery import lock_layers

remembering = pytest.mark.skipif(
    torch.__version__.startswith("2.6."),
    reason="PyTorch 2.6 shows no hooks on saved tensors: nothing is remembered",
)


class Net(nn.Module):
    """Three norms in a chain, the last two in a part that can be checkpointed."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh())
        self.body = nn.Sequential(
            nn.Linear(8, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8)
        )
        self.head = nn.Linear(8, 3)
        self.reentrant = None

    def forward(self, x):
        x = self.stem(x)
        if self.reentrant is None:
            return self.head(self.body(x))
        return self.head(checkpoint(self.body, x, use_reentrant=self.reentrant))


@pytest.fixture
def lock():
    return fedkl.lock(Net(), key=fedkl.Key.generate(length=16), layers="all")


@pytest.fixture
def x():
    return torch.rand(4, 6)


def loss_of(model, x):
    return model(x).square().sum()


def gradients(model, x):
    model.zero_grad()
    loss_of(model, x).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name])


def test_a_deep_copy_is_independent_and_its_chain_refers_to_itself(lock, x):
    expected = lock.model(x)
    replica = copy.deepcopy(lock)
    with torch.no_grad():
        for parameter in lock.model.parameters():
            parameter.zero_()
    torch.testing.assert_close(replica.model(x), expected)
    modules = {id(module) for module in replica.model.modules()}
    chains = {id(layer.chain): layer.chain for layer in lock_layers(replica.model)}
    assert [len(chain) for chain in chains.values()] == [3, 3]
    assert all(id(norm) in modules for chain in chains.values() for norm, _ in chain._norms)
    assert chains.keys().isdisjoint(id(layer.chain) for layer in lock_layers(lock.model))
    replica.model.load_state_dict(lock.public_state())
    assert replica.private_names == lock.private_names
    assert replica.private_names.isdisjoint(replica.model.state_dict())


def test_a_deep_copy_has_gradients_of_its_own(lock, x):
    replica = copy.deepcopy(lock.model)
    expected = gradients(lock.model, x)
    lock.model.zero_grad()
    assert_same(gradients(replica, x), expected)
    assert all(parameter.grad is None for parameter in lock.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_to_another_dtype_takes_the_key_along(lock, x, dtype):
    expected = lock.model(x)
    lock.model.to(dtype)
    assert {layer.chain._key.dtype for layer in lock_layers(lock.model)} == {dtype}
    output = lock.model(x.to(dtype))
    assert output.dtype == dtype
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    gradients(lock.model, x.to(dtype))
    other = fedkl.Key.generate(length=16)
    lock.use_key(other)
    assert {layer.chain._key.dtype for layer in lock_layers(lock.model)} == {dtype}


@pytest.mark.parametrize("norm", [nn.BatchNorm1d, nn.LayerNorm])
def test_autocast(norm, x):
    lock = fedkl.lock(
        nn.Sequential(nn.Linear(6, 8), norm(8), nn.Linear(8, 3)), key=fedkl.Key.generate(length=16)
    )
    expected = lock.model(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lock.model[1].weight.dtype == torch.float32
        output = lock.model(x)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    gradient = lock.public_gradient(output.float().sum())
    assert all(g.dtype == torch.float32 for g in gradient.values())


def test_compile_in_one_graph_follows_the_key(lock, x):
    compiled = torch.compile(lock.model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), lock.model(x))
    expected = gradients(lock.model, x)
    lock.model.zero_grad()
    compiled(x).square().sum().backward()
    assert_same({name: p.grad for name, p in lock.model.named_parameters()}, expected)
    before = lock.model(x)
    lock.use_key(fedkl.Key.generate(length=16))
    assert not torch.allclose(lock.model(x), before)
    torch.testing.assert_close(compiled(x), lock.model(x))


def test_functional_call_swaps_private_tensors_too(lock, x):
    named = dict(lock.model.named_parameters())
    zeros = {name: torch.zeros_like(p) for name, p in named.items() if "parametrizations" in name}
    swapped = functional_call(lock.model, {**named, **zeros}, (x,))
    baked = lock.bake()
    with torch.no_grad():
        for norm in (baked.stem[1], baked.body[1], baked.body[4]):
            norm.weight.fill_(math.log(2))  # softplus(0)
            norm.bias.fill_(math.log(2))
    torch.testing.assert_close(swapped, baked(x))


def test_functional_gradients_agree_with_autograd(lock, x):
    named = {name: p.detach() for name, p in lock.model.named_parameters()}
    functional = grad(lambda parameters: functional_call(lock.model, parameters, (x,)).square().sum())(named)
    assert_same(functional, gradients(lock.model, x))


def test_per_sample_gradients_with_vmap(lock, x):
    named = {name: p.detach() for name, p in lock.model.named_parameters()}

    def loss(parameters, sample):
        return functional_call(lock.model, parameters, (sample.unsqueeze(0),)).square().sum()

    each = vmap(grad(loss), in_dims=(None, 0))(named, x)
    assert_same({name: g.sum(0) for name, g in each.items()}, gradients(lock.model, x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_gives_the_same_gradients(lock, x, reentrant):
    expected = gradients(lock.model, x)
    lock.model.reentrant = reentrant
    assert_same(gradients(lock.model, x), expected)


def test_the_whole_model_can_be_checkpointed(lock, x):
    expected = gradients(lock.model, x)
    lock.model.zero_grad()
    checkpoint(lock.model, x, use_reentrant=False).square().sum().backward()
    assert_same({name: p.grad for name, p in lock.model.named_parameters()}, expected)


def test_a_chain_without_its_memory_gives_the_same(lock, x):
    expected, output = gradients(lock.model, x), lock.model(x)
    lock.model._forward_pre_hooks.clear()
    torch.testing.assert_close(lock.model(x), output, rtol=0, atol=0)
    assert_same(gradients(lock.model, x), expected)


@remembering
def test_every_lock_of_a_chain_generates_once_in_a_forward_pass(lock, x, monkeypatch):
    calls = []
    compute = LockLayer.compute
    monkeypatch.setattr(
        LockLayer, "compute", lambda self, *given: calls.append(self) or compute(self, *given)
    )
    lock.model(x)
    assert len(calls) == len(set(map(id, calls))) == 6


@remembering
@pytest.mark.parametrize("chained", [True, False])
def test_all_locks_generate_before_the_models_own_layers(x, chained, monkeypatch):
    lock = fedkl.lock(Net(), key=fedkl.Key.generate(length=16), layers="all", chained=chained)
    seen = []
    compute = LockLayer.compute
    monkeypatch.setattr(
        LockLayer, "compute", lambda self, *given: seen.append("lock") or compute(self, *given)
    )
    lock.model.stem[0].register_forward_pre_hook(lambda *_: seen.append("network"))
    lock.model(x)
    assert seen == [*6 * ["lock"], "network"]


def test_a_baked_model_holds_no_hook_with_the_key(lock):
    plain = lock.bake()
    assert not plain._forward_pre_hooks
    assert not plain._forward_hooks
    assert lock.model._forward_pre_hooks
    assert lock.model._forward_hooks


def test_nothing_generated_outlives_a_forward_pass(lock, x):
    chain = lock_layers(lock.model)[0].chain
    lock.model(x)
    assert chain._remembered is None
    with pytest.raises(RuntimeError):
        lock.model(torch.rand(4, 7))
    assert chain._remembered is None
    copy.deepcopy(lock.model)


def test_no_grad_inside_a_forward_pass_does_not_cut_the_gradient(x):
    class Probing(Net):
        def forward(self, x):
            with torch.no_grad():
                self.body(self.stem(x))
            return super().forward(x)

    lock = fedkl.lock(Probing(), key=fedkl.Key.generate(length=16), layers="all")
    assert all(g.abs().sum() > 0 for name, g in gradients(lock.model, x).items() if "original" in name)


def test_no_grad_and_inference_mode(lock, x):
    expected = lock.model(x)
    with torch.no_grad():
        output = lock.model(x)
    assert not output.requires_grad
    torch.testing.assert_close(output, expected.detach())
    with torch.inference_mode():
        torch.testing.assert_close(lock.model(x), expected.detach())
    gradients(lock.model, x)


def test_train_and_eval_reach_the_locked_norm():
    lock = fedkl.lock(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)))
    lock.model.eval()
    before = lock.model[1].running_mean.clone()
    lock.model(torch.rand(4, 6))
    assert torch.equal(lock.model[1].running_mean, before)
    lock.model.train()
    lock.model(torch.rand(4, 6))
    assert not torch.equal(lock.model[1].running_mean, before)


def test_an_inserted_norm_takes_its_layers_mode_and_dtype():
    lock = fedkl.lock(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 3)).double().eval())
    norm = lock.model[0].norm
    assert not norm.training
    assert norm.weight.dtype == norm.running_var.dtype == torch.float64


def test_the_model_can_become_part_of_a_larger_one(x):
    lock = fedkl.lock(Net(), key=fedkl.Key.generate(length=16), layers="all")
    whole = nn.Sequential(nn.Identity(), lock.model)
    assert set(whole.state_dict()) == {f"1.{name}" for name in lock.model.state_dict()}
    torch.testing.assert_close(whole(x), lock.model(x))
    plain = lock.bake()
    torch.testing.assert_close(plain(x), lock.model(x))


def test_a_gradient_through_the_gradient(lock, x):
    named = lock.public_parameters()
    first = torch.autograd.grad(loss_of(lock.model, x), list(named.values()), create_graph=True)
    second = torch.autograd.grad(
        sum(g.square().sum() for g in first), list(lock.private_parameters().values())
    )
    assert all(torch.isfinite(g).all() for g in second)


@pytest.mark.parametrize("layers", ["all", "reversed"])
def test_a_very_long_chain(x, layers):
    parts = [part for _ in range(100) for part in (nn.Linear(6, 6), nn.LayerNorm(6))]
    plain = nn.Sequential(*parts[::-1]) if layers == "reversed" else nn.Sequential(*parts)
    lock = fedkl.lock(plain, key=fedkl.Key.generate(length=4), layers="all")
    last = copy.deepcopy(lock.model.get_submodule(lock.layers[-1]))
    assert torch.equal(last.weight, lock.model.get_submodule(lock.layers[-1]).weight)
    torch.testing.assert_close(copy.deepcopy(lock).bake()(x), lock.model(x))


def test_swapped_tensors_are_used_within_one_forward_pass(x):
    class Twice(Net):
        swap = None

        def forward(self, x):
            first = super().forward(x)
            other = nn.Sequential(self.stem, self.body, self.head)
            return first, functional_call(other, self.swap, (x,)) if self.swap else other(x)

    lock = fedkl.lock(Twice(), key=fedkl.Key.generate(length=16), layers="all")
    first, second = lock.model(x)
    assert torch.equal(first, second)
    lock.model.swap = {
        f"{index}.{name}": torch.zeros_like(p)
        for index, part in enumerate((lock.model.stem, lock.model.body))
        for name, p in part.named_parameters()
        if "parametrizations" in name
    }
    first, second = lock.model(x)
    assert not torch.allclose(first, second)
