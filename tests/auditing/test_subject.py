"""What may be audited, and what is said about everything else."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn
from torch.nn.utils import prune

import fedkl
from fedkl import Subject
from fedkl.errors import ConfigError, DataError
from tests.auditing.subjects import Silent

CLASSES = 10


def network(*, classes=CLASSES, channels=3):
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3, stride=2), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, classes)
    )


def vit():
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=8, num_labels=CLASSES,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config)


class Words(nn.Module):
    """A classifier of tokens."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.fc = nn.Linear(8, CLASSES)

    def forward(self, tokens):
        return self.fc(self.embedding(tokens).mean(1))


def images(count=60, *, channels=3):
    return torch.rand(count, channels, 8, 8, generator=torch.Generator().manual_seed(0))


def labels(count=60):
    return torch.arange(count) % CLASSES


def tokens():
    return torch.randint(50, (60, 12), generator=torch.Generator().manual_seed(0))


def subject(**fields):
    return Subject(**{"model": network, "images": images(), "labels": labels(), **fields})


def with_value(value, *, of=images):
    changed = of()
    changed.view(-1)[7] = value
    return changed


def does_nothing(network, inputs, labels):
    pass


def raises():
    raise RuntimeError("no such\nfile")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": network()}, r"model: expected a function that builds the network, e.g. `lambda: Net\(\)`, "
         "got a network"),
        ({"images_per_client": 0}, "images_per_client: expected at least 1, got 0"),
        ({"classes": -1}, "classes: expected at least 0, got -1"),
        ({"images": 255 * images()}, r"images: expected values in \[0, 1\], got some above 1. Divide bytes"),
        ({"images": 2 * images() - 1}, r"images: expected values in \[0, 1\], got some below 0. .*before "
         "normalization, and its mean and standard deviation as `normalization`"),
        ({"images": with_value(torch.nan)}, "images: expected finite values, got NaN or infinite ones"),
        ({"images": with_value(torch.inf)}, "images: expected finite values, got NaN or infinite ones"),
        ({"images": images().double()}, r"images: expected float32 .* got torch.float64 of shape "
         r"\(60, 3, 8, 8\)"),
        ({"images": (255 * images()).byte()}, r"images: expected float32 .* got torch.uint8 of shape "),
        ({"images": images().flatten(1)}, r"images: expected float32 .* torch.float32 of shape \(60, 192\)"),
        ({"images": torch.tensor(0.5)}, r"images: expected float32 .* of shape \(\)"),
        ({"images": tokens().bool()}, r"or int64 tokens of shape \(images, length\), got torch.bool"),
        ({"images": with_value(-1, of=tokens)}, "images: expected tokens of at least 0, got some below"),
        ({"images": images(39), "labels": labels(39)}, "images: expected at least 40, got 39"),
        ({"images": images(0), "labels": labels(0)}, "images: expected at least 40, got 0"),
        ({"labels": labels().int()}, r"labels: expected int64 of shape \(60,\), one of each image, got "
         r"torch.int32 of shape \(60,\)"),
        ({"labels": labels().float()}, "labels: expected int64 .* got torch.float32"),
        ({"labels": labels(59)}, r"labels: expected int64 of shape \(60,\), .* of shape \(59,\)"),
        ({"labels": labels()[:, None]}, r"labels: expected int64 of shape \(60,\), .* of shape \(60, 1\)"),
        ({"labels": with_value(-1, of=labels)}, "labels: expected values of at least 0, got some below"),
        ({"classes": 9}, r"labels: expected 0 .. 8, as there are 9 classes, got some above"),
        ({"normalization": ((0.5,), (0.5,))}, "normalization: expected a mean and a positive std for every "
         "channel, .* got them for 1 and images of 3 channels"),
        ({"normalization": ((0.5,) * 3, (0.0,) * 3)}, "normalization: expected a mean and a positive std"),
        ({"normalization": ((0.5,) * 3, (0.5,))}, "normalization: expected a mean and a positive std"),
        ({"images": tokens(), "normalization": ((0.5,), (0.5,))}, "normalization: expected None where images "
         "are tokens"),
        ({"name": "a\nb"}, r"name: expected text of one line and at most 1,000 characters, got 'a\\nb'"),
        ({"name": "\x1b[31m"}, "name: expected text of one line"),
        ({"name": "\ud800"}, "name: expected text of one line"),
        ({"name": 1001 * "x"}, "name: expected text of one line and at most 1,000 characters, got 'x{99}…'"),
    ],
)  # fmt: skip
def test_an_unusable_subject_is_refused(fields, message):
    with pytest.raises(ConfigError, match=rf"(?s)Subject is not usable.*{message}.*Correct these fields"):
        subject(**fields)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "resnet18"}, "model: expected a function that builds the network, .* got str"),
        ({"procedure": 3}, "procedure: expected a fedkl.Procedure, or a function that trains, got int"),
        ({"norm_mode": "test"}, "norm_mode: expected 'train' or 'eval', got 'test'"),
        ({"images": images().numpy()}, "images, labels: expected tensors, got ndarray and Tensor"),
        ({"labels": labels().tolist()}, "images, labels: expected tensors, got Tensor and list"),
        ({"normalization": (0.5, 0.5)}, r"normalization: expected .* e.g. \(\(0.5,\), \(0.5,\)\)"),
        ({"normalization": 0.5}, "normalization: expected a mean and a positive std"),
        ({"name": 7}, "name: expected text of one line and at most 1,000 characters, got int"),
    ],
)
def test_a_field_of_another_type_is_refused(fields, message):
    with pytest.raises(ConfigError, match=rf"(?s)Subject is not usable.*{message}"):
        subject(**fields)


