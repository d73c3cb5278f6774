import gc
import math
import os
import socket
import struct
import subprocess
import sys
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from fedkl.data import FolderImages, decoding, squares
from fedkl.data.decoding import PixelBudget
from fedkl.errors import DataError

MODES = ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"]


def noise(width, height, *, mode="RGB"):
    pixels = np.random.default_rng(0).integers(256, size=(height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def save(folder, image, **options):
    path = folder / f"image.{'tif' if image.mode == 'CMYK' else 'png'}"
    if image.mode == "P":
        options["transparency"] = bytes(range(256))
    image.save(path, **options)
    return path


def decode(*paths, size=8, workers=1):
    return FolderImages(paths, size=size, workers=workers)[:]


def pixels_of(path, *, size):
    return decode(path, size=size)[0].permute(1, 2, 0).mul(255).round().int().numpy()


def in_one_piece(path, *, size):
    """What converting the whole image first gives."""
    with Image.open(path) as image:
        rgb = (image.convert("RGBA") if image.mode == "P" else image).convert("RGB")
    side = min(rgb.size)
    left, upper = (rgb.width - side) / 2, (rgb.height - side) / 2
    box = (left, upper, left + side, upper + side)
    return np.asarray(rgb.resize((size, size), Image.Resampling.BILINEAR, box=box)).astype(int)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", [(64, 64), (97, 40), (40, 97), (101, 3), (3, 101), (1, 1)])
def test_strips_do_not_show(tmp_path, monkeypatch, mode, shape):
    path = save(tmp_path, noise(*shape, mode=mode))
    for size in (1, 8, 31, 64, 150):
        expected = in_one_piece(path, size=size)
        np.testing.assert_array_equal(pixels_of(path, size=size), expected)
        with monkeypatch.context() as patch:
            patch.setattr(squares, "LARGE", 200)
            np.testing.assert_allclose(pixels_of(path, size=size), expected, atol=1)  # it may round otherwise


MEMORY = """
import sys
from pathlib import Path
import torch
from fedkl.data import FolderImages

torch.set_num_threads(1)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
copies, threads, *names = sys.argv[1:]
for name in names:
    before = peak()
    FolderImages([name] * int(copies), size=224, workers=int(threads))[:]
    print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_large_images_do_not_add_up(tmp_path):
    palette = Image.new("P", (7000, 7000), 7)
    palette.putpalette(bytes(range(256)) * 3)
    palette.save(tmp_path / "palette.png", transparency=bytes(256))  # took 9 bytes a pixel in each thread
    Image.new("L", (7800, 7800), 7).save(tmp_path / "large.jpg")  # 61 million pixels, as in ILSVRC2012
    names = [str(tmp_path / name) for name in ("large.jpg", "palette.png")]
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, "2", "2", *names],
        check=True,
        capture_output=True,
        text=True,
        timeout=200,
    )
    jpeg, png = map(float, done.stdout.split())
    assert jpeg < 100  # MiB
    assert png < 250


def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b""))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("action", ["error", "ignore"])
@pytest.mark.parametrize("limit", [Image.MAX_IMAGE_PIXELS, None])
@pytest.mark.parametrize(("width", "height"), [(9460, 9460), (20_000, 20_000), (89_478_486, 1)])
def test_an_image_that_is_too_large_is_refused(tmp_path, monkeypatch, width, height, limit, action):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    (tmp_path / "bomb.png").write_bytes(png_header(width, height))
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        with pytest.raises(DataError) as caught:
            decode(tmp_path / "bomb.png")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path}/bomb.png: expected an image of at most 89478485 pixels, got ")
    assert f"{width}×{height}" in message or f"({width * height} pixels)" in message
    assert message.endswith("Shrink or remove this file.")


def test_a_lower_limit_of_pillow_counts_also_where_it_only_warns(tmp_path, monkeypatch):
    path = save(tmp_path, noise(40, 40))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1599)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(
            DataError, match=r"image\.png: expected an image of at most 1599 pixels, got 40×40"
        ):
            decode(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1600)
    assert decode(path).shape == (1, 3, 8, 8)


def test_the_largest_image_is_decoded_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "MOST_PIXELS", 1600)
    path = save(tmp_path, noise(40, 40))
    assert decode(*[path] * 9, workers=4).shape == (9, 3, 8, 8)
    with pytest.raises(DataError, match="at most 1600 pixels, got 40×41"):
        decode(save(tmp_path, noise(40, 41)))


def test_a_file_that_is_too_large_is_refused(tmp_path, monkeypatch):
    path = save(tmp_path, noise(40, 40))
    monkeypatch.setattr(decoding, "MOST_BYTES", path.stat().st_size)
    decode(path)
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(
        DataError, match=r"image\.png: expected a file of at most \d+ bytes, got \d+\. Shrink"
    ):
        decode(path)


BLACK = zlib.compress(bytes(3 * 256 * 256))


def tiled_tiff(side, *, tile, content=BLACK):
    """An image in one tile of black pixels: a whole one if it is of 256×256."""
    values = {256: side, 257: side, 258: 8, 259: 8, 262: 2, 277: 3, 322: tile, 323: tile, 325: len(content)}
    values[324] = 8 + 2 + 12 * 10 + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, values[tag]) for tag in sorted(values))
    return b"II*\0" + struct.pack("<IH", 8, 10) + entries + bytes(4) + content


def test_a_tile_larger_than_its_image_counts(tmp_path):
    path = tmp_path / "tile.tif"
    path.write_bytes(tiled_tiff(16, tile=16384))
    with pytest.raises(DataError, match=r"tile\.tif: expected .* 89478485 pixels, got a tile of 16384×16384"):
        decode(path)
    path.write_bytes(tiled_tiff(16, tile=256))
    assert decode(path).sum() == 0


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
def test_a_tiff_that_pillow_turns_because_of_its_xmp_is_decoded(tmp_path, compression):
    xmp = b'<rdf:Description xmlns:tiff="http://ns.adobe.com/tiff/1.0/" tiff:Orientation="6"/>'
    noise(60, 20).save(tmp_path / "turned.tif", tiffinfo={700: xmp}, compression=compression)
    assert decode(tmp_path / "turned.tif").shape == (1, 3, 8, 8)


def _unix_socket(path):
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(path.relative_to(Path.cwd())))  # its whole name may be too long


KINDS = {
    "pipe": lambda path: os.mkfifo(path),
    "socket": _unix_socket,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere.png"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    KINDS[kind](tmp_path / "x.png")
    with pytest.raises(DataError, match=r"x\.png: expected a readable image, got "):
        decode(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["PCX", "TGA", "ICO", "EPS"])
def test_other_formats_are_refused_whatever_the_name(tmp_path, kind):
    noise(16, 16).save(tmp_path / "x.png", kind)
    with pytest.raises(DataError, match=r"x\.png: expected a readable image, got UnidentifiedImageError"):
        decode(tmp_path / "x.png")


@pytest.mark.parametrize("kind", ["GIF", "TIFF", "PNG", "WEBP"])
def test_of_several_frames_only_the_first_has_to_be_sound(tmp_path, kind):
    frames = [noise(60, 60, mode="L").rotate(step) for step in range(4)]
    path = tmp_path / f"x.{kind.lower()}"
    frames[0].save(
        path, kind, save_all=True, append_images=frames[1:], **{"lossless": True} if kind == "WEBP" else {}
    )
    expected = decode(path)
    content = bytearray(path.read_bytes())
    content[-1500:-500] = bytes(1000)
    path.write_bytes(content)
    torch.testing.assert_close(decode(path), expected)


def test_a_name_with_control_codes_is_escaped(tmp_path):
    path = tmp_path / "a\n\x1b[31mb.png"
    path.write_bytes(b"junk")
    with pytest.raises(DataError) as caught:
        decode(path)
    assert str(caught.value).startswith(f"{tmp_path}/a\\n\\x1b[31mb.png: expected a readable image")
    assert str(caught.value).isprintable()


def test_the_error_of_a_damaged_image_does_not_keep_the_image(tmp_path):
    path = save(tmp_path, noise(300, 300))
    path.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(DataError) as caught:
        decode(path)
    assert caught.value.__cause__ is not None
    assert not [each for each in gc.get_objects() if issubclass(type(each), ImageFile.ImageFile)]


def test_threads_share_the_pixels(monkeypatch):
    monkeypatch.setattr(decoding, "MOST_PIXELS", 100)
    budget, lock, now, most = PixelBudget(), threading.Lock(), 0, 0

    def work(number):
        nonlocal now, most
        for step in range(50):
            pixels = 1 + (37 * number + 11 * step) % 100
            with budget.taken(pixels):
                with lock:
                    now += pixels
                    most = max(most, now)
                with lock:
                    now -= pixels

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert 50 < most <= 100
    with budget.taken(100):  # all of it was given back
        pass


def test_a_small_image_does_not_overtake_a_large_one_that_waits(monkeypatch):
    monkeypatch.setattr(decoding, "MOST_PIXELS", 100)
    budget, order = PixelBudget(), []

    def work(pixels):
        with budget.taken(pixels):
            order.append(pixels)

    threads = [threading.Thread(target=work, args=(pixels,)) for pixels in (100, 1)]
    with budget.taken(10):
        for thread in threads:
            thread.start()
            thread.join(0.1)
        assert order == []
    for thread in threads:
        thread.join(60)
    assert order == [100, 1]


def test_the_budget_is_given_back_after_an_error(monkeypatch):
    monkeypatch.setattr(decoding, "MOST_PIXELS", 100)
    budget = PixelBudget()
    with pytest.raises(ValueError, match="no"), budget.taken(100):
        raise ValueError("no")
    with budget.taken(100):
        pass


def test_the_limit_is_that_of_pillow():
    assert Image.MAX_IMAGE_PIXELS == decoding.MOST_PIXELS
    assert math.isclose(decoding.MOST_BYTES, 358e6, rel_tol=0.01)
