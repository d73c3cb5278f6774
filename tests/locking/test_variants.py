"""Locks per element, before the classifier, signed, and with private layers: what they compute and keep."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fedkl
from fedkl import Key, lockfile
from fedkl.errors import KeyFileError, LockError, SecretError
from fedkl.locking import ElementwiseAffine
from tests.locking.architectures import LeNet
from tests.locking.leaks import leaks

IMAGES = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(1))
LABELS = torch.tensor([0, 1, 2, 3])
ELEMENT = {"granularity": "element", "example_inputs": IMAGES[:1]}
VARIANTS = {
    "element": ELEMENT,
    "element-tanh": {**ELEMENT, "activation": "tanh"},
    "element-all": {**ELEMENT, "layers": "all", "chained": False},
    "classifier": {"layers": "classifier"},
    "tanh-chain": {"layers": "all", "activation": "tanh"},
    "private-head": {"private": ("head",)},
    "private-stem": {"private": ("stem",)},
    "private-overlap": {"private": ["c1", "c3"], "share_statistics": True},
    "sandwich": {**ELEMENT, "activation": "tanh", "private": ("head", "c2")},
}
PRIVATE = {
    "private-head": {"fc"},
    "private-stem": {"c1"},
    "private-overlap": {"c1", "c3"},
    "sandwich": {"fc", "c2"},
}


def net():
    torch.manual_seed(0)
    return LeNet()


def locked(**options):
    return fedkl.lock(net(), key=Key.generate(length=16), **options)


def loss_of(model):
    return F.cross_entropy(model(IMAGES), LABELS)


@pytest.fixture(params=VARIANTS)
def variant(request):
    """Its name, its options and a lock of it that has trained for one step."""
    options = VARIANTS[request.param]
    lock = locked(**options)
    loss_of(lock.model).backward()
    torch.optim.SGD(lock.model.parameters(), lr=0.1).step()
    return request.param, options, lock


def outputs(model):
    with torch.no_grad():
        return copy.deepcopy(model).eval()(IMAGES)


def assert_equal(one, other):
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


# What every variant does.


def test_the_baked_model_gives_the_same_outputs_and_holds_everything(variant):
    _, _, lock = variant
    baked = lock.bake()
    for model in (lock.model, baked):
        model.train()
    torch.testing.assert_close(baked(IMAGES), lock.model(IMAGES))
    torch.testing.assert_close(outputs(baked), outputs(lock.model))
    assert not any("parametrizations" in name for name, _ in baked.named_modules())
    assert baked.state_dict().keys() == {
        name for name, _ in [*baked.named_parameters(), *baked.named_buffers()]
    }


def test_no_public_path_gives_a_private_tensor_away(variant):
    name, _, lock = variant
    layers = PRIVATE.get(name, set())
    assert leaks(lock, loss_of(lock.model), private=layers) == []
    sent = lock.public_gradient(loss_of(lock.model)).keys()
    plain = {n for n, _ in net().named_parameters()}
    assert sent == {n for n in plain if n.partition(".")[0] not in layers}


def test_it_is_saved_and_loaded_without_example_inputs(variant, tmp_path):
    _, _, lock = variant
    lock.save(tmp_path / "lock", passphrase=None)
    plain = net()
    plain.load_state_dict(lock.public_state(), strict=False)
    loaded = fedkl.load_lock(tmp_path / "lock", plain, passphrase=None)
    assert_equal(loaded.private_state(), lock.private_state())
    assert loaded.layers == lock.layers
    assert torch.equal(outputs(loaded.model), outputs(lock.model))
    loaded.redraw()  # as able as the lock that was saved
    assert not torch.equal(outputs(loaded.model), outputs(lock.model))


def test_a_redraw_replaces_every_secret_and_nothing_public(variant):
    _, _, lock = variant
    replica, public, private = copy.deepcopy(lock), lock.public_state(), lock.private_state()
    before = outputs(lock.model)
    lock.redraw()
    assert torch.equal(outputs(replica.model), before)  # the copy has secrets of its own
    assert not torch.equal(outputs(lock.model), before)
    assert_equal(lock.public_state(), public)
    drawn = {n for n in lock.private_parameters() if lock.private_state()[n].unique().numel() > 1}
    assert drawn >= {
        n for n in lock.private_parameters() if ".original0" in n or n in ("fc.weight", "c1.weight")
    }
    assert not any(torch.equal(lock.private_state()[name], private[name]) for name in drawn)


def test_the_secrets_generate_what_the_baked_model_has(variant):
    _, _, lock = variant
    baked = dict(lock.bake().named_parameters())
    generated = lock.generation()(lock.reveal_secrets())
    assert generated.keys() == {f"{name}.{tensor}" for name in lock.layers for tensor in ("weight", "bias")}
    for name, tensor in generated.items():
        torch.testing.assert_close(tensor, baked[name].detach())
    assert not any(name in baked for name in lock.reveal_secrets())


def test_another_key_gives_other_outputs(variant):
    _, _, lock = variant
    before, key = outputs(lock.model), lock.key
    lock.use_key(Key.generate(length=16))
    assert not torch.allclose(outputs(lock.model), before, atol=1e-6)
    lock.use_key(key)
    assert torch.equal(outputs(lock.model), before)


def test_five_steps_lower_the_loss(variant):
    _, _, lock = variant
    optimizer = torch.optim.SGD(lock.model.parameters(), lr=0.01)
    losses = []
    for _ in range(6):
        loss = loss_of(lock.model)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.01


def test_a_public_state_serves_every_client(variant):
    _, options, lock = variant
    other = locked(**options)
    private = other.private_state()
    other.load_public_state(lock.public_state())
    other.model.load_state_dict(lock.public_state())
    assert_equal(other.private_state(), private)
    assert_equal(other.public_state(), lock.public_state())
    other.load_private_state(lock.private_state())
    other.use_key(lock.key)
    assert torch.equal(outputs(other.model), outputs(lock.model))


# Per element.

NORMS = {
    "BatchNorm1d": (nn.Conv1d(2, 5, 3), nn.BatchNorm1d(5), (4, 2, 9), (5, 7)),
    "BatchNorm2d": (nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), (4, 2, 6, 7), (5, 4, 5)),
    "BatchNorm3d": (nn.Conv3d(2, 5, 3), nn.BatchNorm3d(5), (4, 2, 4, 5, 6), (5, 2, 3, 4)),
    "InstanceNorm2d": (nn.Conv2d(2, 5, 3), nn.InstanceNorm2d(5, affine=True), (4, 2, 6, 7), (5, 4, 5)),
    "features": (nn.Linear(2, 5), nn.BatchNorm1d(5), (4, 2), (5,)),
    "inserted": (nn.Conv2d(2, 5, 3), None, (4, 2, 6, 7), (5, 4, 5)),
}


@pytest.mark.parametrize("kind", NORMS)
def test_every_element_has_a_scale_and_a_shift(kind):
    layer, norm, shape, elements = copy.deepcopy(NORMS[kind])
    x = torch.rand(shape, dtype=torch.float64)
    model = nn.Sequential(layer, *([norm] if norm else []), nn.Tanh()).double()
    options = {"layers": ["1" if norm else "0"], "granularity": "element", "example_inputs": x}
    lock = fedkl.lock(model, key=Key.generate(length=16), **options)
    inner = lock.model[0].norm if norm is None else lock.model[1]
    k = lock.key.reveal()
    gamma, beta = (
        F.softplus(part.original0 @ k + part.original1).view(elements)
        for part in (inner.elementwise.parametrizations.weight, inner.elementwise.parametrizations.bias)
    )
    h = F.instance_norm if kind.startswith("Instance") else F.batch_norm
    arguments = {"use_input_stats": True} if kind.startswith("Instance") else {"training": True}
    normalized = h(model[0](x), torch.zeros(5).double(), torch.ones(5).double(), **arguments)
    torch.testing.assert_close(lock.model(x), torch.tanh(gamma * normalized + beta))
    assert gamma.std() > 0.05


def test_the_structure_of_a_baked_lock_per_element():
    lock = locked(**ELEMENT)
    assert lock.layers == ("c1.norm.elementwise",)
    norm = lock.bake().c1.norm
    assert type(norm) is nn.BatchNorm2d
    assert type(norm.elementwise) is ElementwiseAffine
    assert norm.weight is None
    assert norm.bias is None
    assert norm.elementwise.weight.shape == norm.elementwise.bias.shape == (12, 8, 8)
    assert lock.bake().get_parameter("c1.norm.elementwise.weight") is not None
    assert "ElementwiseAffine" in repr(norm)
    norm.reset_parameters()  # PyTorch's own, which looks at the flag that the submodule stands for
    assert lock.private_state().keys() >= {"c1.norm.running_mean", "c1.norm.num_batches_tracked"}


def test_a_norm_of_the_models_own_keeps_type_and_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 2))
    model(IMAGES)
    lock = fedkl.lock(model, key=Key.generate(length=16), **ELEMENT)
    assert isinstance(lock.model[1], nn.BatchNorm2d)
    assert torch.equal(lock.model[1].running_mean, model[1].running_mean)
    assert lock.public_state().keys() == {"0.weight", "0.bias", "3.weight", "3.bias"}
    assert model[1].weight is not None  # the caller's own model stays as it was
    assert model[1].affine is True


def test_other_images_are_refused():
    lock = locked(**ELEMENT)
    with pytest.raises(LockError, match=r"samples of shape \(12, 8, 8\), got \(12, 10, 10\).*example_inputs"):
        lock.model(torch.rand(2, 3, 20, 20))


def test_what_cannot_be_locked_per_element():
    def refused(model=None, **options):
        with pytest.raises(LockError) as caught:
            fedkl.lock(model or net(), **{**ELEMENT, **options})
        return str(caught.value)

    assert "granularity='element' needs example_inputs=" in refused(example_inputs=None)
    message = refused(layers="all")
    assert "'c2': chained to 'c1', W would have 192 × 768 = 147,456 numbers" in message
    assert "'c3': chained to 'c2', W would have 192 × 192 = 36,864 numbers" in message
    assert "chained=False" in message
    several = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(784))
    message = refused(several, layers="all")
    assert "'1' (GroupNorm) takes no γ and β per element" in message
    assert "'3' (LayerNorm) takes no γ and β per element" in message
    assert "'fc' (Linear) takes no γ and β per element" in refused(layers="classifier")
    shared = nn.BatchNorm2d(3)
    twice = nn.Sequential(shared, nn.Conv2d(3, 3, 3), shared)
    assert "'0' gives samples of (3, 16, 16) and (3, 14, 14), expected one shape" in refused(twice)
    unbatched = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    message = refused(unbatched, example_inputs=IMAGES[0])
    assert "'0' is called without a batch" in message


def test_a_baked_lock_per_element_can_be_locked_again():
    baked = locked(**ELEMENT).bake()
    again = fedkl.lock(
        baked, key=Key.generate(length=16), layers=["c1.norm.elementwise"], granularity="element"
    )
    assert again.layers == ("c1.norm.elementwise",)
    assert again.model(IMAGES).shape == baked(IMAGES).shape
    two = locked(**ELEMENT, layers="all", chained=False).bake()
    with pytest.raises(LockError, match="pass chained=False: every lock from the key"):
        fedkl.lock(two, layers="all")  # its γ and β are per element, whatever is asked for now


@pytest.mark.parametrize("options", [{"layers": "all"}, ELEMENT])
@pytest.mark.parametrize(
    ("example", "said"),
    [
        (torch.zeros(1, 1, 16, 16), "the model cannot be called with them: Given groups=1"),
        ((3, 16, 16), "the model cannot be called with them"),
        ([torch.zeros(1, 3, 16, 16)], "expected a tensor, or a tuple or dict of arguments, got list"),
    ],
)
def test_example_inputs_that_the_model_does_not_take(unchecked, options, example, said):
    with pytest.raises(LockError, match=f"example_inputs: {said}.*Give a batch as the model is called with"):
        locked(**options | {"example_inputs": example})


def test_unknown_granularity(unchecked):
    with pytest.raises(LockError, match=r"granularity='pixel' is unknown. Choose one of channel, element"):
        locked(granularity="pixel")


# In front of the classifier.


def test_the_classifiers_lock_is_a_norm_on_its_input():
    lock = locked(layers="classifier")
    assert lock.layers == ("fc.input_norm",)
    k = lock.key.reveal().float()
    parts = lock.model.fc.input_norm.parametrizations
    gamma, beta = (F.softplus(p.original0 @ k + p.original1) for p in (parts.weight, parts.bias))
    plain = net()
    h = IMAGES
    for layer in (plain.c1, plain.c2, plain.c3):
        h = torch.sigmoid(layer(h))
    h = h.flatten(1)
    normalized = (h - h.mean(1, keepdim=True)) / (h.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    torch.testing.assert_close(lock.model(IMAGES), plain.fc(gamma * normalized + beta), rtol=1e-4, atol=1e-5)


def test_a_classifier_that_is_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x):
            return self.fc(input=x)

    lock = fedkl.lock(Named(), key=Key.generate(length=16), layers="classifier")
    x = torch.rand(4, 6)
    norm, fc = lock.bake().fc.input_norm, lock.model.fc
    torch.testing.assert_close(lock.model(x), F.linear(norm(x), fc.weight, fc.bias))


def test_a_classifier_that_is_not_called_is_not_locked_in_vain():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(6, 5), nn.Linear(5, 3)

        def forward(self, x):
            return F.linear(torch.relu(self.body(x)), self.fc.weight, self.fc.bias)

    with pytest.raises(LockError, match=r"\(Functional\) calls linear as a function: it is not seen whether"):
        fedkl.lock(Functional(), layers="classifier")
    lock = fedkl.lock(Functional(), layers="classifier", example_inputs=torch.rand(4, 6))
    assert lock.layers == ("body.input_norm",)  # the last that is called


def test_models_without_a_classifier_to_lock():
    with pytest.raises(LockError, match=r"locks the input of the last nn\.Linear, and there is none"):
        fedkl.lock(nn.Sequential(nn.Conv2d(3, 4, 3)), layers="classifier")
    with pytest.raises(LockError, match=r"'1' \(Linear\) has one input, which a norm"):
        fedkl.lock(nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 4)), layers="classifier")
    model = net()
    model.fc.input_norm = nn.Identity()
    with pytest.raises(LockError, match="'fc' already has an attribute 'input_norm'"):
        fedkl.lock(model, layers="classifier")


# Signed.


def test_tanh_gives_both_signs():
    lock = locked(**VARIANTS["element-tanh"])
    affine = lock.model.c1.norm.elementwise
    for tensor in (affine.weight.detach(), affine.bias.detach()):
        assert -1 < tensor.min() < -0.5
        assert 0.5 < tensor.max() < 1
        assert abs(tensor.sign().mean()) < 0.2
        assert tensor.std().item() == pytest.approx(0.63, abs=0.05)  # of tanh of a standard normal number


# Private layers.


def test_every_client_has_private_layers_of_its_own():
    plain = net()
    one, two = (fedkl.lock(plain, key=Key.generate(length=16), private=("head",)) for _ in range(2))
    weights = [plain.fc.weight, one.model.fc.weight, two.model.fc.weight]
    for index, weight in enumerate(weights):
        assert weight.std().item() == pytest.approx(plain.fc.weight.std().item(), rel=0.1)
        assert not any(torch.allclose(weight, other, rtol=1e-2) for other in weights[:index])
    for _ in range(100):
        one.redraw()
    assert one.model.fc.weight.std().item() == pytest.approx(plain.fc.weight.std().item(), rel=0.1)
    assert one.private_names >= {"fc.weight", "fc.bias"}


def test_a_copy_of_a_private_layer_is_not_sent():
    lock = locked(private=["c2"])
    stolen = lock.private_state()["c2.weight"]  # as large as that of the next layer
    with pytest.raises(SecretError, match=r"'c3.weight' has the content of a private tensor"):
        lock.public_update(
            {**lock.public_state(), "c3.weight": stolen}, kind="weights", num_samples=1, round=0
        )


def test_a_private_block_with_norms_and_a_lock_in_it():
    block = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    model = nn.Sequential(block, nn.ReLU(), nn.Flatten(), nn.Linear(576, 10))
    lock = fedkl.lock(model, key=Key.generate(length=16), private=["0"])
    assert lock.public_state().keys() == {"3.weight", "3.bias"}
    assert torch.equal(lock.model[0][3].weight, torch.ones(4))  # constant starts stay
    secrets = lock.private_state()
    lock.redraw()
    assert not torch.equal(secrets["0.0.weight"], lock.private_state()["0.0.weight"])
    assert leaks(lock, loss_of(lock.model), private={"0"}) == []
    assert lock.reveal_secrets().keys() == {
        "key",
        *(f"0.1.parametrizations.{t}.original{i}" for t in ("weight", "bias") for i in (0, 1)),
    }


def test_unusable_private_names():
    with pytest.raises(LockError) as caught:
        locked(private=["fcc", "nowhere"])
    assert "private: 'fcc' is not a module of this model, did you mean 'fc'?" in str(caught.value)
    assert "private: 'nowhere' is not a module of this model" in str(caught.value)
    with pytest.raises(LockError, match="no parameter is left to send"):
        locked(private=["c1", "c2", "c3", "fc"])
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(LockError, match=r"'1' \(ReLU\) has no parameters"):
        fedkl.lock(model, private=["1"])


def test_what_is_tied_to_a_private_layer_would_be_sent():
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 6), nn.Linear(6, 10))
    model[2].weight = model[0].weight
    with pytest.raises(
        LockError, match=r"'0\.weight' is a tensor of a private layer too, and would stay public"
    ):
        fedkl.lock(model, private=["2"])
    fedkl.lock(model, private=["0", "2"])


def test_a_lock_and_private_layers_leave_something_to_send():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 10))
    with pytest.raises(LockError, match=r"with 0, 3, 1 private, no parameter is left to send"):
        fedkl.lock(model, private=["0", "3"])


def test_private_is_a_list(unchecked):
    with pytest.raises(LockError, match=r"private= must be a list of names, e.g. \['head'\], got str"):
        locked(private="head")


def test_a_module_called_head_is_the_head():
    class Headed(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 2))

        def forward(self, x):
            return self.head(self.body(x))

    lock = fedkl.lock(Headed(), key=Key.generate(length=16), private=["head"])
    assert lock.public_state().keys() == {"body.weight", "body.bias"}


def test_only_open_layers_are_warned_about():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    with pytest.warns(UserWarning, match=r"2 parametric layers run before the first lock \('2'\)"):
        fedkl.lock(model, layers=["2"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fedkl.lock(model, layers=["2"], private=["stem"])
        fedkl.lock(model, layers="classifier")


# Files.


def test_files_of_older_versions_still_load(tmp_path):
    lock, path = locked(), tmp_path / "lock"
    lock.save(path, passphrase=None)
    meta, tensors = lockfile.read(path, kind="lock", passphrase=None)
    for name in ("granularity", "classifier", "shapes", "private"):
        del meta["options"][name]
    lockfile.write(path, kind="lock", meta=meta, tensors=tensors, passphrase=None)
    loaded = fedkl.load_lock(path, net(), passphrase=None)
    assert torch.equal(outputs(loaded.model), outputs(lock.model))


@pytest.mark.parametrize(
    ("options", "other"),
    [
        (VARIANTS["element"], lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))),
        (VARIANTS["classifier"], lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))),
        (VARIANTS["private-head"], lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))),
    ],
)
def test_files_of_another_model_are_refused(tmp_path, options, other):
    locked(**options).save(tmp_path / "lock", passphrase=None)
    with pytest.raises(KeyFileError, match="this lock belongs to another model"):
        fedkl.load_lock(tmp_path / "lock", other(), passphrase=None)


@pytest.mark.parametrize(
    "damage", [{"shapes": [[12, 9, 9]]}, {"shapes": [[12, 8, 8]] * 2}, {"private": ["x"]}]
)
def test_options_that_do_not_fit_are_refused(tmp_path, damage):
    path = tmp_path / "lock"
    locked(**ELEMENT).save(path, passphrase=None)
    meta, tensors = lockfile.read(path, kind="lock", passphrase=None)
    meta["options"] |= damage
    lockfile.write(path, kind="lock", meta=meta, tensors=tensors, passphrase=None)
    with pytest.raises(KeyFileError, match="this lock belongs to another model"):
        fedkl.load_lock(path, net(), passphrase=None)