def test_one_message_lists_every_problem():
    with pytest.raises(ConfigError) as error:
        subject(
            model=network(), images=2 + images(), labels=labels(3), images_per_client=0,
            normalization=((0.5,), (0.5,)),
        )  # fmt: skip
    problems = [line for line in str(error.value).splitlines() if line.startswith("  - ")]
    fields = [problem.split(":")[0].removeprefix("  - ") for problem in problems]
    assert fields == ["model", "images_per_client", "images", "labels", "normalization"]


def test_no_message_shows_values():
    values = with_value(0.123456) + 1  # between 1 and 2
    with pytest.raises(ConfigError) as error:
        subject(images=values, labels=with_value(7654321, of=labels), classes=10)
    assert "1.12" not in str(error.value)
    assert "7654321" not in str(error.value)
    assert "7654321" not in repr(subject(labels=with_value(7654321, of=labels)))


def test_the_number_of_classes_is_that_of_the_labels():
    assert subject().classes == 10
    assert subject(labels=labels().clamp(max=6)).classes == 7
    assert subject(classes=12).classes == 12


class TestBuild:
    def test_a_factory_that_raises(self):
        with pytest.raises(ConfigError, match=r"Subject.model: raised RuntimeError \(no such\\nfile\)"):
            subject(model=raises).build()

    def test_a_factory_that_ends_the_program(self):
        with pytest.raises(ConfigError, match=r"Subject.model: raised SystemExit \(0\)"):
            subject(model=lambda: sys.exit(0)).build()

    @pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated")
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda found: nn.utils.weight_norm(found[3]), "'3.weight' is the result"),
            (lambda found: prune.l1_unstructured(found[0], "weight", 0.5), "'0.weight' is the result"),
            (lambda found: setattr(found, "last", found(images(2))), "'last' is the result"),
            (lambda found: setattr(found, "kept", [found(images(2))]), "'kept' is the result"),
        ],
        ids=["weight norm", "pruning", "an activation", "one in a list"],
    )
    def test_a_network_that_cannot_be_copied(self, change, message):
        def built():
            found = network()
            change(found)
            return found

        with pytest.raises(ConfigError, match=rf"Subject.model: .* cannot be copied(.|\n)*{message}"):
            subject(model=built).build()

    def test_a_factory_that_wants_arguments(self):
        with pytest.raises(ConfigError, match=r"raised TypeError .*without arguments"):
            subject(model=lambda width: network()).build()

    @pytest.mark.usefixtures("unchecked")
    @pytest.mark.parametrize("returned", [None, {}])
    def test_a_factory_that_returns_no_module(self, returned):
        got = type(returned).__name__
        with pytest.raises(ConfigError, match=f"expected a function that returns an nn.Module, got {got}"):
            subject(model=lambda: returned).build()

    def test_what_it_returns_is_never_changed(self):
        own = network()
        before = copy.deepcopy(own.state_dict())
        built = subject(model=lambda: own, normalization=((0.5,) * 3, (0.5,) * 3)).classifier()
        with torch.no_grad():
            built[3].weight.zero_()
        assert all(torch.equal(before[name], tensor) for name, tensor in own.state_dict().items())
        assert not own._forward_hooks
        assert not own._forward_pre_hooks

    def test_without_weights_every_network_starts_the_same(self):
        one = subject().build().state_dict()
        random = torch.get_rng_state()
        other = subject().build().state_dict()
        assert all(torch.equal(one[name], other[name]) for name in one)
        assert torch.equal(random, torch.get_rng_state())


