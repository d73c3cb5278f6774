import pytest
import torch

from fedkl.data import idx, load
from fedkl.data.registry import ENTRIES
from fedkl.errors import DataError


@pytest.fixture
def root(files, tmp_path):
    folder = tmp_path / "fashion-mnist"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return tmp_path


def test_it_is_read_as_mnist_is(root, files, put):
    clothing, digits = load("fashion-mnist", root=root), load("mnist", root=put(files))
    assert repr(clothing) == "Dataset('fashion-mnist', train=6, test=3, shape=(3, 32, 32), classes=10)"
    assert torch.equal(clothing.train_images, digits.train_images)
    assert torch.equal(clothing.test_labels, digits.test_labels)


def test_the_files_of_mnist_are_not_taken_for_it(files, put):
    with pytest.raises(DataError, match=r"is missing: looked for it in .*/fashion-mnist"):
        load("fashion-mnist", root=put(files))
    with pytest.raises(DataError, match=r"is missing: looked for it in .*/mnist/fashion-mnist"):
        load("fashion-mnist", root=put(files) / "mnist")


def test_damage_names_the_file_and_the_command(root):
    (root / "fashion-mnist" / idx.TEST_LABELS).write_bytes(b"\0\0\x08\x01\0\0\0\x03\x01\x02")
    with pytest.raises(
        DataError, match=rf"fashion-mnist/{idx.TEST_LABELS}: .*truncated(.|\n)*fetch fashion-mnist"
    ):
        load("fashion-mnist", root=root)


def test_its_files_are_not_those_of_mnist():
    mnist, fashion = ENTRIES["mnist"].files, ENTRIES["fashion-mnist"].files
    assert list(mnist) == list(fashion)
    assert [r.size for r in mnist.values()] == [r.size for r in fashion.values()]
    assert not {r.md5 for r in mnist.values()} & {r.md5 for r in fashion.values()}
