"""The subjects of examples/audit: each is usable, trained, and trains on."""

from __future__ import annotations

import copy
import importlib.util
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn

from fedkl import data
from fedkl.errors import DataError

FOLDER = Path(__file__).parents[2] / "examples" / "audit"
# Name: the share of right answers that its weights reach at least, of 400 images, and the client's images.
SUBJECTS = {
    "quickstart": (0.55, 300),
    "resnet": (0.60, 8),
    "vit": (0.85, 64),
    "tiles": (0.85, 16),
}
WITH_CIFAR10 = ("quickstart", "resnet")


def example(name):
    spec = importlib.util.spec_from_file_location(f"audit_example_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@lru_cache(maxsize=1)
def has_cifar10():
    try:
        data.load("cifar10")
    except DataError:
        return False
    return True


@pytest.fixture(scope="module", params=SUBJECTS)
def audited(request):
    """Name and subject."""
    if request.param in WITH_CIFAR10 and not has_cifar10():
        pytest.skip("CIFAR-10 is not on this machine: `fedkl data fetch cifar10`")
    return request.param, example(request.param).subject()


def accuracy(subject, classifier):
    """Of 400 images."""
    chosen = torch.randperm(len(subject.images), generator=torch.Generator().manual_seed(0))[:400]
    with torch.no_grad():
        right = classifier.eval()(subject.images[chosen]).argmax(1) == subject.labels[chosen]
    return right.float().mean().item()


def test_it_is_usable(audited):
    name, subject = audited
    subject.check()
    assert subject.name == name
    assert subject.images_per_client == SUBJECTS[name][1]
    assert len(subject.images) >= 10 * subject.images_per_client
    assert len(set(subject.labels.tolist())) == subject.classes


def test_the_weights_are_trained(audited):
    name, subject = audited
    assert accuracy(subject, subject.classifier()) > SUBJECTS[name][0]
    untrained = nn.Sequential(subject.model())  # the same network as it starts
    scores = untrained.eval()(subject.inputs(subject.images[:100]))
    right = (getattr(scores, "logits", scores).argmax(1) == subject.labels[:100]).float().mean()
    assert right < SUBJECTS[name][0]


def test_the_weights_are_small(audited):
    _, subject = audited
    assert Path(subject.weights).stat().st_size < 1_200_000


def test_a_client_trains(audited):
    """A loop changes all parameters a little, stays finite, and fits the client's own images better."""
    _, subject = audited
    if not subject.has_own_loop:
        pytest.skip("a Procedure, which tests/attacking/test_procedure.py tests")
    network = subject.build()
    start = copy.deepcopy(network)
    images = subject.inputs(subject.images[: subject.images_per_client])
    labels = subject.labels[: subject.images_per_client]
    kept = images.clone()
    subject.procedure(network, images, labels)
    assert torch.equal(images, kept)
    for (name, before), after in zip(start.named_parameters(), network.parameters(), strict=True):
        change = (after - before).norm() / before.norm()
        assert 0 < change < 0.5, name
    assert loss(network, images, labels) < loss(start, images, labels)


def loss(network, images, labels):
    with torch.no_grad():
        scores = network.eval()(images)
    return nn.functional.cross_entropy(getattr(scores, "logits", scores), labels).item()


def test_images_were_never_trained_on():
    """What training leaves out: the images that fedkl brings along, and two sides of one picture."""
    vit, tiles = example("vit"), example("tiles")
    sample = data.load("mnist-sample", size=28, channels=1)
    assert vit.UNSEEN == len(sample.train_images)
    assert len(vit.subject().images) == len(sample.train_images) + len(sample.test_images)
    (trained, _), (others, _) = tiles.tiles(trained=True), tiles.tiles(trained=False)
    assert len(trained) + len(others) == (512 // tiles.SIDE) ** 2
    assert torch.cdist(trained.flatten(1), others.flatten(1)).min() > 0.1


def test_a_missing_data_set_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKL_DATA", str(tmp_path))
    for name in WITH_CIFAR10:
        with pytest.raises(DataError, match="fedkl data fetch cifar10"):
            example(name).subject()


def test_every_example_is_tested():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SUBJECTS, "train"}
    assert {path.stem for path in (FOLDER / "weights").iterdir()} == set(SUBJECTS)
