"""Training of generators: from training images only, the same again by the same seed, and by command line."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fedkl import cli, data
from fedkl import generator_training as generator
from fedkl.errors import ConfigError

OPTIONS = generator.GeneratorTraining(data="mnist-sample", epochs=1, latent=4, width=16, batch_size=32)


@pytest.fixture
def few(monkeypatch):
    """A twentieth of the sample, with test images to choose."""
    full = data.load("mnist-sample")

    def serve(test_images):
        small = dataclasses.replace(
            full,
            train_images=full.train_images[:100],
            train_labels=full.train_labels[:100],
            test_images=test_images,
        )
        monkeypatch.setattr("fedkl.data.load", lambda name, **_: small)

    serve(full.test_images)
    return serve, full


def test_training_is_repeatable_and_never_sees_test_images(few):
    serve, full = few
    weights = generator.train(OPTIONS).state_dict()
    serve(torch.zeros_like(full.test_images))
    again = generator.train(OPTIONS).state_dict()
    other = generator.train(dataclasses.replace(OPTIONS, seed=1)).state_dict()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert not torch.equal(weights["up3.weight"], other["up3.weight"])


def test_training_brings_held_out_images_nearer(few):
    _, full = few
    images, labels = full.test_images[:8], full.test_labels[:8]
    told = []
    trained = generator.train(
        dataclasses.replace(OPTIONS, epochs=8), progress=lambda done, total, note: told.append((done, total))
    )
    psnr = generator.latent_psnr(trained, images, labels, steps=40)
    untrained = generator.ConditionalGenerator(trained.info)
    assert psnr.shape == (8,)
    assert psnr.mean() > generator.latent_psnr(untrained, images, labels, steps=40).mean() + 2
    assert told[-1] == (32, 32)
    assert trained.info.channels == 1, "gray images are learned as such"


def test_command_line(few, tmp_path, monkeypatch):
    monkeypatch.setattr(generator, "latent_psnr", functools.partial(generator.latent_psnr, steps=2))
    out, png = tmp_path / "mine.safetensors", tmp_path / "grid.png"
    run = CliRunner().invoke(
        cli.app,
        ["generator", "train", "--data", "mnist-sample", "--out", str(out), "--epochs", "1", "--latent", "3"],
    )
    assert run.exit_code == 0, run.output
    assert "dB near held-out images" in run.output
    info = generator.load_generator(str(out)).info
    assert (
        info.command
        == "fedkl generator train --data mnist-sample --epochs 1 --seed 0 --latent 3 --noise 0.15"
    )
    run = CliRunner().invoke(cli.app, ["generator", "samples", str(out), "--out", str(png)])
    assert run.exit_code == 0, run.output
    with Image.open(png) as picture:
        assert picture.size == (320, 320)


def test_unusable_trainings_are_refused(tmp_path):
    for wrong in ({"epochs": 0}, {"batch_size": 1}, {"noise": 0.0}, {"lr": float("inf")}):
        ((name, value),) = wrong.items()
        with pytest.raises(ConfigError, match=f"{name}={value}"):
            dataclasses.replace(OPTIONS, **wrong)
    small = generator.ConditionalGenerator(
        generator.GeneratorInfo(dataset="toy", classes=2, channels=3, latent=2)
    )
    with pytest.raises(ConfigError, match="cannot be written"):
        generator.write_samples(small, tmp_path)
