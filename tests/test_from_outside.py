"""A defense, an attack and data from outside of the package: trained with, attacked, scored, reported."""

from __future__ import annotations

import textwrap

import pytest
import torch
from PIL import Image

from fedkl.attacks import ATTACKS
from fedkl.config import load
from fedkl.data import forget_dataset
from fedkl.defenses import DEFENSES
from tests.test_cli import fedkl as fedkl_of_cli

fedkl = fedkl_of_cli  # a fixture

FILE = '''
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from fedkl.attacks import Attack, Reconstruction, register_attack
from fedkl.defenses import UpdateDefense, register_defense


@register_defense
@dataclass(frozen=True, kw_only=True)
class Silence(UpdateDefense):
    """Sends nothing but zeros where the update is small."""

    type: Literal["my-silence"] = "my-silence"
    below: float = 1e-3

    def changed(self, change, *, draws, client):
        return {n: torch.where(t.abs() < self.below, 0 * t, t) for n, t in change.items()}

    @property
    def public_transform(self):
        return lambda change, seen: self.changed(change, draws=None, client=None)


@register_attack
@dataclass(frozen=True, kw_only=True)
class Gray(Attack):
    """Finds gray."""

    title: ClassVar[str] = "my gray"
    type: Literal["my-gray"] = "my-gray"
    level: float = 0.5

    def _run(self, observations, generators, on_evaluation):
        return [
            Reconstruction(
                images=torch.full((o.batch_size, *o.image_shape), self.level),
                labels=o.labels, scaling="clip", loss=1.0, evaluations=1, start=0,
            )
            for o in observations
        ]
'''


@pytest.fixture
def plugin(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(textwrap.dedent(FILE))
    yield file
    DEFENSES.forget("my-silence")
    ATTACKS.forget("my-gray")


def test_both_are_used_by_name(fedkl, tmp_path, plugin):
    attacked = ("--plugin", str(plugin), "attack", "--out", str(tmp_path / "attack"), "--attack", "my-gray")
    options = ("--defense", "my-silence", "--set", "attack.level=0.25", "--set", "defense.below=0.01")
    code, output = fedkl(*attacked, *options, "--trials", "2")
    assert code == 0, output
    config = load(tmp_path / "attack/config.toml")
    assert (config.attack.level, config.defense.below) == (0.25, 0.01)
    text = (tmp_path / "attack/report.md").read_text()
    assert "My gray against my-silence" in text
    assert "My gray against no protection" in text
    trained = ("--plugin", str(plugin), "train", "--out", str(tmp_path / "train"), "--defense", "my-silence")
    assert fedkl(*trained, "--rounds", "1", "--set", "data.train_images=100")[0] == 0
    assert "my-silence" in (tmp_path / "train/report.md").read_text()
    assert "my-gray" in fedkl("--plugin", str(plugin), "attack", "--list")[1]


def test_a_run_of_a_plugin_that_is_not_there_is_refused_by_name(fedkl, tmp_path, plugin):
    words = (
        "attack",
        "--out",
        str(tmp_path / "run"),
        "--attack",
        "my-gray",
        "--trials",
        "1",
        "--arms",
        "no-norm",
    )
    assert fedkl("--plugin", str(plugin), *words)[0] == 0
    DEFENSES.forget("my-silence")
    ATTACKS.forget("my-gray")
    code, output = fedkl("report", str(tmp_path / "run"))
    assert code == 2
    assert "unknown type 'my-gray'" in " ".join(output.split())
    assert "--plugin" in output


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "no such file"),
        ("1 +", "SyntaxError"),
        ("raise KeyError('x')", "KeyError"),
        ("import sys\nsys.exit(0)", "SystemExit: 0"),
        ("x = 1", "registers"),
    ],
)
def test_a_file_that_is_no_plugin(fedkl, tmp_path, content, said):
    file = tmp_path / "mine.py"
    if content is not None:
        file.write_text(content)
    code, output = fedkl("--plugin", str(file), "attack", "--list")
    assert code == 2
    assert said in " ".join(output.split())


DATASET = """
import torch
from torch.utils.data import TensorDataset

from fedkl.data import from_torch, register_dataset


@register_dataset("my-xrays")
def xrays():
    images = torch.arange(120 * 1024).view(120, 1, 32, 32).mul(2654435761).remainder(256).to(torch.uint8)
    return from_torch(TensorDataset(images, torch.arange(120) % 4))
"""


def test_a_plugin_imports_its_neighbors(fedkl, tmp_path, own_data):
    (tmp_path / "its_neighbor.py").write_text("")
    file = tmp_path / "imports.py"
    file.write_text("import its_neighbor\n" + DATASET)
    code, output = fedkl("--plugin", str(file), "attack", "--list")
    assert code == 0, output


@pytest.fixture
def own_data(tmp_path):
    file = tmp_path / "data.py"
    file.write_text(DATASET)
    yield file
    forget_dataset("my-xrays")


def test_a_dataset_of_ones_own_is_trained_with_and_attacked(fedkl, tmp_path, own_data):
    given = ("--plugin", str(own_data))
    options = ("--data", "my-xrays", "--rounds", "1", "--set", "auxiliary=8")
    code, output = fedkl(*given, "train", "--out", str(tmp_path / "train"), *options)
    assert code == 0, output
    assert "my-xrays" in (tmp_path / "train/report.md").read_text()
    forget_dataset("my-xrays")  # each command is a process of its own
    options = ("--data", "my-xrays", "--attack", "closed-form", "--trials", "2", "--arms", "no-norm")
    code, output = fedkl(*given, "attack", "--out", str(tmp_path / "attack"), *options)
    assert code == 0, output
    assert "my-xrays" in (tmp_path / "attack/report.md").read_text()
    forget_dataset("my-xrays")
    code, output = fedkl("attack", "--out", str(tmp_path / "other"), *options)
    assert code == 2
    assert "--plugin" in output


@pytest.mark.parametrize("channels", [1, 3])
def test_a_folder_of_images_is_trained_with_and_attacked(fedkl, tmp_path, channels):
    for part, label in ((part, label) for part in ("train", "val") for label in ("ill", "well")):
        folder = tmp_path / "scans" / part / label
        folder.mkdir(parents=True)
        for number in range(12):
            levels = torch.randint(65536, (40, 36), generator=torch.Generator().manual_seed(number))
            Image.fromarray(levels.numpy().astype("uint16")).save(folder / f"{number}.png")
    options = ("--data", str(tmp_path / "scans"), "--set", "data.size=32")
    options += ("--set", f"data.channels={channels}", "--set", "auxiliary=4")
    code, output = fedkl("train", "--out", str(tmp_path / "train"), *options, "--rounds", "1")
    assert code == 0, output
    config = load(tmp_path / "train/config.toml")
    assert (config.data.name, config.data.root) == ("imagefolder", str(tmp_path / "scans"))
    options = (*options, "--attack", "closed-form", "--trials", "2", "--arms", "no-norm")
    code, output = fedkl("attack", "--out", str(tmp_path / "attack"), *options)
    assert code == 0, output
