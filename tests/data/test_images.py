import gc
import threading
import time
from contextlib import closing

import pytest
import torch
import torch.nn.functional as F

from fedkl.data import Dataset, DataSpec, FolderImages, Subset, TensorImages, prefetched
from fedkl.errors import DataError
from fedkl.types import Images


@pytest.fixture
def pixels():
    return torch.randint(256, (7, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_stores_and_tensors_are_images(pixels, image_files):
    stores = [
        torch.rand(2, 1, 4, 4),
        TensorImages(pixels),
        Subset(TensorImages(pixels), slice(2)),
        FolderImages(image_files, size=4),
    ]
    assert all(isinstance(store, Images) for store in stores)
    assert not isinstance([[0.5]], Images)


def test_bytes_become_floats_in_the_unit_range(pixels):
    images = TensorImages(pixels)
    assert images.shape == (7, 3, 6, 6)
    assert len(images) == 7
    assert torch.equal(images[:], pixels.float() / 255)
    assert torch.equal(images[torch.tensor([6, 0, 6])], pixels[[6, 0, 6]].float() / 255)
    assert images[2:2].shape == (0, 3, 6, 6)


def test_floats_are_delivered_as_they_are_and_never_written_to(pixels):
    tensor = pixels.float() / 255
    before = tensor.clone()
    assert torch.equal(TensorImages(tensor)[:3], tensor[:3])
    TensorImages(tensor, size=9)[:]
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("size", [4, 6, 11])
def test_resize_and_channels_on_access(size):
    gray = torch.rand(5, 1, 6, 6)
    images = TensorImages(gray, size=size, channels=3)
    batch = images[torch.tensor([3, 1])]
    expected = F.interpolate(gray[[3, 1]], size=(size, size), mode="bilinear", antialias=size < 6)
    assert images.shape == (5, 3, size, size)
    assert batch.stride()[1] == 0
    torch.testing.assert_close(batch, expected.expand(-1, 3, -1, -1))


def test_a_subset_reads_through(pixels):
    images = TensorImages(pixels)
    part = Subset(Subset(images, torch.tensor([5, 4, 1])), slice(1, None))
    assert part.shape == (2, 3, 6, 6)
    assert torch.equal(part[:], images[torch.tensor([4, 1])])
    assert torch.equal(part[torch.tensor([1])], images[torch.tensor([1])])
    with pytest.raises(DataError, match=r"Subset: expected indexes in 0\.\.6, got 2 outside it"):
        Subset(images, torch.tensor([7, -1, 0]))


@pytest.mark.parametrize(
    ("tensor", "options", "message"),
    [
        (torch.zeros(2, 3, 4), {}, "expected a uint8 or float32 tensor .*got torch.float32 of shape"),
        (torch.zeros(0, 3, 4, 4), {}, "not empty"),
        (torch.zeros(2, 3, 4, 4).double(), {}, "torch.float64"),
        (torch.full((2, 3, 4, 4), 1.1), {}, r"every value in \[0, 1\]"),
        (torch.full((2, 3, 4, 4), torch.nan), {}, r"every value in \[0, 1\]"),
        (torch.zeros(2, 3, 4, 4), {"size": 0}, "got size=0, channels=3"),
        (torch.zeros(2, 3, 4, 4), {"channels": 1}, "expected size ≥ 1 and channels = 3"),
        (torch.zeros(2, 1, 4, 4), {"channels": 0}, "got size=None, channels=0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_tensor_that_is_no_images_is_refused(tensor, options, message):
    with pytest.raises(DataError, match=message):
        TensorImages(tensor, **options)


@pytest.mark.parametrize("index", [3, torch.tensor([True]), torch.tensor([[0]]), torch.tensor(0), [0]])
@pytest.mark.usefixtures("unchecked")
def test_other_indexes_are_refused(pixels, image_files, index):
    for store in (
        TensorImages(pixels),
        Subset(TensorImages(pixels), slice(3)),
        FolderImages(image_files, size=4),
    ):
        with pytest.raises(DataError, match="expected a 1-D int64 tensor or a slice as index"):
            store[index]


def test_a_dataset_takes_stores_and_reads_one_image_of_one_that_is_not_known(pixels):
    asked = []

    class Store:
        shape = (7, 3, 6, 6)

        def __len__(self):
            return 7

        def __getitem__(self, index):
            asked.append(index)
            return TensorImages(pixels)[index] + self.offset

    spec = DataSpec(name="toy", shape=(3, 6, 6), classes=2, mean=(0.5,) * 3, std=(0.2,) * 3)
    labels = torch.tensor([0, 1, 0, 1, 0, 1, 0])
    fields = {"train_labels": labels, "test_images": TensorImages(pixels), "test_labels": labels}
    Store.offset = 0
    assert "train=7, test=7" in repr(Dataset(spec, train_images=Store(), **fields))
    assert asked == [slice(None, 1)]
    Store.offset = 2
    with pytest.raises(DataError, match=r"train_images: expected every value in \[0, 1\]"):
        Dataset(spec, train_images=Store(), **fields)
    with pytest.raises(DataError, match="train_images: expected shape"):
        Dataset(spec, train_images=TensorImages(pixels, size=5), **fields)


class Slow:
    """A store that streams: notes which thread reads what and when."""

    streams = True
    shape = (9, 1, 1, 1)

    def __init__(self, *, fails_at=None):
        self.fails_at = fails_at
        self.read = []
        self.threads = set()

    def __len__(self):
        return 9

    def __getitem__(self, index):
        self.threads.add(threading.current_thread())
        self.read.append(index.tolist())
        if self.fails_at in index.tolist():
            raise DataError(f"{self.fails_at}.jpg: broken")
        return index.float().div(10).view(-1, 1, 1, 1)


def _wait_for(condition):
    until = time.monotonic() + 5
    while not condition() and time.monotonic() < until:
        time.sleep(0.001)
    assert condition()


def test_batches_in_memory_need_no_thread(pixels):
    before = threading.active_count()
    batches = list(prefetched(TensorImages(pixels), torch.arange(7).split(3)))
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert torch.equal(torch.cat(batches), TensorImages(pixels)[:])
    assert threading.active_count() == before


def test_a_store_that_streams_is_read_one_batch_ahead_in_one_thread():
    store = Slow()
    batches = prefetched(store, torch.arange(9).split(2))
    first = next(batches)
    _wait_for(lambda: store.read == [[0, 1], [2, 3]])
    time.sleep(0.02)
    assert store.read == [[0, 1], [2, 3]]  # not further ahead
    everything = torch.cat([first, *batches])
    assert everything.flatten().tolist() == pytest.approx([n / 10 for n in range(9)])
    assert threading.current_thread() not in store.threads
    assert len(store.threads) == 1
    _wait_for(lambda: not any(thread.is_alive() for thread in store.threads))


def test_no_batches_at_all():
    assert list(prefetched(Slow(), [])) == []


@pytest.mark.parametrize("subset", [False, True])
def test_a_consumer_that_stops_early_leaves_no_thread(subset):
    store = Slow()
    with closing(
        prefetched(Subset(store, slice(9)) if subset else store, torch.arange(9).split(1))
    ) as batches:
        next(batches)
    assert not any(thread.is_alive() for thread in store.threads)
    assert len(store.read) <= 3
    for _ in prefetched(store, torch.arange(9).split(1)):
        break
    gc.collect()
    assert not any(thread.is_alive() for thread in store.threads)


def test_an_error_comes_at_its_batch_and_leaves_no_thread():
    store = Slow(fails_at=4)
    seen = []
    with pytest.raises(DataError, match=r"4\.jpg: broken"):
        seen.extend(len(batch) for batch in prefetched(store, torch.arange(9).split(2)))
    assert seen == [2, 2]
    assert not any(thread.is_alive() for thread in store.threads)


def test_an_error_of_the_indexes_passes_too():
    def indexes():
        yield torch.tensor([0])
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(prefetched(Slow(), indexes()))
