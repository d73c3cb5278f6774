import gzip
import struct
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image
from skimage.transform import resize

from fedkl.data import idx, load_mnist, load_mnist_sample
from fedkl.errors import DataError


def raw_images(content, count):
    return np.frombuffer(content, dtype=np.uint8, offset=16).reshape(count, 28, 28)


@pytest.mark.parametrize("packed", [False, True])
def test_plain_and_gzipped_files_give_the_same_bytes(files, put, packed):
    dataset = load_mnist(put(files, packed=packed), size=28, channels=1)
    expected = raw_images(files[idx.TRAIN_IMAGES], 6).astype(np.float32) / 255
    np.testing.assert_array_equal(dataset.train_images[:, 0].numpy(), expected)
    assert dataset.train_labels.tolist() == [5, 0, 4, 1, 9, 2]
    assert dataset.test_labels.tolist() == [7, 2, 1]
    assert dataset.spec.shape == (1, 28, 28)


def test_files_may_lie_in_the_root_itself(files, put):
    assert len(load_mnist(put(files) / "mnist").train_images) == 6


def test_a_plain_file_is_preferred(files, put):
    put(dict.fromkeys(files, b"broken"), packed=True)
    assert len(load_mnist(put(files)).train_images) == 6


def test_channels_cost_no_memory_and_are_equal():
    images = load_mnist_sample(channels=3).train_images
    assert images.shape == (2000, 3, 32, 32)
    assert images.stride()[1] == 0
    assert images.untyped_storage().nbytes() == 4 * 2000 * 32 * 32
    assert torch.equal(images[:7, 0], images[:7, 2])


def test_spec_has_the_statistics_of_the_delivered_training_images():
    dataset = load_mnist_sample()
    values = dataset.train_images[:, 0].numpy()
    np.testing.assert_allclose(dataset.spec.mean, [values.mean(dtype=np.float64)] * 3, rtol=1e-5)
    np.testing.assert_allclose(dataset.spec.std, [values.std(dtype=np.float64)] * 3, rtol=1e-5)


