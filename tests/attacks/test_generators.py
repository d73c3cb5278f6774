"""Generators' files: what is written comes back, what is damaged is refused; what the shipped ones draw."""

from __future__ import annotations

import json
import os
from importlib import resources

import pytest
import safetensors.torch
import torch

from fedkl.attacks.generators import files as generators
from fedkl.attacks.generators.files import (
    SHIPPED,
    ConditionalGenerator,
    GeneratorInfo,
    load_generator,
    save_generator,
)
from fedkl.errors import ConfigError

resource = pytest.importorskip("resource")
INFO = GeneratorInfo(dataset="toy", classes=3, channels=1, latent=4, width=8, seed=7, command="made up")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "toy.safetensors"
    save_generator(ConditionalGenerator(INFO), path)
    return path


def rewrite(path, tensors, fields):
    text = json.dumps(fields)
    metadata = {"generator": text, "digest": generators._digest(text, tensors)}
    path.write_bytes(safetensors.torch.save(tensors, metadata))


def contents(path):
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return safetensors.torch.load(data), json.loads(header["__metadata__"]["generator"])


def test_round_trip(tmp_path):
    generator = ConditionalGenerator(INFO)
    path = tmp_path / "new" / "toy.safetensors"
    save_generator(generator, path)
    loaded = load_generator(str(path))
    assert loaded.info == INFO
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    z, labels = torch.randn(6, 4), torch.arange(6) % 3
    images = loaded(z, labels)
    assert images.shape == (6, 1, 32, 32)
    torch.testing.assert_close(images, generator(z, labels), atol=0.01, rtol=0)
    assert not torch.equal(images[:1], loaded(z[:1], labels[1:2])), "the class does not matter"


def test_what_fits():
    generator = ConditionalGenerator(INFO)
    assert generator.fits((1, 32, 32), 3)
    assert generator.fits((3, 32, 32), 3), "gray images are repeated"
    assert not generator.fits((1, 28, 28), 3)
    assert not generator.fits((1, 32, 32), 4)


DEEP = b'{"__metadata__":{"generator":"' + b"[" * 100_000 + b'","digest":"x"}}'


def raw(header):
    return len(header).to_bytes(8, "little") + header + bytes(4 if b"F8" in header else 0)


def test_damaged_files_are_refused(file):
    data = file.read_bytes()
    damages = {
        "is damaged": [b"", b"pickle", data[:-1], data[:100], safetensors.torch.save({"w": torch.ones(1)})],
        "is damaged,": [raw(b'{"w":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'), raw(DEEP)],
        "was altered": [data[:-5] + bytes([data[-5] ^ 1]) + data[-4:], data.replace(b"made up", b"made on")],
    }
    for message, versions in damages.items():
        for version in versions:
            file.write_bytes(version)
            with pytest.raises(ConfigError, match=message):
                load_generator(str(file))


def test_files_that_do_not_fit_are_refused(file):
    tensors, fields = contents(file)
    nan = dict(tensors) | {"up3.bias": torch.full((1,), torch.nan).half()}
    odd = {name: t for name, t in tensors.items() if name != "up1.bias"} | {"extra": torch.ones(1)}
    cases = [
        (tensors, fields | {"architecture": "transformer"}, "architecture 'transformer'"),
        (tensors, fields | {"later": 1}, "other fields"),
        (tensors, fields | {"latent": 5}, r"'spread.weight' has shape \(128, 36\), expected \(128, 37\)"),
        (tensors, fields | {"classes": 0}, "classes: expected 1 to 10000, got 0"),
        (tensors, fields | {"channels": 4}, "channels: expected 1 to 3, got 4"),
        (nan, fields, "'up3.bias' has non-finite values"),
        (odd, fields, "(?s)'up1.bias' is missing.*'extra' is unexpected"),
        (tensors | {"up1.bias": tensors["up1.bias"].double()}, fields, "'up1.bias' has dtype torch.float64"),
        (tensors | {"\x1b[2J": torch.ones(())}, fields, r"'\\x1b\[2J' is unexpected"),
        (tensors, fields | {"architecture": ["x" * 10_000]}, "architecture \"?.'xxx"),
        (tensors, fields | {"dataset": ["mnist"]}, "other fields"),
        (tensors, fields | {"seed": True}, "other fields"),
        (tensors, fields | {"command": None}, "other fields"),
        (tensors, {name: value for name, value in fields.items() if name != "width"}, "other fields"),
        (tensors, fields | {"latent": "4"}, "other fields"),
        (tensors, fields | {"latent": 10**4000}, "latent: expected 1 to 4096, got 1000"),
        (tensors, [fields], "is damaged, or no generator"),
    ]
    for changed, described, message in cases:
        rewrite(file, changed, described)
        with pytest.raises(ConfigError, match=message) as caught:
            load_generator(str(file))
        assert len(str(caught.value)) < 1000


def test_a_small_file_that_claims_to_be_large_takes_no_memory(file):
    """Of the widest generator one layer alone has a gigabyte."""
    tensors, fields = contents(file)
    rewrite(file, tensors, fields | {"latent": 4096, "width": 4096})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ConfigError, match=r"'spread.weight' has shape \(128, 36\), expected \(65536, 4128\)"):
        load_generator(str(file))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**18  # in KiB


def test_what_is_no_file_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for source in (tmp_path / "pipe", "/dev/null", "x" * 5000, "a\0b"):
        with pytest.raises(ConfigError, match="nor a file that can be read"):
            load_generator(str(source))


def test_a_missing_file_names_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"neither one of mnist, cifar10 nor a file.*fedkl generator train"):
        load_generator(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="cannot be written"):
        save_generator(ConditionalGenerator(INFO), tmp_path)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_generators(name):
    size = len((resources.files("fedkl.attacks.generators") / "weights" / f"{name}.safetensors").read_bytes())
    assert size <= 600_000
    generator = load_generator(name)
    assert generator.info.dataset == name
    assert generator.info.command.startswith(f"fedkl generator train --data {name} ")
    assert generator.info.channels == {"mnist": 1, "cifar10": 3}[name]
    images = generator(torch.randn(20, generator.info.latent), torch.arange(20) % 10)
    assert bool(((images >= 0) & (images <= 1)).all())
    assert bool((images.flatten(1).std(1) > 0.05).all()), "an even gray is no picture"


def test_shipped_digits_are_of_their_class(dataset):
    """The nearest mean of real digits names most drawn ones (of real ones 4 in 5, by chance 1 in 10)."""
    train = dataset.train_images[:, :1].flatten(1)
    means = torch.stack([train[dataset.train_labels == digit].mean(0) for digit in range(10)])
    generator = load_generator("mnist")
    labels = torch.arange(300) % 10
    drawn = generator(torch.randn(300, generator.info.latent), labels).flatten(1)
    assert (torch.cdist(drawn, means).argmin(1) == labels).float().mean() > 0.6