class TestWeights:
    @pytest.fixture
    def trained(self):
        torch.manual_seed(5)
        state = network().state_dict()
        state["1.running_mean"] += 0.5
        return state

    def test_tensors_by_name(self, trained):
        built = subject(weights=trained).build().state_dict()
        assert all(torch.equal(built[name], tensor) for name, tensor in trained.items())

    @pytest.mark.parametrize("kind", [str, lambda path: path])
    def test_a_file(self, trained, tmp_path, kind):
        safetensors.torch.save_file(trained, tmp_path / "w.safetensors")
        built = subject(weights=kind(tmp_path / "w.safetensors")).build().state_dict()
        assert all(torch.equal(built[name], tensor) for name, tensor in trained.items())

    def test_no_file(self, tmp_path):
        with pytest.raises(ConfigError, match=r"w.safetensors cannot be read \(No such file"):
            subject(weights=tmp_path / "w.safetensors").build()

    def test_a_file_of_another_format(self, trained, tmp_path):
        torch.save(trained, tmp_path / "w.pt")
        with pytest.raises(ConfigError, match=r"not a safetensors file .* safetensors.torch.save_file"):
            subject(weights=tmp_path / "w.pt").build()

    def test_another_architecture(self, trained):
        with pytest.raises(ConfigError) as error:
            subject(weights=trained, model=lambda: network(classes=12)).build()
        message = str(error.value)
        assert "Subject.weights: a mapping does not fit the network." in message
        assert "'3.weight' has shape (10, 36), expected (12, 36)" in message
        assert "'3.bias'" in message

    def test_missing_buffers_and_foreign_names(self, trained):
        del trained["1.running_mean"]
        trained["fc.weight"] = torch.zeros(1)
        with pytest.raises(ConfigError, match=r"(?s)'1.running_mean' is missing.*'fc.weight' is unexpected"):
            subject(weights=trained).check()

    def test_weights_that_diverged(self, trained):
        trained["3.bias"][0] = torch.nan
        with pytest.raises(ConfigError, match=r"'3.bias' has non-finite values"):
            subject(weights=trained).build()


class TestCheck:
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"normalization": ((0.5,) * 3, (0.25,) * 3)},
            {"model": vit},
            {"model": vit, "normalization": ((0.5,) * 3, (0.25,) * 3)},
            {"model": Words, "images": tokens()},
            {"model": Words, "images": tokens().int()},
            {"procedure": does_nothing},
        ],
    )
    def test_a_usable_subject_passes(self, fields):
        subject(**fields).check()

    def test_a_network_whose_train_returns_nothing(self):
        subject(model=Silent, images=images(channels=1), labels=labels() % 4).check()
        with pytest.raises(DataError, match=r"takes images with channels=1: give images\.mean"):
            subject(model=Silent, labels=labels() % 4).check()

    def test_another_number_of_classes(self):
        message = r"mine: expected class scores of shape \(2, 10\) for two images, got \(2, 12\)"
        with pytest.raises(DataError, match=rf"{message}.*set `classes` to their number"):
            subject(model=lambda: network(classes=12), name="mine").check()
        subject(model=lambda: network(classes=12), classes=12).check()

    def test_weights_that_are_not_finite(self):
        def diverged():
            found = network()
            next(found.parameters()).data.flatten()[3] = float("nan")
            return found

        with pytest.raises(DataError, match=r"mine: '\S+' of the network has numbers that are not finite"):
            subject(model=diverged, name="mine").check()

    def test_a_network_whose_shapes_are_not_known(self):
        lazy = subject(model=lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(10)))
        with pytest.raises(ConfigError, match=r"shapes, got some that have none yet .*Call it once"):
            lazy.check()

    def test_a_network_that_is_frozen_as_a_whole(self):
        frozen = {"model": lambda: network().requires_grad_(False), "name": "mine"}
        with pytest.raises(DataError, match=r"mine: all parameters of the network are frozen"):
            subject(**frozen).check()
        subject(**frozen, procedure=lambda net, x, y: None).check()  # a loop may unfreeze them

    def test_images_that_the_network_does_not_take(self):
        with pytest.raises(DataError, match=r"cannot be called with images of shape \(3, 8, 8\) \(RuntimeE"):
            subject(model=lambda: network(channels=1)).check()

    def test_a_network_that_ends_the_program(self):
        class Exits(nn.Module):
            def forward(self, x):
                sys.exit(0)

        with pytest.raises(DataError, match=r"cannot be called with images of .* \(SystemExit: 0\)"):
            subject(model=Exits).check()

    def test_gray_for_a_network_of_color_and_the_reverse(self):
        with pytest.raises(DataError, match=r"takes images with channels=3: give images\.expand\(-1, 3, "):
            subject(images=images(channels=1)).check()
        subject(images=images(channels=1).expand(-1, 3, -1, -1)).check()
        with pytest.raises(DataError, match=r"takes images with channels=1: give images\.mean\(1, keepdim"):
            subject(model=lambda: network(channels=1)).check()
        subject(model=lambda: network(channels=1), images=images().mean(1, keepdim=True)).check()
        with pytest.raises(DataError, match="Give images as it takes them, on the CPU"):
            subject(model=lambda: network(channels=2)).check()

    def test_tokens_outside_the_vocabulary(self):
        with pytest.raises(DataError, match=r"cannot be called with images of shape \(12,\) \(IndexError"):
            subject(model=Words, images=with_value(50, of=tokens)).check()

    def test_an_output_without_scores(self):
        class Pair(nn.Module):
            def forward(self, x):
                return x.mean(), x

        with pytest.raises(DataError, match=r"got tuple\. Return the scores, or an object with .* `logits`"):
            subject(model=Pair).check()


