"""BigGAN-deep: it draws what pytorch-pretrained-biggan draws; bad folders are refused; GGL searches it."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torch.nn import functional as F

from fedkl.attacking import full_gradient
from fedkl.attacks import GGL, Observation
from fedkl.attacks.generators.biggan import BigGANConfig
from fedkl.attacks.generators.files import load_generator
from fedkl.errors import AttackError, ConfigError
from fedkl.generator_training import write_samples

TINY = Path(__file__).parent / "biggan-tiny"
WEIGHTS, OLD_WEIGHTS = "model.safetensors", "pytorch_model.bin"


@pytest.fixture
def folder(tmp_path):
    """A copy that a test may damage."""
    return Path(shutil.copytree(TINY, tmp_path / "biggan"))


def weights():
    return safetensors.torch.load_file(TINY / WEIGHTS)


def expected():
    return safetensors.torch.load_file(TINY / "expected.safetensors")


@pytest.mark.parametrize("truncation", [1.0, 0.5, 0.4, 0.2])
def test_draws_what_the_reference_draws(truncation):
    oracle = expected()
    generator = load_generator(str(TINY), truncation=truncation)
    images = generator(oracle["z"], oracle["labels"])
    torch.testing.assert_close(images, (oracle[f"images-{truncation}"] + 1) / 2, atol=1e-5, rtol=0)
    assert not generator.training
    assert not any(parameter.requires_grad for parameter in generator.parameters())
    assert (generator.latent, generator.classes, generator.shape) == (4, 5, (3, 16, 16))


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_both_formats_of_torch(folder, zipped):
    (folder / WEIGHTS).unlink()
    torch.save(weights(), folder / OLD_WEIGHTS, _use_new_zipfile_serialization=zipped)
    oracle = expected()
    images = load_generator(str(folder))(oracle["z"], oracle["labels"])
    torch.testing.assert_close(images, (oracle["images-1.0"] + 1) / 2, atol=1e-5, rtol=0)


def test_many_images_are_those_drawn_alone():
    generator = load_generator(str(TINY))
    z, labels = torch.randn(19, 4), torch.arange(19) % 5
    alone = torch.cat([generator(z[i : i + 1], labels[i : i + 1]) for i in range(19)])
    torch.testing.assert_close(generator(z, labels), alone, atol=1e-5, rtol=0)


def test_statistics_between_two_truncations():
    raw = weights()["generator.bn.running_means"].float()
    for truncation, mean in [(0.25, raw[1] * 0.75 + raw[2] * 0.25), (0.01, raw[0] * 0.95 + raw[1] * 0.05)]:
        norm = load_generator(str(TINY), truncation=truncation).generator.bn
        torch.testing.assert_close(norm.running_mean, mean)


PUBLISHED = {  # of pytorch-pretrained-biggan: blocks that do not double, and channels at the end of a pair
    128: [(16, 16), (16, 8), (8, 4), (4, 2), (2, 1)],
    256: [(16, 16), (16, 8), (8, 8), (8, 4), (4, 2), (2, 1)],
    512: [(16, 16), (16, 8), (8, 8), (8, 4), (4, 2), (2, 1), (1, 1)],
}


@pytest.mark.parametrize("side", PUBLISHED)
def test_the_published_sizes_are_accepted(side):
    layers = [
        layer
        for before, behind in PUBLISHED[side]
        for layer in ((False, before, before), (True, before, behind))
    ]
    BigGANConfig(
        output_dim=side,
        z_dim=128,
        channel_width=128,
        num_classes=1000,
        layers=tuple(layers),
        attention_layer_position=8,
        eps=1e-4,
        n_stats=51,
    )


def test_what_fits():
    generator = load_generator(str(TINY))
    assert generator.fits((3, 16, 16), 5)
    assert generator.fits((3, 8, 8), 5), "images are made smaller"
    for shape, classes in [((3, 32, 32), 5), ((1, 16, 16), 5), ((3, 16, 8), 5), ((3, 16, 16), 10)]:
        assert not generator.fits(shape, classes)


def observed(image, label):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, 12), nn.Tanh(), nn.Linear(12, 5))
    return Observation(
        model=model,
        gradient=full_gradient(model, image, label),
        image_shape=(3, 8, 8),
        classes=5,
        batch_size=1,
    )


def test_ggl_finds_what_the_generator_can_draw():
    """Not real images: those of a generator with random weights are the only ones that it can draw."""
    torch.manual_seed(0)
    label = torch.tensor([3])
    image = F.interpolate(
        load_generator(str(TINY))(torch.tensor([[0.5, -0.9, 0.2, 0.8]]), label), (8, 8), mode="area"
    )
    observation = observed(image, label)
    long = GGL(generator=str(TINY), bound=1.0, generations=40, population=12)

    def attacked(attack):
        return attack.reconstruct(observation, generator=torch.Generator().manual_seed(0))

    start, found = attacked(dataclasses.replace(long, generations=1)), attacked(long)
    assert found.images.shape == (1, 3, 8, 8)
    assert torch.equal(found.labels, label)
    assert found.loss < 0.3 * start.loss
    assert (found.images - image).square().mean() < 0.3 * (start.images - image).square().mean()
    truncated = attacked(dataclasses.replace(long, truncation=0.2, generations=1))
    assert not torch.equal(truncated.images, start.images)


def test_ggl_refuses_what_it_does_not_fit(generator):
    observation = observed(torch.rand(1, 3, 8, 8), torch.tensor([1]))
    wrong = dataclasses.replace(observation, classes=4)
    with pytest.raises(
        AttackError, match=r"\(3, 16, 16\) in 5 classes, expected images of .*\(3, 8, 8\) in 4"
    ):
        GGL(generator=str(TINY)).reconstruct(wrong, generator=generator)


def test_truncations_out_of_place():
    for truncation in (0.0, -0.5, 1.1, float("nan")):
        with pytest.raises(ConfigError, match="0 < truncation ≤ 1, got"):
            load_generator(str(TINY), truncation=truncation)
        with pytest.raises(ConfigError, match="0 < truncation ≤ 1, got"):
            GGL(truncation=truncation)
    with pytest.raises(ConfigError, match=r"'mnist' has no truncation, got 0\.5"):
        load_generator("mnist", truncation=0.5)


def test_samples(tmp_path):
    write_samples(load_generator(str(TINY)), tmp_path / "grid.png", columns=2)
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_missing_files(folder):
    (folder / WEIGHTS).unlink()
    with pytest.raises(
        ConfigError, match=r"neither model\.safetensors nor pytorch_model\.bin is in .*biggan"
    ):
        load_generator(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(ConfigError, match=r"config\.json cannot be read \(No such file.*pytorch-pretrained"):
        load_generator(str(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"z_dim": 0}, "z_dim: expected a whole number ≥ 1, got 0"),
        ({"n_stats": 51.0}, "n_stats: expected a whole number ≥ 2, got 51.0"),
        ({"eps": 2}, "eps: expected a number between 0 and 1, got 2"),
        ({"output_dim": 32}, "output_dim: the layers lead to 16 pixels, got 32"),
        (
            {"layers": [[True, 16, 8], [False, 16, 8]]},
            r"layers\[1\]: expected \[true or false, 8, channels\]",
        ),
        ({"layers": [[True, 16, 4]]}, r"layers\[0\]: expected 16 or half as many channels, got 4"),
        ({"layers": [[True, 16, 8]]}, "layers: expected 1 channel at the end, got 8"),
        ({"layers": [["yes", 16, 8]]}, r"layers\[0\]: expected .* got \('yes', 16, 8\)"),
        ({"layers": [7]}, r"config\.json is damaged"),
        ({"layers": None}, r"config\.json is damaged"),
    ],
)
def test_impossible_sizes(folder, changes, message, unchecked):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ConfigError, match=message):
        load_generator(str(folder))


@pytest.mark.parametrize("text", ["", "{}", "[]", "no JSON"])
def test_a_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"config\.json is damaged; expected JSON with output_dim"):
        load_generator(str(folder))


def without(name):
    return {n: t for n, t in weights().items() if n != name}


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (lambda: without("embeddings.weight"), "'embeddings.weight' is missing"),
        (lambda: without("generator.gen_z.weight_u"), "'generator.gen_z.weight_orig' has no weight_u and"),
        (lambda: without("generator.bn.running_vars"), "'generator.bn.running_var' is missing"),
        (lambda: weights() | {"extra": torch.ones(1)}, "'extra' is not expected"),
        (
            lambda: weights() | {"embeddings.weight": torch.ones(4, 1000)},
            r"'embeddings.weight' has shape \(4, 1000\), expected \(4, 5\)",
        ),
        (
            lambda: weights() | {"generator.bn.running_means": torch.ones(51, 4)},
            "'generator.bn.running_means' has 51 statistics, expected 6",
        ),
        (
            lambda: weights() | {"generator.gen_z.weight_v": torch.ones(7)},
            "'generator.gen_z.weight_orig' has no weight_u and weight_v that fit it",
        ),
        (
            lambda: weights() | {"generator.gen_z.bias": torch.full((1024,), torch.nan)},
            "'generator.gen_z.bias' has non-finite values",
        ),
        (dict, "(?s)'embeddings.weight' is missing.*'generator.gen_z.weight' is missing"),
    ],
)
def test_wrong_tensors(folder, state, message):
    safetensors.torch.save_file(state(), folder / WEIGHTS)
    with pytest.raises(ConfigError, match=message):
        load_generator(str(folder))


class Hostile:
    """What runs code when an ordinary pickle is read."""

    def __reduce__(self):
        return print, ("executed",)


def test_pickles_that_hold_more_than_tensors_are_never_loaded(folder, capsys):
    (folder / WEIGHTS).unlink()
    place = folder / OLD_WEIGHTS
    torch.save({"embeddings.weight": Hostile()}, place)
    contents = [
        place.read_bytes(),
        pickle.dumps(Hostile(), protocol=2),
        b"",
        b"nonsense",
        place.read_bytes()[:-30],
    ]
    for content in contents:
        place.write_bytes(content)
        with pytest.raises(ConfigError, match=r"pytorch_model\.bin is damaged, or holds more than tensors"):
            load_generator(str(folder))
    for other in ([torch.ones(1)], {"a": 1}, torch.ones(2)):
        torch.save(other, place)
        with pytest.raises(ConfigError, match=r"pytorch_model\.bin is no mapping of names to tensors"):
            load_generator(str(folder))
    assert "executed" not in capsys.readouterr().out


def test_damaged_safetensors(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-1])
    with pytest.raises(ConfigError, match=r"model\.safetensors is damaged"):
        load_generator(str(folder))
