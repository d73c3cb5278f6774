import random
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset, TensorDataset
from torch.utils.data import Dataset as TorchDataset

from fedkl import rng
from fedkl.data import DATASETS, as_tensors, forget_dataset, from_torch, load, register_dataset
from fedkl.errors import DataError

BYTES = torch.randint(256, (30, 3, 6, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(30) % 3


class Files(TorchDataset):
    """As torchvision's datasets: a PIL image, a number, and a random transform."""

    def __init__(self, count=10, mode="L", noise=0.0):
        self.count, self.mode, self.noise = count, mode, noise

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = Image.new("L", (5, 6), 10 * index).convert(self.mode)
        if not self.noise:
            return image, index % 2
        return torch.rand(1, 6, 5) * self.noise, index % 2


def test_two_datasets_are_taken_as_they_are():
    dataset = from_torch(TensorDataset(BYTES, LABELS), TensorDataset(BYTES[:9] / 255, LABELS[:9]))
    assert repr(dataset) == "Dataset('own', train=30, test=9, shape=(3, 6, 5), classes=3)"
    torch.testing.assert_close(dataset.train_images[:], BYTES / 255)
    torch.testing.assert_close(dataset.test_images[:], BYTES[:9] / 255)
    assert dataset.train_labels.tolist() == LABELS.tolist()
    pixels = (BYTES.double() / 255).transpose(0, 1).flatten(1)
    assert dataset.spec.mean == pytest.approx(pixels.mean(1).tolist(), abs=1e-6)
    assert dataset.spec.std == pytest.approx(pixels.std(1, unbiased=False).tolist(), abs=1e-6)


def test_bytes_stay_bytes_in_memory():
    images = from_torch(TensorDataset(BYTES, LABELS), TensorDataset(BYTES, LABELS)).train_images
    assert "held=torch.uint8" in repr(images)


@pytest.mark.parametrize("keep", [True, False])
def test_of_one_dataset_a_fifth_is_kept_back(keep):
    dataset = from_torch(TensorDataset(BYTES, LABELS), keep=keep)
    again = from_torch(TensorDataset(BYTES, LABELS), keep=True)
    assert (len(dataset.train_images), len(dataset.test_images)) == (24, 6)
    together = torch.cat([dataset.train_images[:], dataset.test_images[:]]).flatten(1)
    assert len(torch.unique(together, dim=0)) == 30
    torch.testing.assert_close(dataset.test_images[:], again.test_images[:])
    place = next(n for n in range(30) if torch.equal(BYTES[n] / 255, dataset.test_images[:][2]))
    assert dataset.test_labels[2] == LABELS[place]


def test_images_that_are_not_kept_are_read_when_they_are_asked_for():
    class Watched(Files):
        read = 0

        def __getitem__(self, index):
            Watched.read += 1
            return super().__getitem__(index)

    dataset = from_torch(Watched(), Watched(), keep=False)
    Watched.read = 0
    assert dataset.train_images[torch.tensor([3, 0])].amax((1, 2, 3)).mul(255).round().tolist() == [30, 0]
    assert Watched.read == 2


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "P", "CMYK"])
def test_pil_images_of_every_mode_are_taken(mode):
    images, labels = as_tensors(Files(mode=mode))
    assert images.shape == (10, 1 if mode in ("1", "L", "LA") else 3, 6, 5)
    assert labels.tolist() == [0, 1] * 5
    if mode != "1":
        torch.testing.assert_close(images[7], torch.full_like(images[7], 70 / 255), rtol=0, atol=0.005)


def test_pil_images_of_16_bits_keep_their_levels():
    levels = np.arange(30, dtype=np.uint16).reshape(6, 5) + 40_000
    images, _ = as_tensors([(Image.fromarray(levels), 0)])
    torch.testing.assert_close(images[0, 0], torch.tensor(levels / 65535, dtype=torch.float32))