class TestClassifier:
    NORMALIZATION = ((0.2, 0.3, 0.4), (0.5, 0.25, 0.125))

    @pytest.fixture(params=[network, vit])
    def audited(self, request):
        return subject(model=request.param, normalization=self.NORMALIZATION)

    def test_it_takes_images_as_they_are_and_gives_scores(self, audited):
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in self.NORMALIZATION)
        expected = audited.build().eval()((images() - mean) / std)
        found = audited.classifier().eval()(images())
        torch.testing.assert_close(found, getattr(expected, "logits", expected))

    def test_inputs_are_what_the_network_is_called_with(self, audited):
        expected = audited.build().eval()(audited.inputs(images()))
        found = audited.classifier().eval()(images())
        assert torch.equal(found, getattr(expected, "logits", expected))

    def test_without_normalization_images_stay_as_they_are(self):
        assert torch.equal(subject().inputs(images()), images())
        assert torch.equal(subject().classifier().eval()(images()), subject().build().eval()(images()))

    def test_names_are_those_of_the_network(self, audited):
        plain, wrapped = audited.build(), audited.classifier()
        assert list(wrapped.state_dict()) == list(plain.state_dict())
        assert [name for name, _ in wrapped.named_modules()] == [name for name, _ in plain.named_modules()]
        assert [name for name, _ in wrapped.named_buffers()] == [name for name, _ in plain.named_buffers()]

    def test_a_network_that_was_built_becomes_one_in_place(self, audited):
        built = audited.build()
        assert audited.classifier(built) is built
        assert torch.equal(built.eval()(images()), audited.classifier().eval()(images()))

    def test_a_deep_copy_is_another_classifier(self, audited):
        first = audited.classifier().eval()
        second = copy.deepcopy(first)
        before = first(images())
        assert torch.equal(second(images()), before)
        with torch.no_grad():
            for parameter in second.parameters():
                parameter.add_(1)
        second.double()(images().double())  # its normalization follows its input
        assert torch.equal(first(images()), before)

    def test_a_functional_call(self, audited):
        built = audited.classifier().eval()
        zeros = {name: torch.zeros_like(tensor) for name, tensor in built.named_parameters()}
        scores = torch.func.functional_call(built, zeros, (images(),))
        assert torch.equal(scores, torch.zeros(60, CLASSES))


class TestKinds:
    def test_pictures_and_tokens(self):
        assert subject().is_pictures
        assert not subject(model=Words, images=tokens()).is_pictures

    def test_loops_and_procedures(self):
        assert not subject().has_own_loop
        assert not subject(procedure=fedkl.Procedure(algorithm="fedavg")).has_own_loop
        assert subject(procedure=does_nothing).has_own_loop

    def test_another_procedure_for_the_same_subject(self):
        audited = subject(procedure=does_nothing, classes=12)
        other = replace(audited, procedure=fedkl.Procedure(), images_per_client=1)
        assert other.images is audited.images
        assert other.classes == 12
        assert not other.has_own_loop
