"""Every defense does what it says; each test fails if the defense is replaced by a no-op."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fedkl import Key, lock
from fedkl.attacks import Knowledge
from fedkl.defenses import KeyLock, NoDefense, PrivateLayers, PrivateNorm, PublicNorm
from fedkl.defenses.completion import Completion
from fedkl.errors import LockError

STATISTICS = {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
AFFINE = {"1.weight", "1.bias"}
HEAD = {"4.weight", "4.bias"}
PER_ELEMENT = {"1.elementwise.weight", "1.elementwise.bias"}
ELEMENT = KeyLock(granularity="element", input_shape=(3, 8, 8), key_length=16)
SANDWICH = replace(ELEMENT, activation="tanh", private=("head",))
VARIANTS = [ELEMENT, SANDWICH, KeyLock(layers="classifier"), KeyLock(private=("head",))]


@pytest.fixture
def model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


@pytest.mark.parametrize(
    ("defense", "hidden"),
    [
        (NoDefense(), set()),
        (PublicNorm(), STATISTICS),
        (PrivateNorm(), STATISTICS | AFFINE),
        (KeyLock(), STATISTICS | AFFINE),
        (PrivateLayers(), {"4.weight", "4.bias"}),
        (PrivateLayers(layers="stem"), {"0.weight", "0.bias"}),
        (PrivateLayers(layers=("1",)), STATISTICS | AFFINE),
        (KeyLock(share_statistics=True), AFFINE),
        (PrivateNorm(like=KeyLock(share_statistics=True)), AFFINE),
        (ELEMENT, STATISTICS | AFFINE),
        (SANDWICH, STATISTICS | AFFINE | HEAD),
        (PublicNorm(like=SANDWICH), STATISTICS | AFFINE),
        (PrivateNorm(like=SANDWICH), STATISTICS | AFFINE | HEAD),
        (KeyLock(layers="classifier"), STATISTICS),
        (KeyLock(private=("0",)), STATISTICS | AFFINE | {"0.weight", "0.bias"}),
    ],
    ids=lambda value: repr(sorted(value)) if isinstance(value, set) else repr(value),
)
def test_what_is_sent(model, defense, hidden):
    everything = set(model.state_dict())
    assert set(defense.prepare(model).public_state()) - PER_ELEMENT == everything - hidden


def test_public_norm_is_the_baked_lock(model):
    """γ and β vary as the lock's do, and are ordinary trainable parameters."""
    split = PublicNorm().prepare(model)
    assert split.public_parameters()["1.weight"].std() > 0.05
    assert not split.private_parameters()


def test_private_norm_starts_where_any_norm_starts(model):
    split = PrivateNorm().prepare(model)
    assert torch.equal(split.private_parameters()["1.weight"], torch.ones(8))
    assert torch.equal(split.private_parameters()["1.bias"], torch.zeros(8))


@pytest.mark.parametrize("like", VARIANTS, ids=repr)
def test_the_controls_of_every_variant(model, like):
    """All but the statistics is public in one; in the other γ = 1, β = 0, and private layers stay so."""
    public, private = PublicNorm(like=like).prepare(model), PrivateNorm(like=like).prepare(model)
    locked = like.prepare(model)
    assert not public.private_parameters()
    affine = {f"{name}.{tensor}" for name in locked.layers for tensor in ("weight", "bias")}
    assert public.public_parameters().keys() == dict(public.model.named_parameters()).keys() >= affine
    layers = {name for name in locked.private_parameters() if "parametrizations" not in name}
    assert private.private_parameters().keys() == affine | layers
    for name in affine:
        value = private.private_parameters()[name].detach()
        assert torch.equal(value, torch.full_like(value, float(name.endswith("weight"))))
    before = private.private_state()
    private.redraw()
    changed = {name for name, t in private.private_state().items() if not torch.equal(t, before[name])}
    assert changed == layers
    images = torch.rand(2, 3, 8, 8)
    assert public.model(images).shape == private.model(images).shape == (2, 10)


def test_a_lock_per_element_takes_the_shape_of_the_images(model):
    lacking = replace(ELEMENT, input_shape=None)
    with pytest.raises(LockError, match=r"needs input_shape=\(channels, height, width\)"):
        lacking.prepare(model)
    assert lacking.for_images((3, 8, 8)) == ELEMENT == ELEMENT.for_images((3, 9, 9))
    assert PublicNorm(like=lacking).for_images((3, 8, 8)) == PublicNorm(like=ELEMENT)
    assert PrivateNorm(like=lacking).for_images((3, 8, 8)) == PrivateNorm(like=ELEMENT)
    for defense in (NoDefense(), KeyLock(), PrivateLayers(), PublicNorm()):
        assert defense.for_images((3, 8, 8)) == defense


@pytest.mark.parametrize("defense", VARIANTS, ids=repr)
def test_the_servers_view_of_every_variant(model, defense):
    victim = defense.prepare(model)
    view = defense.server_view(victim, model, granted=Knowledge())
    truth = dict(victim.bake().named_parameters())
    own = dict(view.model.named_parameters())
    public = victim.public_parameters()
    assert set(view.private) == own.keys() - public.keys()
    assert len(view.private) == len(set(view.private))
    for name in own:
        assert torch.equal(own[name], truth[name]) == (name in public)  # the rest is the server's own draw
    assert view.secrets.keys().isdisjoint(own)
    assert view.generate(view.secrets).keys() <= set(view.private)
    known = defense.server_view(victim, model, granted=Knowledge(key=True, lock_layers=True)).model
    for name, tensor in known.named_parameters():
        torch.testing.assert_close(tensor, truth[name])