@pytest.mark.parametrize(
    "image",
    [
        np.full((6, 5, 3), 51, dtype=np.uint8),
        np.full((3, 6, 5), 51, dtype=np.uint8),
        np.full((6, 5, 3), 0.2),
        torch.full((3, 6, 5), 0.2, dtype=torch.float64),
        torch.full((3, 6, 5), 51, dtype=torch.uint8),
        torch.full((3, 6, 5), 0.2).half().float(),
    ],
)
@pytest.mark.parametrize("label", [1, np.int64(1), np.array([1]), torch.tensor(1), torch.tensor([1]), True])
def test_arrays_tensors_and_labels_of_every_kind_are_taken(image, label):
    images, labels = as_tensors([(image, label)])
    torch.testing.assert_close(images, torch.full((1, 3, 6, 5), 0.2), rtol=0, atol=1e-4)
    assert labels.tolist() == [1]


def test_two_dimensions_are_gray():
    assert as_tensors([(torch.rand(6, 5), 0), (torch.rand(6, 5), 0)])[0].shape == (2, 1, 6, 5)
    assert as_tensors([(np.zeros((6, 5), dtype=np.uint8), 0)])[0].shape == (1, 1, 6, 5)


def test_random_transforms_repeat_and_leave_the_callers_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = as_tensors(Files(noise=1.0))[0]
    torch.testing.assert_close(torch.rand(2), expected)
    torch.testing.assert_close(as_tensors(Files(noise=1.0))[0], first)
    assert len(first.unique()) > 200


class Stream(IterableDataset):
    def __iter__(self):
        yield torch.rand(1, 6, 5), 0


class Failing(Files):
    def __getitem__(self, index):
        raise FileNotFoundError("ERIKA MUSTERMANN.png")


class Exiting(Files):
    def __getitem__(self, index):
        raise SystemExit(0)


def _pairs(*images, label=0):
    return [(image, label) for image in images]


