import time
import weakref

import pytest
import torch
from PIL import Image

from fedkl.data import FolderImages, dicom, image_folder, prefetched
from fedkl.errors import DataError
from tests.data import dicom_files


def grays(batch):
    return batch[:, 0, 0, 0].mul(255).round().int().tolist()


def test_files_become_what_pillow_makes_of_them(tmp_path):
    noise = Image.fromarray(torch.randint(256, (30, 60, 3), dtype=torch.uint8).numpy())
    noise.save(tmp_path / "noise.png")
    delivered = FolderImages([tmp_path / "noise.png"], size=10)[:]
    middle = noise.resize((20, 10), Image.Resampling.BILINEAR).crop((5, 0, 15, 10))
    expected = torch.frombuffer(bytearray(middle.tobytes()), dtype=torch.uint8).view(10, 10, 3)
    assert torch.equal(delivered[0].mul(255).round().byte(), expected.permute(2, 0, 1))
    assert delivered.is_contiguous()


def test_order_is_kept_and_files_may_repeat(image_files):
    images = FolderImages(image_files, size=4)
    assert images.shape == (5, 3, 4, 4)
    assert grays(images[:]) == [0, 10, 20, 30, 40]
    assert grays(images[torch.tensor([4, 0, 3, 3])]) == [40, 0, 30, 30]
    assert grays(images[3:1:-1]) == [30, 20]
    assert images[:0].shape == (0, 3, 4, 4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_kind_of_eight_bit_image_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image = Image.new("RGB", (5, 5), (255, 255, 255)).convert(mode)
    image.save(path, **({"transparency": bytes([0, 255])} if mode == "P" else {}))
    assert FolderImages([path], size=3)[:].unique().tolist() == [1.0]


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_and_looks_the_same(tmp_path):
    ramp = torch.linspace(0, 255, 512).to(torch.uint8).expand(512, 512).contiguous()
    Image.fromarray(ramp.numpy()).save(tmp_path / "large.jpg", quality=95)
    expected = torch.linspace(0, 1, 513)[:-1].view(32, 16).mean(1).expand(3, 32, 32)
    torch.testing.assert_close(
        FolderImages([tmp_path / "large.jpg"], size=32)[:][0], expected, atol=0.01, rtol=0
    )


def _broken(path, how):
    ramp = torch.arange(64 * 64).view(64, 64).to(torch.uint8).numpy()
    if how == "32 bits":
        Image.new("I", (4, 4)).save(path.with_suffix(".tif"))
        return path.with_suffix(".tif")
    if path.suffix in dicom.SUFFIXES:
        path.write_bytes(dicom_files.dicom(ramp.tobytes(), size=(64, 32)))
    else:
        Image.fromarray(ramp).save(path)
    content = path.read_bytes()
    damaged = {
        "truncated": content[: len(content) // 2],
        "empty": b"",
        "text": b"<html>log in first</html>",
        "header only": content[:20],
    }
    path.unlink()
    if how in damaged:
        path.write_bytes(damaged[how])
    elif how == "folder":
        path.mkdir()
    return path


@pytest.mark.parametrize("suffix", sorted(image_folder._SUFFIXES))
@pytest.mark.parametrize("how", ["truncated", "empty", "text", "header only", "missing", "folder", "32 bits"])
def test_a_file_that_cannot_be_decoded_is_named(image_files, tmp_path, how, suffix):
    if suffix in dicom.SUFFIXES:
        pytest.importorskip("pydicom", reason="of the extra dicom")
    bad = _broken(tmp_path / f"bad{suffix}", how)
    images = FolderImages([*image_files, bad], size=4)
    assert grays(images[:5]) == [0, 10, 20, 30, 40]
    with pytest.raises(DataError, match=f"{bad.name}: expected a (readable|DICOM) .*, got .*"):
        images[torch.tensor([0, 5, 1])]


@pytest.mark.parametrize("options", [{"size": 0}, {"size": 4, "workers": 0}])
def test_folder_images_need_files_a_size_and_workers(image_files, options):
    with pytest.raises(DataError, match="expected at least one file, size ≥ 1 and workers ≥ 1"):
        FolderImages(image_files, **options)
    with pytest.raises(DataError, match="got 0 files"):
        FolderImages([], size=4)


def test_streaming_holds_two_batches_however_many_there_are(image_files):
    alive, most = [], 0

    class Watched(FolderImages):
        def __getitem__(self, index):
            batch = super().__getitem__(index)
            alive.append(weakref.ref(batch))
            return batch

    images = Watched(image_files * 20, size=4)
    for batch in prefetched(images, torch.arange(100).split(2)):
        time.sleep(0.001)
        most = max(most, sum(ref() is not None for ref in alive))
        del batch
    assert len(alive) == 50
    assert most <= 3  # the consumer's, the next one, and for a moment the one after that