@pytest.mark.parametrize("size", [32, 45, 64])
def test_enlarging_agrees_with_scikit_image_and_pillow(size):
    native = load_mnist_sample(size=28, channels=1).train_images[0, 0].numpy()
    ours = load_mnist_sample(size=size, channels=1).train_images[0, 0].numpy()
    by_skimage = resize(native, (size, size), order=1, mode="edge", anti_aliasing=False)
    np.testing.assert_allclose(ours, by_skimage, atol=2e-6)
    by_pillow = np.asarray(Image.fromarray(native).resize((size, size), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(ours, by_pillow, atol=2e-6)


def test_shrinking_is_antialiased_as_in_pillow():
    native = load_mnist_sample(size=28, channels=1).train_images[0, 0].numpy()
    ours = load_mnist_sample(size=14, channels=1).train_images[0, 0].numpy()
    by_pillow = np.asarray(Image.fromarray(native).resize((14, 14), Image.Resampling.BILINEAR))
    np.testing.assert_allclose(ours, by_pillow, atol=2e-6)


def test_blocks_do_not_show():
    native = load_mnist_sample(size=28, channels=1).train_images[1020:1030]
    whole = torch.nn.functional.interpolate(native, size=(32, 32), mode="bilinear", align_corners=False)
    torch.testing.assert_close(load_mnist_sample(channels=1).train_images[1020:1030], whole)


def test_missing_files_are_all_named_with_the_place_and_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKL_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_mnist(tmp_path)
    message = str(caught.value)
    for name in (idx.TRAIN_IMAGES, idx.TRAIN_LABELS, idx.TEST_IMAGES, idx.TEST_LABELS):
        assert f"{name} (or {name}.gz) is missing: looked for it in {tmp_path / 'mnist'}" in message
    assert "`fedkl data fetch mnist` puts" in message


def test_the_command_names_a_root_that_is_not_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKL_DATA", str(tmp_path / "elsewhere"))
    with pytest.raises(DataError, match=f"`FEDKL_DATA='{tmp_path}/a b' fedkl data fetch mnist`"):
        load_mnist(tmp_path / "a b")


def header(*numbers):
    return struct.pack(f">{len(numbers)}I", *numbers)


IMAGES, LABELS = idx.TRAIN_IMAGES, idx.TRAIN_LABELS
DAMAGE = {
    "empty file": (IMAGES, lambda _: b"", "expected a header of 16 bytes, got 0"),
    "half a header": (LABELS, lambda old: old[:5], "expected a header of 8 bytes, got 5"),
    "labels for images": (
        IMAGES,
        lambda old: header(2049) + old[4:],
        "expected the magic number 0x00000803, got 0x00000801",
    ),
    "floats": (
        LABELS,
        lambda old: header(0x0D01) + old[4:],
        "expected the magic number 0x00000801, got 0x00000d01",
    ),
    "other image size": (
        IMAGES,
        lambda old: header(2051, 6, 27, 28) + old[16:],
        r"expected items of shape \(28, 28\), got \(27, 28\)",
    ),
    "no items": (IMAGES, lambda old: header(2051, 0, 28, 28), "expected at least one item"),
    "truncated": (
        IMAGES,
        lambda old: old[:-1],
        "expected 4704 bytes after the header, got 4703, it is truncated",
    ),
    "too long": (LABELS, lambda old: old + b"\0", "expected 6 bytes after the header, got more"),
    "label 10": (LABELS, lambda old: old[:-1] + b"\x0a", r"expected labels in 0\.\.9, got 1 outside it"),
    "one label fewer": (
        LABELS,
        lambda old: header(2049, 5) + old[8:-1],
        f"expected 6 labels, as many as {IMAGES} has images, got 5",
    ),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", DAMAGE)
def test_each_damage_names_the_file(files, put, case, packed):
    name, damage, message = DAMAGE[case]
    root = put(files | {name: damage(files[name])}, packed=packed)
    with pytest.raises(DataError, match=f"/{name}.*: {message}") as caught:
        load_mnist(root)
    assert "fedkl data fetch mnist" in str(caught.value)


@pytest.mark.parametrize(
    "damage", [lambda old: old[:-10], lambda old: b"<html>", lambda old: old[:40] + old[90:]]
)
def test_a_broken_gzip_file_is_named(files, put, damage):
    root = put(files, packed=True)
    path = root / "mnist" / f"{IMAGES}.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=f"{IMAGES}.gz: expected a readable gzip file, got "):
        load_mnist(root)


def test_damage_in_several_files_comes_in_one_message(files, put):
    with pytest.raises(DataError) as caught:
        load_mnist(put(dict.fromkeys(files, b"")))
    assert str(caught.value).count("expected a header") == 4


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("count", "message"), [(2**19, "it is truncated"), (2**32 - 1, "at most 524288 items")]
)
def test_a_forged_count_does_not_allocate_what_it_announces(files, put, packed, count, message):
    root = put(files | {IMAGES: header(2051, count, 28, 28) + b"\0" * 784}, packed=packed)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=message):
            load_mnist(root)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


def test_a_gzip_bomb_is_not_unpacked(files, put):
    root = put(files)
    (root / "mnist" / IMAGES).unlink()
    bomb = gzip.compress(header(2051, 2**32 - 1, 28, 28) + bytes(50_000_000))
    (root / "mnist" / f"{IMAGES}.gz").write_bytes(bomb)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="expected at most 524288 items, got a header that announces"):
            load_mnist(root)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("bad", [{"size": 0}, {"channels": 0}, {"size": -3}])
def test_size_and_channels_are_at_least_one(bad):
    with pytest.raises(DataError, match="expected size and channels of at least 1"):
        load_mnist_sample(**bad)


def test_gzip_is_recognized_by_name_only(files, put):
    root = put(files | {IMAGES: gzip.compress(files[IMAGES])})
    with pytest.raises(DataError, match="expected the magic number"):
        load_mnist(root)
