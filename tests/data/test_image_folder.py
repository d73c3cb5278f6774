import itertools
import os
import shutil

import pytest
import torch
from PIL import Image

from fedkl import configured
from fedkl.attacking.observing import trials_of
from fedkl.config import DataConfig
from fedkl.data import FolderImages, Subset, load
from fedkl.errors import DataError

COLORS = {"bird": (200, 0, 0), "cat": (0, 200, 0), "dog": (0, 0, 200)}


@pytest.fixture
def root(tmp_path):
    """Two training images and one validation image of each class."""
    for split, count in (("train", 2), ("val", 1)):
        for name, color in COLORS.items():
            folder = tmp_path / "imagefolder" / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                Image.new("RGB", (12, 10), color).save(folder / f"{number}.JPEG", quality=100)
    return tmp_path


def test_classes_are_the_sorted_folders_of_train(root):
    dataset = load("imagefolder", root=root, size=8)
    assert repr(dataset) == "Dataset('imagefolder', train=6, test=3, shape=(3, 8, 8), classes=3)"
    assert dataset.train_labels.sort().values.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.test_labels.sort().values.tolist() == [0, 1, 2]
    assert isinstance(dataset.train_images, FolderImages)
    assert dataset.train_images[:].amax((2, 3)).argmax(1).tolist() == dataset.train_labels.tolist()
    assert dataset.spec.mean == (0.485, 0.456, 0.406)


def test_the_first_images_are_of_all_classes_and_the_same_each_time(tmp_path, monkeypatch):
    """Attacks take the first test images, and `train_images` of a configuration the first of all."""
    for split, name in itertools.product(("train", "val"), "ab"):
        (tmp_path / split / name).mkdir(parents=True)
        for number in range(60):
            Image.new("L", (4, 4), number).save(tmp_path / split / name / f"{number:02}.png")
    dataset, again = (load("imagefolder", root=tmp_path, size=4) for _ in range(2))
    for part in ("train_labels", "test_labels"):
        labels = getattr(dataset, part)
        assert torch.equal(labels, getattr(again, part))
        assert labels[:20].float().mean() == pytest.approx(0.5, abs=0.3)
        assert labels.tolist().count(0) == 60
    (trial,) = trials_of(dataset, trials=1, batch_size=20)
    assert trial.labels.unique().tolist() == [0, 1]
    monkeypatch.setattr(configured, "_DECODED", 100)
    some = configured.dataset_of(DataConfig(name="imagefolder", root=str(tmp_path), size=4, train_images=20))
    assert isinstance(some.train_images, Subset)  # of so many nothing is decoded before it is asked for
    assert some.train_labels.unique().tolist() == [0, 1]


def test_the_usual_size_is_224_and_the_folder_itself_will_do(root):
    assert load("imagefolder", root=root / "imagefolder").spec.shape == (3, 224, 224)


def test_test_stands_for_val_and_may_lack_classes(root):
    (root / "imagefolder" / "val").rename(root / "imagefolder" / "test")
    shutil.rmtree(root / "imagefolder" / "test" / "cat")
    assert load("imagefolder", root=root).test_labels.sort().values.tolist() == [0, 2]


def test_hidden_files_are_skipped(root):
    (root / "imagefolder" / "train" / ".DS_Store").touch()
    (root / "imagefolder" / "train" / "cat" / "._0.JPEG").touch()
    assert len(load("imagefolder", root=root).train_images) == 6


def test_nothing_but_the_first_image_of_each_part_is_decoded_on_loading(root):
    (root / "imagefolder" / "train" / "dog" / "1.JPEG").write_bytes(b"")
    dataset = load("imagefolder", root=root, size=8)
    others = (dataset.train_labels != dataset.spec.classes - 1).nonzero()[:, 0]
    assert dataset.train_images[others].shape == (4, 3, 8, 8)
    with pytest.raises(DataError, match=r"train/dog/1\.JPEG: expected a readable image"):
        dataset.train_images[:]
    (root / "imagefolder" / "train" / "bird" / "0.JPEG").write_bytes(b"")
    with pytest.raises(DataError, match=r"train/bird/0\.JPEG: expected a readable image"):
        load("imagefolder", root=root, size=8)


def _remove_train(folder):
    shutil.rmtree(folder / "train")


def _remove_val(folder):
    shutil.rmtree(folder / "val")


def _empty_train(folder):
    shutil.rmtree(folder / "train")
    (folder / "train").mkdir()


def _empty_class(folder):
    (folder / "train" / "emu").mkdir()


