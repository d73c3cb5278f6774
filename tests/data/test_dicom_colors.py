"""What the colors in a DICOM file become."""

import io
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from fedkl.data import FolderImages
from tests.data.dicom_files import BIG, EXPLICIT, IMPLICIT, JPEG, JPEG_2000, dicom, encapsulated, words
from tests.data.dicom_reading import packaged, read

pydicom = pytest.importorskip("pydicom", reason="of the extra dicom")
processing = pytest.importorskip("pydicom.pixels.processing")


@pytest.mark.parametrize(
    "name",
    [
        "SC_rgb_rle.dcm",
        "SC_rgb_small_odd.dcm",
        "SC_rgb_small_odd_big_endian.dcm",
        "SC_rgb_jpeg_dcmtk.dcm",
        "SC_rgb_jpeg.dcm",  # RGB that was not transformed before compression
        "SC_ybr_full_422_uncompressed.dcm",
        "SC_rgb_gdcm_KY.dcm",
        "examples_rgb_color.dcm",
        "examples_jpeg2k.dcm",
        "examples_palette.dcm",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_color_files_are_what_pydicom_shows(name):
    dataset = pydicom.dcmread(packaged(name))
    pixels = dataset.pixel_array
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        pixels = processing.apply_color_lut(pixels, dataset) / 257
    side = min(pixels.shape[:2])
    top, left = ((length - side) // 2 for length in pixels.shape[:2])
    expected = torch.tensor(pixels[top : top + side, left : left + side].astype(np.float32)).permute(2, 0, 1)
    found = FolderImages([packaged(name)], size=side)[:][0] * 255
    even = all((length - side) % 2 == 0 for length in pixels.shape[:2])
    torch.testing.assert_close(found.mean((1, 2)), expected.mean((1, 2)), atol=1.0, rtol=0)
    if even:
        torch.testing.assert_close(found, expected, atol=2, rtol=0)  # two YCbCr converters, one off each


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG])
@pytest.mark.parametrize("bits", [8, 16])
def test_a_palette_gives_colors(tmp_path, syntax, bits):
    order, white = ">" if syntax == BIG else "<", 2**bits - 1
    entries = {"R": (white, 0, 0), "G": (0, white, 0), "B": (0, 0, white)}
    more = [(0x00281101 + n, "US", (3, 5, bits)) for n in range(3)]
    more += [(0x00281201 + n, "OW", words(*entries[color], order=order)) for n, color in enumerate("RGB")]
    content = dicom(
        bytes([0, 5, 6, 7] * 4), photometric="PALETTE COLOR", bits=8, more=more, syntax=syntax, vr="OB"
    )
    found = read(tmp_path / "x.dcm", content, channels=3)
    assert found[:, 0].T.tolist() == [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG])
@pytest.mark.parametrize("count", [4, 3])
def test_a_palette_of_bytes_has_two_entries_a_word(tmp_path, syntax, count):
    stored = bytes([0, 100, 200, 255][:count]) + bytes(count % 2)
    packed = struct.pack(f"{'>' if syntax == BIG else '<'}2H", *struct.unpack("<2H", stored))
    more = [(0x00281101 + n, "US", (count, 0, 8)) for n in range(3)]
    more += [(0x00281201 + n, "OW", packed) for n in range(3)]
    options = {"photometric": "PALETTE COLOR", "bits": 8, "more": more, "syntax": syntax, "vr": "OB"}
    found = read(tmp_path / "x.dcm", dicom(bytes([0, 1, 2, 3] * 4), **options), channels=3)
    expected = [*stored[:count], stored[count - 1]][:4]
    assert (found[0, 0] * 255).round().tolist() == expected


def _jpeg(adobe=None, color=(200, 40, 90)):
    """A frame of YCbCr; Adobe's marker says so (1), or there is none (None)."""
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), color).save(stream, "JPEG", quality=95)
    frame = stream.getvalue()
    marker = b"" if adobe is None else b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00" + bytes([adobe])
    return encapsulated(frame[:2] + marker + frame[2:])


def _color_of(path, pixels, **options):
    options = {"size": (16, 16), "samples": 3, "photometric": "YBR_FULL_422", "bits": 8, **options}
    return read(path, dicom(pixels, **options), channels=3)[:, 0, 0] * 255


@pytest.mark.parametrize("planar", [0, 1])
def test_compressed_colors_are_not_one_after_the_other(tmp_path, planar):
    change, color = {0x00280006: planar}, torch.tensor([200.0, 40, 90])
    found = _color_of(tmp_path / "x.dcm", _jpeg(), syntax=JPEG, change=change)
    torch.testing.assert_close(found, color, atol=3, rtol=0)
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 90)).save(stream, "JPEG2000", no_jp2=True)
    options = {"syntax": JPEG_2000, "photometric": "YBR_RCT", "change": change}
    found = _color_of(tmp_path / "x.dcm", encapsulated(stream.getvalue()), **options)
    torch.testing.assert_close(found, color, atol=1, rtol=0)


@pytest.mark.parametrize("photometric", ["YBR_FULL", "YBR_FULL_422", "RGB"])
@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.filterwarnings("ignore")
def test_what_adobes_marker_calls_transformed_is_transformed_once(tmp_path, photometric, planar):
    options = {"photometric": photometric, "change": {0x00280006: planar}, "syntax": JPEG}
    found = _color_of(tmp_path / "x.dcm", _jpeg(adobe=1), **options)
    torch.testing.assert_close(found, torch.tensor([200.0, 40, 90]), atol=3, rtol=0)


def test_what_adobes_marker_calls_rgb_stays(tmp_path):
    stream = io.BytesIO()
    Image.new("RGB", (16, 16), (200, 40, 90)).save(stream, "JPEG", quality=95, keep_rgb=True)
    assert Image.open(stream).info["adobe_transform"] == 0
    pixels = encapsulated(stream.getvalue())
    found = _color_of(tmp_path / "x.dcm", pixels, photometric="RGB", syntax=JPEG)
    torch.testing.assert_close(found, torch.tensor([200.0, 40, 90]), atol=3, rtol=0)


def test_plain_colors_may_be_one_after_the_other(tmp_path):
    pixels = bytes([200] * 256 + [40] * 256 + [90] * 256)
    found = _color_of(tmp_path / "x.dcm", pixels, photometric="RGB", change={0x00280006: 1})
    assert found.round().tolist() == [200, 40, 90]
