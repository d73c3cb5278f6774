import gzip
import hashlib
from pathlib import Path

import pytest
import torch

from fedkl.data import DATASETS, load, load_mnist_sample, sample
from fedkl.errors import DataError

FOLDER = Path(sample.__file__).with_name("mnist_sample")


def test_it_is_the_beginning_of_mnist():
    dataset = load_mnist_sample()
    assert repr(dataset) == "Dataset('mnist-sample', train=2000, test=500, shape=(3, 32, 32), classes=10)"
    assert dataset.train_labels[:10].tolist() == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]
    assert dataset.test_labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert dataset.train_images.dtype == torch.float32
    assert float(dataset.train_images.min()) == 0
    assert 0.99 < float(dataset.train_images.max()) <= 1


def test_every_digit_is_there_about_as_often_as_in_mnist():
    dataset = load_mnist_sample()
    assert torch.bincount(dataset.train_labels).tolist() == [191, 220, 198, 191, 214, 180, 200, 224, 172, 210]
    assert torch.bincount(dataset.test_labels).tolist() == [42, 67, 55, 45, 55, 50, 43, 49, 40, 54]


def test_statistics_are_near_those_of_the_full_set():
    spec = load_mnist_sample(size=28, channels=1).spec
    assert spec.mean[0] == pytest.approx(0.1307, abs=0.002)  # 0.1307 and 0.3081: the full training set
    assert spec.std[0] == pytest.approx(0.3081, abs=0.002)


def test_files_are_small_deterministic_and_as_the_readme_says():
    packed = sorted(FOLDER.glob("*.gz"))
    assert len(packed) == 4
    assert sum(path.stat().st_size for path in packed) < 1_000_000
    readme = (FOLDER / "README.txt").read_text()
    assert "CC BY-SA 3.0" in readme
    for path in packed:
        assert path.read_bytes()[4:8] == b"\0\0\0\0"  # no time stamp
        content = gzip.decompress(path.read_bytes())
        assert f"{hashlib.md5(content).hexdigest()}  {path.stem}" in readme


def test_a_damaged_installation_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(sample, "_FOLDER", tmp_path)
    with pytest.raises(DataError, match="reinstall fedkl"):
        load_mnist_sample()


def test_load_passes_size_and_channels_and_needs_no_root(tmp_path):
    dataset = load("mnist-sample", root=tmp_path / "nowhere", size=28, channels=1)
    assert dataset.spec.shape == (1, 28, 28)


def test_load_finds_files_below_the_default_root(files, put, monkeypatch):
    monkeypatch.setenv("FEDKL_DATA", str(put(files)))
    assert len(load("mnist").test_labels) == 3


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(DataError, match=r"expected one of 'cifar10', .*'mnist', 'mnist-sample', got 'minst'"):
        load("minst")


def test_every_dataset_has_one_line_of_info():
    names = {"cifar10", "cifar100", "fashion-mnist", "imagefolder", "mnist", "mnist-sample"}
    assert set(DATASETS) == names
    assert all(info and "\n" not in info for info in DATASETS.values())