@pytest.mark.parametrize("defense", VARIANTS, ids=repr)
def test_the_server_fills_in_every_variant(model, defense):
    server = defense.prepare(model)
    filled = Completion(server.bake(), server)
    neutral = filled.neutral().model
    for name in defense.prepare(model).layers:
        assert torch.equal(
            neutral.get_parameter(f"{name}.weight"), torch.ones_like(neutral.get_parameter(f"{name}.weight"))
        )
        assert not neutral.get_parameter(f"{name}.bias").any()
    drawn = dict(filled.model.named_parameters())
    for name in {"0.weight", "4.weight"}.intersection(filled.affine):
        assert torch.equal(neutral.get_parameter(name), drawn[name])  # private layers: the server's draw
    images, labels = torch.rand(20, 3, 8, 8), torch.arange(20) % 10
    fitted = filled.neutral().refitted(images, labels, steps=5).model
    for name in filled.affine:
        assert not torch.equal(fitted.get_parameter(name), neutral.get_parameter(name))


def test_published_keys_are_drawn_as_published(model):
    lock = KeyLock(key_distribution="uniform", key_length=64).prepare(model)
    assert (lock.key.distribution, lock.key.length) == ("uniform", 64)


def test_every_client_has_its_own_secrets(model):
    one, two = (KeyLock().prepare(model).private_state() for _ in range(2))
    assert not torch.equal(
        one["1.parametrizations.weight.original0"], two["1.parametrizations.weight.original0"]
    )


@pytest.mark.parametrize(
    ("granted", "exact"),
    [
        (Knowledge(), False),
        (Knowledge(key=True), False),
        (Knowledge(lock_layers=True), False),
        (Knowledge(key=True, lock_layers=True), True),
        (Knowledge(affine=True), True),
    ],
    ids=lambda value: value.describe() if isinstance(value, Knowledge) else str(value),
)
def test_the_servers_view_of_a_lock(model, granted, exact):
    defense = KeyLock()
    victim = defense.prepare(model, key=Key.generate())
    with torch.no_grad():
        victim.public_parameters()["0.weight"].mul_(2)  # the server must see the current public tensors
    view, truth = defense.server_view(victim, model, granted=granted).model, victim.bake()
    assert torch.equal(view[0].weight, truth[0].weight)
    same = torch.allclose(view[1].weight, truth[1].weight) and torch.allclose(view[1].bias, truth[1].bias)
    assert same == exact


def test_the_servers_view_changes_nothing(model):
    defense = KeyLock()
    victim = defense.prepare(model)
    before = victim.private_state()
    defense.server_view(victim, model, granted=Knowledge())
    assert all(torch.equal(before[name], t) for name, t in victim.private_state().items())


def test_every_client_draws_its_own_private_layers(model):
    one, two = (PrivateLayers().prepare(model) for _ in range(2))
    again = one.private_state()
    one.redraw()
    weights = [model[4].weight, again["4.weight"], one.model[4].weight, two.model[4].weight]
    for i, a in enumerate(weights):
        assert a.std().item() == pytest.approx(weights[0].std().item(), rel=0.1)
        assert not any(torch.allclose(a, b, rtol=1e-2) for b in weights[:i])
    assert torch.equal(one.public_state()["0.weight"], model[0].weight)


def test_private_layers_of_the_last_client_vary_as_those_of_the_first(model):
    split = PrivateLayers().prepare(model)
    for _ in range(200):
        split.redraw()
    for name, tensor in split.private_state().items():
        assert tensor.std().item() == pytest.approx(model.get_parameter(name).std().item(), rel=0.6)


class Recurrent(nn.Module):
    """Tokens go in."""

    def __init__(self, first):
        super().__init__()
        self.first, self.middle, self.last = first, nn.Linear(8, 8), nn.Linear(8, 4)


@pytest.mark.parametrize(
    "first",
    [nn.Embedding(20, 8), nn.EmbeddingBag(20, 8), nn.GRU(5, 8), nn.LSTMCell(5, 8), nn.Bilinear(5, 5, 8),
     nn.MultiheadAttention(8, 2)],
    ids=lambda layer: type(layer).__name__,
)  # fmt: skip
def test_the_first_layer_need_not_be_a_convolution(first):
    split = PrivateLayers(layers="stem").prepare(Recurrent(first))
    assert split.private_names == {f"first.{name}" for name, _ in first.named_parameters()}


def test_a_frozen_private_layer_stays_as_the_model_has_it(model):
    """Another draw would destroy a pretrained layer, which nobody trains again."""
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"'0\.weight'.*frozen.*Unfreeze it"):
        split = PrivateLayers(layers=("0", "4")).prepare(model)
    split.redraw()
    assert torch.equal(split.private_state()["0.weight"], model[0].weight)
    assert not torch.equal(split.private_state()["4.weight"], model[4].weight)
    with pytest.warns(UserWarning, match=r"'0\.weight'.*frozen.*Unfreeze it"):
        locked = lock(model, layers=["1"], private=["stem"])
    assert torch.equal(locked.private_state()["0.weight"], model[0].weight)


def test_private_layers_of_a_model_that_is_not_trained_are_drawn(model):
    split = PrivateLayers(layers="stem").prepare(model.requires_grad_(False))
    assert not torch.equal(split.private_state()["0.weight"], model[0].weight)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (("nowhere",), "'nowhere' is not a module of this model"),
        (("2",), r"'2' \(ReLU\) has no parameters to keep private"),
        ((), "layers is empty"),
        (("",), "'' is not a module of this model"),
        (("0", "1", "4"), "no parameter is left to send"),
    ],
)
def test_private_layers_must_exist(model, layers, message):
    with pytest.raises(LockError, match=r"PrivateLayers: these layers cannot be private\.\n  - .*" + message):
        PrivateLayers(layers=layers).prepare(model)