def _extra_class(folder):
    (folder / "val" / "bird").rename(folder / "val" / "emu")


def _text(folder):
    (folder / "train" / "cat" / "notes.txt").touch()


def _nested(folder):
    (folder / "train" / "cat" / "more.jpg").mkdir()


def _flat(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").mkdir()
    for number in range(3):
        (folder / "val" / f"ILSVRC2012_val_0000000{number}.JPEG").touch()


def _file_for_folder(folder):
    shutil.rmtree(folder / "val")
    (folder / "val").touch()


def _pipe(folder):
    os.mkfifo(folder / "train" / "cat" / "x.png")


def _loop(folder):
    (folder / "train" / "cat" / "x.png").symlink_to("x.png")


def _loop_of_folders(folder):
    (folder / "train" / "emu").symlink_to("emu")


def _forged_line(folder):
    (folder / "train" / "cat" / "a\n  - \x1b[31mall is lost.txt").touch()


PROBLEMS = {
    _pipe: r"/train/cat/x\.png: expected an image file \(.*\), got another kind of file",
    _loop: r"/train/cat/x\.png: expected an image file \(.*\), got another kind of file",
    _loop_of_folders: r"/train/emu: expected only a folder for each class in .*/train, got 1 files",
    _forged_line: r"/train/cat/a\\n  - \\x1b\[31mall is lost\.txt: expected an image file",
    _remove_train: r"/train: expected a folder with a folder for each class, found none",
    _remove_val: r"/val: expected a folder with a folder for each class, found none",
    _file_for_folder: r"/val: expected a folder with a folder for each class, found none",
    _empty_train: r"/train: expected a folder for each class, got an empty folder",
    _empty_class: r"/train/emu: expected images of this class, got an empty folder",
    _extra_class: r"/val/emu: expected a class that train has",
    _text: r"/train/cat/notes\.txt: expected an image file \(.*\), got another kind of file",
    _nested: r"/train/cat/more\.jpg: expected an image file \(.*\), got a folder",
    _flat: r"val_00000000\.JPEG: expected only a folder for each class in .*/val, got 3 files",
}


@pytest.mark.parametrize("damage", PROBLEMS, ids=lambda damage: damage.__name__)
def test_each_problem_names_the_file_or_folder(root, damage):
    damage(root / "imagefolder")
    with pytest.raises(DataError, match=PROBLEMS[damage]) as caught:
        load("imagefolder", root=root)
    assert f"Arrange the images as {root / 'imagefolder'}/train/<class>/<image>" in str(caught.value)
    of_ilsvrc = damage is _flat  # its files have the names of ILSVRC2012's
    assert ("LOC_val_solution.csv" in str(caught.value)) == of_ilsvrc


def test_ilsvrc2012s_own_advice_comes_with_its_folders(root):
    (root / "imagefolder" / "train" / "cat").rename(root / "imagefolder" / "train" / "n02123045")
    with pytest.raises(DataError, match=r"WordNet id, which is in LOC_val_solution\.csv"):
        load("imagefolder", root=root)


def test_ten_thousand_strange_files_are_counted_not_listed(root):
    for number in range(10_000):
        (root / "imagefolder" / "train" / "cat" / f"{number}.txt").touch()
    with pytest.raises(DataError, match="and 9990 more") as caught:
        load("imagefolder", root=root)
    assert len(str(caught.value)) < 5000


def test_many_problems_are_counted_not_listed(root):
    for number in range(30):
        (root / "imagefolder" / "train" / f"empty{number:02}").mkdir()
    with pytest.raises(DataError) as caught:
        load("imagefolder", root=root)
    assert str(caught.value).count("an empty folder") == 10
    assert "and 20 more" in str(caught.value)


@pytest.mark.parametrize("options", [{"size": 0}, {"channels": 2}])
def test_size_and_channels_that_cannot_be_are_errors(root, options):
    with pytest.raises(DataError, match=r"expected size ≥ 1 and channels 1 \(gray\) or 3"):
        load("imagefolder", root=root, **options)


def test_color_becomes_gray_where_one_channel_is_asked_for(root):
    dataset = load("imagefolder", root=root, size=8, channels=1)
    assert dataset.spec.shape == (1, 8, 8)
    assert len(dataset.spec.mean) == len(dataset.spec.std) == 1
    places = torch.stack([(dataset.train_labels == label).nonzero()[0, 0] for label in range(3)])
    grays = dataset.train_images[places].mean((1, 2, 3)) * 255
    torch.testing.assert_close(grays, 200 * torch.tensor([0.299, 0.587, 0.114]), atol=1.5, rtol=0)
