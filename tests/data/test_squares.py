"""Every kind of pixel lands in [0, 1] at its own scale, or is refused with a remedy."""

import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fedkl.data import FolderImages
from fedkl.errors import DataError

LEVELS = np.array([[0, 1, 255, 256], [4095, 4096, 32767, 32768], [65280, 65534, 65535, 7], [300] * 4])


def decode(path, **options):
    return FolderImages([path], **{"size": 4, "channels": 1, **options})[:][0]


def tiff(width, height, *, bits, content, photometric=1, kind=1):
    """Gray, uncompressed, in one strip; kind: 1 unsigned, 2 signed, 3 floats."""
    values = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 277: 1, 278: height, 339: kind}
    values |= {279: len(content), 273: 8 + 2 + 12 * 10 + 4}
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, values[tag]) for tag in sorted(values))
    return b"II*\0" + struct.pack("<IH", 8, len(values)) + entries + bytes(4) + content


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bits_are_divided_by_what_16_bits_can_hold(tmp_path, suffix):
    Image.fromarray(LEVELS.astype(np.uint16)).save(tmp_path / f"x.{suffix}")
    expected = torch.tensor(LEVELS / 65535, dtype=torch.float32)
    torch.testing.assert_close(decode(tmp_path / f"x.{suffix}")[0], expected, rtol=0, atol=1e-7)
    in_color = decode(tmp_path / f"x.{suffix}", channels=3)
    torch.testing.assert_close(in_color, expected.expand(3, -1, -1), rtol=0, atol=1e-7)


def test_the_range_is_not_the_images_own(tmp_path):
    for name, top in (("dark", 1000), ("bright", 60000)):
        Image.fromarray(np.full((4, 4), top, dtype=np.uint16)).save(tmp_path / f"{name}.png")
        assert decode(tmp_path / f"{name}.png").max().item() == pytest.approx(top / 65535)


def test_big_endian_tiff_has_the_same_levels(tmp_path):
    content = bytearray(tiff(4, 4, bits=16, content=LEVELS.astype(">u2").tobytes()))
    content[:4] = b"MM\0*"
    content[4:10] = struct.pack(">IH", *struct.unpack("<IH", content[4:10]))
    for start in range(10, 10 + 12 * 10, 12):
        content[start : start + 12] = struct.pack(
            ">HHII", *struct.unpack("<HHII", content[start : start + 12])
        )
    (tmp_path / "x.tif").write_bytes(content)
    torch.testing.assert_close(
        decode(tmp_path / "x.tif")[0], torch.tensor(LEVELS / 65535, dtype=torch.float32)
    )


def test_12_bits_are_divided_by_what_12_bits_can_hold(tmp_path):
    packed = bytes([0xFF, 0xF0, 0x00] * 8)  # 4095, 0, 4095, 0, ...
    (tmp_path / "x.tif").write_bytes(tiff(4, 4, bits=12, content=packed))
    assert decode(tmp_path / "x.tif")[0, 0].tolist() == [1, 0, 1, 0]


def test_where_zero_is_white_it_is(tmp_path):
    content = LEVELS.astype("<u2").tobytes()
    (tmp_path / "x.tif").write_bytes(tiff(4, 4, bits=16, content=content, photometric=0))
    expected = torch.tensor(1 - LEVELS / 65535, dtype=torch.float32)
    torch.testing.assert_close(decode(tmp_path / "x.tif")[0], expected)


def test_floats_are_taken_as_they_are(tmp_path):
    levels = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    Image.fromarray(levels).save(tmp_path / "x.tif")
    torch.testing.assert_close(decode(tmp_path / "x.tif")[0], torch.tensor(levels))


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), float("inf"), 255.0])
def test_other_floats_are_refused(tmp_path, value):
    levels = np.full((4, 4), 0.5, dtype=np.float32)
    levels[1, 2] = value
    Image.fromarray(levels).save(tmp_path / "x.tif")
    with pytest.raises(DataError, match=r"x\.tif: expected .* got .*floats outside \[0, 1\]\. Divide them"):
        decode(tmp_path / "x.tif")


@pytest.mark.parametrize(("bits", "kind"), [(16, 2), (32, 1), (32, 2)])
def test_numbers_whose_white_is_not_known_are_refused(tmp_path, bits, kind):
    (tmp_path / "x.tif").write_bytes(tiff(4, 4, bits=bits, kind=kind, content=bytes(16 * bits // 8)))
    with pytest.raises(
        DataError, match=r"x\.tif: .* mode I, whose black and white are not known\. Save it as gray"
    ):
        decode(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_8_bits_in_gray_are_the_same_from_every_mode(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    Image.new("RGB", (5, 5), (255, 255, 255)).convert(mode).save(path)
    assert decode(path).unique().tolist() == [1.0]


def test_color_becomes_gray_by_its_luma_and_gray_becomes_color_by_repetition(tmp_path):
    Image.new("RGB", (5, 5), (200, 100, 50)).save(tmp_path / "color.png")
    luma = (0.299 * 200 + 0.587 * 100 + 0.114 * 50) / 255
    assert decode(tmp_path / "color.png").mean().item() == pytest.approx(luma, abs=0.003)
    Image.new("L", (5, 5), 77).save(tmp_path / "gray.png")
    torch.testing.assert_close(decode(tmp_path / "gray.png", channels=3), torch.full((3, 4, 4), 77 / 255))


def test_transparency_is_ignored(tmp_path):
    for mode, color in (("LA", (90, 0)), ("RGBA", (90, 90, 90, 0))):
        Image.new(mode, (5, 5), color).save(tmp_path / f"{mode}.png")
        assert decode(tmp_path / f"{mode}.png").unique().item() == pytest.approx(90 / 255)


@pytest.mark.parametrize(("suffix", "turned"), [("jpg", False), ("png", False), ("tif", True)])
def test_the_orientation_of_exif_is_ignored_but_not_that_of_tiff(tmp_path, suffix, turned):
    image = Image.new("L", (16, 16))
    image.paste(255, (0, 0, 8, 16))  # the left half
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° when shown
    image.save(tmp_path / f"x.{suffix}", exif=exif)
    left = decode(tmp_path / f"x.{suffix}", size=2)[0, :, 0]
    assert (left > 0.5).tolist() == ([True, False] if turned else [True, True])


@pytest.mark.parametrize("shape", [(40, 97), (97, 40)])
def test_strips_of_16_bits_do_not_show(tmp_path, monkeypatch, shape):
    levels = np.random.default_rng(0).integers(65536, size=shape, dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / "x.png")
    expected = decode(tmp_path / "x.png", size=8)
    monkeypatch.setattr("fedkl.data.squares.LARGE", 200)
    torch.testing.assert_close(decode(tmp_path / "x.png", size=8), expected, rtol=0, atol=1e-6)