GRAY = torch.rand(1, 6, 5)
BAD = {
    "a loader": (DataLoader(Files()), r"a DataLoader\. Give loader\.dataset"),
    "a stream": (Stream(), r"with len\(\) and an index, got Stream"),
    "nothing": ([], "at least one item"),
    "no pairs": ([GRAY], r"dataset\[0\]: expected a pair \(image, label\), got Tensor of 1"),
    "dictionaries": ([{"image": GRAY, "label": 0}], r"got dict of 2\. Return `image, label`"),
    "three": ([(GRAY, 0, 1)], "got tuple of 3"),
    "fails": (Failing(), r"dataset\[0\]: expected an item, got FileNotFoundError"),
    "exits": (Exiting(), r"dataset\[0\]: expected an item, got SystemExit"),
    "text": ([("x.png", 0)], r"dataset\[0\]: expected a tensor, a NumPy array or a PIL image, got str"),
    "channels last": (_pairs(torch.rand(6, 5, 3)), r"Channels come first: image\.permute"),
    "four dimensions": (_pairs(torch.rand(1, 1, 6, 5)), r"got \(1, 1, 6, 5\)"),
    "normalized": (_pairs(GRAY, GRAY - 0.5), r"dataset\[1\]: expected values in \[0, 1\], got some below 0"),
    "not divided": (_pairs(GRAY * 255), r"some above 1, or NaN\. Divide by the number that means white"),
    "nan": (_pairs(GRAY * float("nan")), "some above 1, or NaN"),
    "16 bits": (_pairs(np.zeros((6, 5), dtype=np.uint16)), r"torch\.int32\. .* image / 65535 for 16 bits"),
    "signed": (_pairs(torch.zeros(1, 6, 5, dtype=torch.int16)), r"got torch\.int16"),
    "32 bits in Pillow": (_pairs(Image.new("I", (5, 6))), "mode I, whose black and white are not known"),
    "sizes": (
        _pairs(GRAY, torch.rand(1, 7, 5)),
        r"dataset\[1\]: .* shape \(1, 6, 5\), got .* \(1, 7, 5\)\. Bring all to one size",
    ),
    "types": (_pairs(GRAY, GRAY.mul(255).byte()), r"got torch\.uint8 of shape"),
    "a measured value": ([(GRAY, 0.7)], "as label, got float"),
    "several labels": ([(GRAY, torch.tensor([0, 1, 1]))], r"got \(3,\) numbers"),
    "a name": ([(GRAY, "cat")], "got str"),
    "below zero": ([(GRAY, -1)], "got a number below 0"),
    "enormous": ([(GRAY, 10**12)], "got a larger one"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_usable_is_named_with_a_remedy(case):
    dataset, expected = BAD[case]
    with pytest.raises(DataError, match=expected) as caught:
        as_tensors(dataset)
    assert "ERIKA" not in str(caught.value)


def test_labels_have_to_fit_the_classes():
    with pytest.raises(DataError, match=r"train_labels: expected labels in 0\.\.1"):
        from_torch(TensorDataset(BYTES, LABELS), classes=2)
    assert from_torch(TensorDataset(BYTES, LABELS), classes=9).spec.classes == 9


def test_one_image_cannot_be_divided():
    with pytest.raises(DataError, match=r"at least two images, got one\. Give `test` too"):
        from_torch([(GRAY, 0)])


def test_images_of_train_and_test_have_one_shape():
    with pytest.raises(DataError, match="test_images: expected shape"):
        from_torch([(GRAY, 0)], [(torch.rand(1, 9, 9), 0)])


def test_black_images_have_a_spread_to_divide_by():
    assert from_torch([(torch.zeros(1, 4, 4), 0)] * 5).spec.std == (1.0,)


@pytest.fixture
def registered():
    @register_dataset("x-rays")
    def build():
        return from_torch(TensorDataset(BYTES, LABELS))

    yield build
    forget_dataset("x-rays")


def test_a_registered_dataset_is_loaded_by_name(registered):
    assert repr(load("x-rays")) == "Dataset('x-rays', train=24, test=6, shape=(3, 6, 5), classes=3)"
    assert "test_torch_dataset" in DATASETS["x-rays"]
    with pytest.raises(DataError, match=r"data\.size: expected none, because the dataset 'x-rays' is made"):
        load("x-rays", size=32)
    forget_dataset("x-rays")
    with pytest.raises(DataError, match="or register yours"):
        load("x-rays")


@pytest.mark.parametrize("name", ["mnist", "x/y", "", "a b", "-x", "a--b", "é"])
def test_names_that_are_taken_or_no_names_are_refused(name):
    with pytest.raises(DataError, match="expected a new name of ASCII letters, digits and single hyphens"):
        register_dataset(name)


def test_a_function_has_to_return_a_dataset():
    register_dataset("x-rays")(Files)
    try:
        with pytest.raises(DataError, match=r"got Files\. Return fedkl\.data\.from_torch\(train, test\)"):
            load("x-rays")
    finally:
        forget_dataset("x-rays")


class Drawn(TorchDataset):
    """Draws from all generators that transforms use."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        shade = (random.random() + np.random.rand() + float(torch.rand(()))) / 3  # noqa: NPY002
        return torch.full((1, 6, 5), shade), index % 2


def test_whatever_transforms_draw_from_they_draw_the_same_each_time():
    first, second = (as_tensors(Drawn())[0] for _ in range(2))
    assert torch.equal(first, second)
    assert len(first.unique()) == 4


def test_generators_go_on_as_before():
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    with rng.seeded(0):
        Drawn()[0]
    assert random.getstate() == states[0]  # beartype, which checks calls in tests, draws from it too
    assert np.random.get_state()[1].tolist() == states[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), states[2])


def test_one_thread_at_a_time_reads_a_dataset():
    """Files that are open in it cannot be read by two."""

    class Busy(Files):
        inside, most = 0, 0

        def __getitem__(self, index):
            Busy.inside += 1
            Busy.most = max(Busy.most, Busy.inside)
            time.sleep(0.002)
            Busy.inside -= 1
            return super().__getitem__(index)

    images = from_torch(Busy(), Busy(), keep=False).train_images
    threads = [threading.Thread(target=lambda: images[:]) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Busy.most == 1


def test_an_item_that_has_changed_its_shape_is_named():
    class Changing(Files):
        height = 5

        def __getitem__(self, index):
            return torch.zeros(1, 6, self.height), index % 2

    dataset = Changing()
    images = from_torch(dataset, Files(), keep=False).train_images
    dataset.height = 1  # which would be spread over the others
    with pytest.raises(DataError, match=r"Image 3: expected the shape that it had, \(1, 6, 5\)"):
        images[torch.tensor([3])]
