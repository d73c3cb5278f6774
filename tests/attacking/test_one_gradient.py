"""What a server has of one client at hand: the same as in experiments, behind every defense."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from fedkl import data, models
from fedkl.attacking import observe_gradient
from fedkl.attacking.one_gradient import _check
from fedkl.attacks import ClosedForm, Knowledge
from fedkl.defenses import PUBLISHED_LOCK, MaskedUpload
from fedkl.defenses.pruning import Pruning
from fedkl.errors import DataError
from fedkl.metrics import correlation


@pytest.fixture(scope="module")
def setting():
    digits = data.load("mnist-sample")
    model = models.build_model("lenet", channels=3, classes=10, seed=0)
    return model, digits.test_images[:1], digits.test_labels[:1]


def test_undefended_it_is_the_gradient(setting):
    model, images, labels = setting
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    seen = observe_gradient(model, images, labels, classes=10)
    own = torch.autograd.grad(cross_entropy(model(images), labels), list(model.parameters()))
    assert list(seen.gradient) == [name for name, _ in model.named_parameters()]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(seen.gradient.values(), own, strict=True))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert seen.labels is not None


def test_a_frozen_layer_is_not_sent(setting):
    model, images, labels = setting
    transferred = copy.deepcopy(model)
    transferred.conv1.requires_grad_(False)
    seen = observe_gradient(transferred, images, labels, classes=10)
    whole = observe_gradient(*setting, classes=10).gradient
    assert set(whole) - set(seen.gradient) == {"conv1.weight", "conv1.bias"}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in seen.gradient.items())
    assert seen.unsent == frozenset()


def test_behind_the_lock_private_tensors_are_missing_and_the_image_is_not(setting):
    model, images, labels = setting
    seen = observe_gradient(
        model, images, labels, classes=10, defense=PUBLISHED_LOCK, knowledge=Knowledge(labels=False)
    )
    assert sorted(seen.gradient) == sorted(name for name, _ in model.named_parameters())
    assert len(dict(seen.model.named_parameters())) > len(seen.gradient)
    assert seen.labels is None
    found = ClosedForm().reconstruct(seen, generator=torch.Generator().manual_seed(0))
    assert float(correlation(found.pictures, images)) > 0.9


def test_behind_masks_nothing_of_the_gradient_is_left(setting):
    seen = observe_gradient(*setting, classes=10, defense=MaskedUpload())
    plain = observe_gradient(*setting, classes=10)
    flat = [torch.cat([part.flatten() for part in each.gradient.values()]) for each in (seen, plain)]
    assert abs(float(torch.stack(flat).corrcoef()[0, 1])) < 7 / len(flat[0]) ** 0.5


def test_the_server_allows_for_the_defense_that_it_knows(setting):
    pruned = observe_gradient(*setting, classes=10, defense=Pruning(keep=0.1))
    naive = observe_gradient(
        *setting, classes=10, defense=Pruning(keep=0.1), knowledge=Knowledge(defense=False)
    )
    assert sum(int((part != 0).sum()) for part in pruned.gradient.values()) < 0.2 * 15826
    assert (pruned.transform is None, naive.transform is None) == (False, True)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda images, labels: (images * 255, labels), r"floats in \[0, 1\]"),
        (lambda images, labels: (images, labels + 10), r"labels in 0\.\.9"),
        (lambda images, labels: (images[0], labels), r"\(batch, channels, height, width\), got \(3,"),
        (lambda images, labels: (images, labels.float()), "dtype torch.int64, got torch.float32"),
        (lambda images, labels: (images, labels.repeat(2)), "expected 1 labels, one per image, got 2"),
    ],
    ids=["bytes", "a class too many", "no batch", "no indexes", "a label too many"],
)
def test_what_does_not_fit_is_named(setting, change, said):
    _, images, labels = setting
    with pytest.raises(DataError, match=said):
        _check(*change(images, labels), 10)  # alone: types are checked at every other call, in tests
