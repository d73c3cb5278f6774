from pathlib import Path

import jaxtyping
import pytest
import torch

from fedkl.data import Dataset, DataSpec, default_root, load
from fedkl.errors import DataError

SPEC = DataSpec(name="toy", shape=(3, 4, 4), classes=2, mean=(0.5,) * 3, std=(0.2,) * 3)


@pytest.fixture
def no_type_checks(monkeypatch):
    """Lets wrongly typed arguments reach our own checks where jaxtyping checks signatures as well."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def tensors(**changes):
    fields = {
        "train_images": torch.rand(5, 3, 4, 4),
        "train_labels": torch.tensor([0, 1, 0, 1, 1]),
        "test_images": torch.rand(2, 3, 4, 4),
        "test_labels": torch.tensor([1, 0]),
    }
    return fields | changes


def test_a_sound_dataset_shows_sizes_and_no_values():
    dataset = Dataset(SPEC, **tensors())
    assert repr(dataset) == "Dataset('toy', train=5, test=2, shape=(3, 4, 4), classes=2)"
    assert str(dataset) == repr(dataset)


def test_range_check_reads_every_channel_of_a_plain_tensor_and_every_stored_value_of_an_expanded_one():
    images = torch.rand(5, 3, 4, 4)
    images[4, 2, 3, 3] = 1.5
    with pytest.raises(DataError, match="train_images: expected every value in"):
        Dataset(SPEC, **tensors(train_images=images))
    with pytest.raises(DataError, match="train_images: expected every value in"):
        Dataset(SPEC, **tensors(train_images=images[:, 2:].expand(-1, 3, -1, -1)))
    Dataset(SPEC, **tensors(train_images=images[:, :1].expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("train_images", torch.rand(5, 1, 4, 4), r"expected shape \(n, 3, 4, 4\), got \(5, 1, 4, 4\)"),
        ("train_images", torch.rand(5, 48), r"expected shape \(n, 3, 4, 4\), got \(5, 48\)"),
        ("train_images", torch.tensor(0.5), r"expected shape \(n, 3, 4, 4\), got \(\)"),
        ("test_images", torch.rand(2, 3, 4, 4).double(), "expected dtype torch.float32, got torch.float64"),
        ("test_images", torch.zeros(2, 3, 4, 4, dtype=torch.cfloat), "got torch.complex64"),
        ("train_images", torch.rand(0, 3, 4, 4), "expected at least one image"),
        ("train_images", torch.full((5, 3, 4, 4), torch.nan), r"expected every value in \[0, 1\]"),
        ("train_images", torch.full((5, 3, 4, 4), -0.1), r"expected every value in \[0, 1\]"),
        ("train_images", torch.rand(5, 3, 4, 4).to_sparse(), "expected a dense torch.Tensor"),
        ("train_images", [[0.5]], "expected a dense torch.Tensor or Images, got list"),
        ("test_labels", [0, 1], "expected a dense torch.Tensor, got list"),
        ("train_labels", torch.zeros(5), "expected dtype torch.int64, got torch.float32"),
        ("train_labels", torch.zeros(4, dtype=torch.int64), "expected 5 labels, one per image, got 4"),
        ("train_labels", torch.zeros(5, 1, dtype=torch.int64), r"expected shape \(n,\), got \(5, 1\)"),
        ("test_labels", torch.tensor([2, 1]), r"expected labels in 0\.\.1, got 1 outside it"),
        ("test_labels", torch.tensor([-1, 7]), r"expected labels in 0\.\.1, got 2 outside it"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_each_bad_tensor_is_named(field, value, message):
    with pytest.raises(DataError, match=f"{field}: .*{message}"):
        Dataset(SPEC, **tensors(**{field: value}))


@pytest.mark.usefixtures("no_type_checks")
def test_all_problems_come_in_one_message_that_shows_no_values():
    secret = 0.123456
    bad = torch.full((2, 3, 4, 4), secret + 7)
    with pytest.raises(DataError) as caught:
        Dataset(SPEC, **tensors(train_labels=torch.zeros(4), test_images=bad))
    message = str(caught.value)
    assert message.count("\n  - ") == 3
    assert "Dataset 'toy'" in message
    assert "7.12" not in message


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": ""}, "DataSpec.name"),
        ({"shape": (3, 0, 4)}, "DataSpec.shape"),
        ({"shape": (3, 4)}, "DataSpec.shape"),
        ({"shape": ()}, "DataSpec.shape"),
        ({"classes": 0}, "DataSpec.classes: expected at least 1, got 0"),
        ({"mean": (0.5,)}, r"DataSpec.mean: expected one value per channel of \(3, 4, 4\), got 1"),
        ({"mean": (0.5, 0.5, 128.0)}, r"DataSpec.mean: expected values in \[0, 1\]"),
        ({"std": (0.2, 0.0, 0.2)}, "DataSpec.std: expected finite values above 0"),
        ({"std": (0.2, 0.2, float("nan"))}, "DataSpec.std: expected finite values above 0"),
    ],
)
@pytest.mark.usefixtures("no_type_checks")
def test_each_bad_spec_field_is_named(changes, message):
    fields = {"name": "toy", "shape": (3, 4, 4), "classes": 2, "mean": (0.5,) * 3, "std": (0.2,) * 3}
    with pytest.raises(DataError, match=message):
        DataSpec(**(fields | changes))


def test_default_root_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDKL_DATA", str(tmp_path))
    assert default_root() == tmp_path
    monkeypatch.setenv("FEDKL_DATA", "")
    assert default_root() == Path.home() / ".cache/fedkl/data"
    monkeypatch.delenv("FEDKL_DATA")
    assert default_root() == Path.home() / ".cache/fedkl/data"


def test_a_home_folder_that_is_not_known_is_an_error(monkeypatch, files, put):
    root = put(files)
    monkeypatch.setenv("FEDKL_DATA", "~no-such-user/data")
    with pytest.raises(
        DataError, match="FEDKL_DATA: expected a folder, got ~no-such-user/data, whose home is not"
    ):
        default_root()
    assert len(load("mnist", root=root).train_images) == 6  # it is not needed here


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "imagefolder"])
def test_a_root_that_cannot_be_looked_into_is_an_error(tmp_path, name):
    with pytest.raises(
        DataError, match=r"expected a readable folder, got OSError: .*too long.*another data root"
    ):
        load(name, root=tmp_path / ("x" * 300))


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "imagefolder"])
def test_control_codes_of_the_root_are_escaped(tmp_path, name):
    with pytest.raises(DataError) as caught:
        load(name, root=tmp_path / "a\n\x1b[31mb")
    assert r"a\n\x1b[31mb" in str(caught.value)
    assert all(line.isprintable() for line in str(caught.value).splitlines())
