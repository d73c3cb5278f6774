import io
import itertools
import logging
import re
import struct
import subprocess
import sys
import traceback
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedkl.data import FolderImages, decoding, load
from fedkl.errors import DataError
from tests.data.dicom_files import (
    BIG,
    DEFLATED,
    EXPLICIT,
    IMPLICIT,
    JPEG,
    JPEG_2000,
    JPEG_LOSSLESS,
    PATIENT,
    RUNS,
    UNDEFINED,
    dicom,
    element,
    encapsulated,
    item,
    words,
)

pydicom = pytest.importorskip("pydicom", reason="of the extra dicom")
data = pytest.importorskip("pydicom.data")
processing = pytest.importorskip("pydicom.pixels.processing")

CENTER, WIDTH, FUNCTION, INTERCEPT, SLOPE = 0x00281050, 0x00281051, 0x00281056, 0x00281052, 0x00281053
MODALITY_TABLE, VOI_TABLE = 0x00283000, 0x00283010


def packaged(name):
    """One of the files inside pydicom's wheel; nothing is downloaded."""
    return data.get_testdata_file(name, download=False)


def read(path, content, **options):
    path.write_bytes(content)
    return FolderImages([path], **{"size": 4, "channels": 1, **options})[:][0]


@pytest.fixture
def levels(tmp_path):
    """What 16 stored numbers become, in [0, 1]."""

    def _levels(words_, *, dicom_values="window", kind="H", **options):
        content = dicom(words(*words_, kind=kind), **options)
        return read(tmp_path / "x.dcm", content, dicom=dicom_values).flatten().tolist()

    return _levels


@pytest.mark.parametrize(
    "name",
    [
        "CT_small.dcm",  # signed, no window
        "MR_small.dcm",  # a window
        "MR_small_RLE.dcm",
        "MR_small_bigendian.dcm",
        "MR_small_implicit.dcm",
        "MR_small_padded.dcm",
        "MR_small_jp2klossless.dcm",
        "J2K_pixelrep_mismatch.dcm",
        "693_J2KI.dcm",
        "examples_overlay.dcm",
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_gray_files_are_what_pydicom_shows(name):
    dataset = pydicom.dcmread(packaged(name))
    measured = processing.apply_modality_lut(dataset.pixel_array, dataset)
    bits, signed = dataset.BitsStored, dataset.PixelRepresentation
    ends = np.array([-(2 ** (bits - 1)), 2 ** (bits - 1) - 1] if signed else [0, 2**bits - 1])
    low, high = processing.apply_modality_lut(ends, dataset)
    shown = np.clip((processing.apply_voi_lut(measured, dataset) - low) / (high - low), 0, 1)
    square = Image.fromarray(shown.astype(np.float32))
    side = min(square.size)
    left, upper = (square.width - side) / 2, (square.height - side) / 2
    box = (left, upper, left + side, upper + side)
    expected = np.asarray(square.resize((32, 32), Image.Resampling.BILINEAR, box=box))
    found = FolderImages([packaged(name)], size=32, channels=1)[:][0, 0]
    torch.testing.assert_close(found, torch.tensor(expected), atol=2e-5, rtol=0)
    assert len(found.unique()) > 50


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


STORED = [0, 1, 2, 100, 1000, 2047, 2048, 4095] * 2


def test_without_a_window_the_ends_are_what_the_bits_can_store(levels):
    assert levels(STORED, stored=12) == pytest.approx([value / 4095 for value in STORED])
    assert levels(STORED, stored=16) == pytest.approx([value / 65535 for value in STORED])


def test_16_bits_are_not_cut_to_8(levels):
    assert len(set(levels(range(0, 16)))) == 16


def test_monochrome1_is_inverted(levels):
    shown = levels(STORED, stored=12, photometric="MONOCHROME1")
    assert shown == pytest.approx([1 - value / 4095 for value in STORED])


def test_signed_numbers_begin_below_zero(levels):
    stored = [-2048, -1, 0, 2047] * 4
    shown = levels(stored, stored=12, signed=True, kind="h")
    assert shown == pytest.approx([(value + 2048) / 4095 for value in stored])


def test_bits_that_do_not_count_are_masked(levels):
    junk = [value | 0xF000 for value in STORED]  # an overlay in the high bits, as files once had
    assert levels(junk, stored=12) == levels(STORED, stored=12)


def _of_values(values, *, signed):
    """A JPEG 2000 frame; Pillow shifts unsigned numbers by half their range, so what it writes is signed."""
    half = 2 ** (8 * values.dtype.itemsize - 1) if signed else 0
    stream = io.BytesIO()
    unsigned = (values.astype(np.int64) + half).astype(f"u{values.dtype.itemsize}")
    Image.fromarray(unsigned).save(stream, "JPEG2000", no_jp2=True)
    frame = bytearray(stream.getvalue())
    frame[frame.index(b"\xff\x51") + 40] |= 128 * signed
    return encapsulated(bytes(frame))


@pytest.mark.parametrize(("signed", "first"), [(False, 0), (True, -1024), (True, 0)])
def test_jpeg_2000_of_more_bits_than_announced_is_refused_where_they_are_used(tmp_path, signed, first):
    options = {"size": (16, 16), "stored": 12, "signed": signed, "syntax": JPEG_2000}

    def found(step):
        values = (np.arange(256).reshape(16, 16) * step + first * step / 8).astype("i2" if signed else "u2")
        content = dicom(_of_values(values, signed=signed), **options)
        return read(tmp_path / "x.dcm", content, size=16).flatten()

    expected = (torch.arange(256) * 8 + first + 2048 * signed) / 4095
    torch.testing.assert_close(found(8), expected)
    with pytest.raises(DataError, match="compressed samples that need more than the 12 bits announced"):
        found(32)


def test_jpeg_2000_of_fewer_bits_keeps_its_sign(tmp_path):
    pixels = _of_values(np.full((4, 4), -1, dtype=np.int8), signed=True)
    content = dicom(pixels, stored=12, signed=True, syntax=JPEG_2000)
    assert read(tmp_path / "x.dcm", content).unique().tolist() == pytest.approx([2047 / 4095])


RESCALED = [(INTERCEPT, "DS", "-1024"), (SLOPE, "DS", "2")]


def test_the_window_is_of_rescaled_values(levels):
    more = [*RESCALED, (CENTER, "DS", "40.5\\300"), (WIDTH, "DS", "401\\1")]
    expected = [min(max((2 * value - 1024 - 40) / 400 + 0.5, 0), 1) for value in STORED]
    assert levels(STORED, stored=12, more=more) == pytest.approx(expected, abs=1e-5)
    assert levels(STORED, stored=12, more=RESCALED) == levels(STORED, stored=12)


def test_values_may_be_chosen(levels):
    more = [*RESCALED, (CENTER, "DS", "40.5"), (WIDTH, "DS", "401")]
    shown = levels(STORED, stored=12, more=more)
    assert levels(STORED, stored=12, more=more, dicom_values="stored") == levels(STORED, stored=12)
    assert levels(STORED, stored=12, more=RESCALED, dicom_values=(40.5, 401.0)) == shown
    assert levels(STORED, stored=12, more=more, dicom_values=(1000.0, 10.0)) != shown


def test_a_slope_below_zero_inverts(levels):
    more = [(INTERCEPT, "DS", "0"), (SLOPE, "DS", "-1")]
    assert levels(STORED, stored=12, more=more) == pytest.approx([1 - value / 4095 for value in STORED])


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_other_window_functions_are_known(levels, function):
    more = [(CENTER, "DS", "1000"), (WIDTH, "DS", "500"), (FUNCTION, "CS", function)]
    shown = levels([750, 1000, 1250, 0] * 4, stored=12, more=more)[:4]
    expected = {"LINEAR_EXACT": [0, 0.5, 1, 0], "SIGMOID": [0.1192, 0.5, 0.8808, 0.0003]}
    assert shown == pytest.approx(expected[function], abs=1e-3)


def _table(entries, *, first=0, bits=8, implicit=False):
    descriptor = element(0x00283002, "US", (len(entries), first % 65536, bits), implicit=implicit)
    return item(descriptor + element(0x00283006, "OW", words(*entries), implicit=implicit))


def test_lookup_tables_are_applied(levels):
    more = [(VOI_TABLE, "SQ", _table([255, 0, 127], first=1))]
    shown = levels([0, 1, 2, 3, 4, 4095] * 2 + [0] * 4, stored=12, more=more)[:6]
    assert shown == pytest.approx([1, 1, 0, 127 / 255, 127 / 255, 127 / 255])
    more = [(MODALITY_TABLE, "SQ", _table([10, 20, 30]))]
    assert levels([0, 1, 2, 3] * 4, stored=2, bits=16, more=more)[:4] == pytest.approx([0, 0.5, 1, 1])


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_a_lookup_table_may_begin_below_zero(levels, syntax):
    table = _table([0, 255, 51], first=-1, implicit=syntax == IMPLICIT)
    stored = [-2, -1, 0, 1, 2, 3, 4, 5] * 2
    more = [(VOI_TABLE, "SQ", table)]
    if syntax == EXPLICIT:  # it says that the second number is signed
        more = [(VOI_TABLE, "SQ", table.replace(b"US", b"SS", 1))]
    shown = levels(stored, kind="h", signed=True, more=more, syntax=syntax)
    assert shown[:5] == pytest.approx([0, 0, 1, 0.2, 0.2])


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


def test_run_lengths_go_over_rows_and_bytes(tmp_path):
    stored = np.arange(16, dtype=np.uint16).reshape(4, 4) * 300
    planes = [(stored >> 8).astype(np.uint8).tobytes(), (stored & 255).astype(np.uint8).tobytes()]
    parts = [bytes([15]) + plane for plane in planes]
    head = words(2, 64, 64 + len(parts[0]), *[0] * 13, kind="I")
    content = dicom(encapsulated(head + b"".join(parts)), syntax=RUNS)
    found = read(tmp_path / "x.dcm", content)
    torch.testing.assert_close(found[0], torch.tensor(stored / 65535, dtype=torch.float32))


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT, BIG])
def test_every_plain_encoding_gives_the_same(tmp_path, syntax):
    content = dicom(words(*STORED, order=">" if syntax == BIG else "<"), stored=12, syntax=syntax)
    found = read(tmp_path / "x.dcm", content).flatten()
    torch.testing.assert_close(found, torch.tensor(STORED) / 4095)


def test_strips_do_not_show(tmp_path, monkeypatch):
    monkeypatch.setattr("fedkl.data.squares.LARGE", 100)
    stored = np.random.default_rng(0).integers(4096, size=(50, 60), dtype=np.uint16)
    content = dicom(stored.tobytes(), size=(60, 50), stored=12)
    in_strips = read(tmp_path / "x.dcm", content, size=20)
    monkeypatch.undo()
    torch.testing.assert_close(read(tmp_path / "x.dcm", content, size=20), in_strips, atol=1e-5, rtol=0)


def _compressed(kind, size=(4, 4), mode="L"):
    stream = io.BytesIO()
    Image.new(mode, size, 99).save(stream, kind)
    return encapsulated(stream.getvalue())


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


def _sea(length):
    """Empty items, that many bytes of them: each becomes an object."""
    return item(b"") * (length // 8)


PLAIN = words(*range(16))
DEEP = element(0x00081140, "SQ", b"", length=UNDEFINED) * 5000
BOMB = bytes([129, 7]) * 40_000  # 128 times the 7, 40,000 times
BAD = {
    "frames": ({"pixels": PLAIN * 2, "more": [(0x00280008, "IS", "2")]}, "2 frames. Save the frames"),
    "truncated": ({"pixels": PLAIN[:-2]}, "30 bytes of pixels where 32 were announced"),
    "cut": ({"pixels": PLAIN[:-2], "length": 32}, "30 bytes of pixels of 32"),
    "too many pixels": ({"pixels": PLAIN, "size": (65535, 65535), "length": 32}, "32 bytes of pixels where"),
    "bomb of runs": (
        {"pixels": encapsulated(words(1, 64, *[0] * 14, kind="I") + BOMB), "bits": 8, "syntax": RUNS},
        "got OSError|got ValueError|accepted",
    ),
    "wrong parts": ({"pixels": encapsulated(bytes(64)), "syntax": RUNS}, "run lengths that are not of 2"),
    "another size inside": (
        {"pixels": _compressed("JPEG", (64, 64)), "bits": 8, "syntax": JPEG},
        "compressed pixels of 64×64 where 4×4 were announced",
    ),
    "another format inside": (
        {"pixels": _compressed("PNG"), "bits": 8, "syntax": JPEG},
        "got UnidentifiedImageError",
    ),
    "another format inside 2000": (
        {"pixels": _compressed("JPEG"), "bits": 8, "syntax": JPEG_2000},
        "got UnidentifiedImageError",
    ),
    "deflated": ({"pixels": PLAIN, "syntax": DEFLATED}, "one in Deflated Explicit VR Little Endian. Uncom"),
    "lossless": ({"pixels": PLAIN, "syntax": JPEG_LOSSLESS}, "one in JPEG Lossless, .* Decompress it"),
    "no such encoding": ({"pixels": PLAIN, "syntax": "1.2.3.4"}, "one in another encoding"),
    "plain but encapsulated": ({"pixels": PLAIN, "length": UNDEFINED}, "not encoded as the file says"),
    "encapsulated but plain": (
        {"pixels": PLAIN, "bits": 8, "syntax": JPEG, "length": 32},
        "not encoded as the file says",
    ),
    "32 bits": ({"pixels": PLAIN * 2, "bits": 32}, "1 samples of 32 bits a pixel"),
    "1 bit": ({"pixels": PLAIN, "bits": 1}, "1 samples of 1 bits a pixel"),
    "more stored than allocated": ({"pixels": PLAIN, "stored": 17}, "samples of 17 bits in 16"),
    "another high bit": ({"pixels": PLAIN, "change": {0x00280102: 3}}, "the highest 3"),
    "another kind": ({"pixels": PLAIN, "photometric": "MUSTERMANN^ERIKA"}, "of another kind. Gray and"),
    "two samples": ({"pixels": PLAIN * 2, "samples": 2}, "2 samples of 16 bits a pixel"),
    "no rows": ({"pixels": PLAIN, "change": {0x00280010: None}}, "one without a usable Rows"),
    "zero columns": ({"pixels": PLAIN, "change": {0x00280011: 0}}, "one without a usable Columns"),
    "several rows": ({"pixels": PLAIN, "change": {0x00280010: (4, 4)}}, "one without a usable Rows"),
    "planar 2": ({"pixels": PLAIN, "change": {0x00280006: 2}}, "one without a usable PlanarConfiguration"),
    "signed 2": ({"pixels": PLAIN, "change": {0x00280103: 2}}, "one without a usable PixelRepresentation"),
    "color of 7 bits": (
        {"pixels": bytes(48), "samples": 3, "photometric": "RGB", "bits": 8, "stored": 7},
        "color of 7 bits in 8. Convert it",
    ),
    "no slope": ({"pixels": PLAIN, "more": [(INTERCEPT, "DS", "0"), (SLOPE, "DS", "0")]}, "nothing to see"),
    "infinite slope": ({"pixels": PLAIN, "more": [(INTERCEPT, "DS", "0"), (SLOPE, "DS", "inf")]}, "got "),
    "no width": ({"pixels": PLAIN, "more": [(CENTER, "DS", "1"), (WIDTH, "DS", "0")]}, "window of no width"),
    "no exact width": (
        {
            "pixels": PLAIN,
            "more": [(CENTER, "DS", "1"), (WIDTH, "DS", "0"), (FUNCTION, "CS", "LINEAR_EXACT")],
        },
        "got a window of no width",
    ),
    "no width of a curve": (
        {"pixels": PLAIN, "more": [(CENTER, "DS", "1"), (WIDTH, "DS", "0"), (FUNCTION, "CS", "SIGMOID")]},
        "got a window of no width",
    ),
    "strange window": (
        {"pixels": PLAIN, "more": [(CENTER, "DS", "1"), (WIDTH, "DS", "9"), (FUNCTION, "CS", "ERIKA ")]},
        "unknown function",
    ),
    "a name as window": ({"pixels": PLAIN, "more": [(CENTER, "DS", "ERIKA "), (WIDTH, "DS", "9 ")]}, "got "),
    "a table of another length": (
        {"pixels": PLAIN, "more": [(VOI_TABLE, "SQ", _table([1, 2, 3, 4])[:-2])]},
        "got ",
    ),
    "a table that is too large": (
        {"pixels": PLAIN, "more": [(VOI_TABLE, "SQ", _table([300] * 3))]},
        "lookup table that is not what it says",
    ),
    "no palette": ({"pixels": PLAIN, "photometric": "PALETTE COLOR"}, "lookup table without"),
    "a long header": (
        {"pixels": PLAIN, "more": [(VOI_TABLE, "SQ", _table([1] * 60_000) * 20)]},
        "got one with more than 1 MiB before its pixels. Remove",
    ),
    "long meta information": (
        {"pixels": PLAIN, "meta": element(0x00020013, "SH", b"ERIKA ") * 2000},
        "got one with more than 8 KiB of meta information. Remove",
    ),
    "a long sequence of undefined length": (
        {"pixels": PLAIN, "more": [(0x00081140, "SQ", _sea(1 << 20))], "undefined": (0x00081140,)},
        "got one with more than 1 MiB before its pixels. Remove",
    ),
    "a long sequence that is passed over": (
        {"pixels": PLAIN, "more": [(0x00081140, "SQ", _sea(1 << 21))]},
        "accepted",
    ),
    "nested": ({"pixels": PLAIN, "more": [(0x00081140, "SQ", DEEP)]}, "accepted"),
}


def _said(path, content):
    try:
        read(path, content)
    except DataError as error:
        return error
    return None


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_read_is_named_and_nothing_of_the_patient(tmp_path, case, caplog):
    caplog.set_level(logging.DEBUG)
    options, expected = BAD[case]
    error = _said(tmp_path / "x.dcm", dicom(**options))
    if error is None:
        assert "accepted" in expected
        return
    assert str(error).startswith(f"{tmp_path}/x.dcm: expected a ")
    if "accepted" not in expected:
        assert re.search(expected, str(error)), str(error)
    text = "".join(traceback.format_exception(error)) + caplog.text
    assert not [word for word in ("MUSTERMANN", "ERIKA") if word in text]
    assert error.__cause__ is None
    assert error.__context__ is None


def test_neither_errors_nor_warnings_nor_logs_quote_a_damaged_file(tmp_path, caplog, recwarn):
    caplog.set_level(logging.DEBUG)
    warnings.resetwarnings()  # somebody's own filters come first
    more = [(0x00080005, "CS", "ERIKA "), (0x00091001, "LO", "ERIKA "), (VOI_TABLE, "SQ", _table([1, 2]))]
    sound = dicom(PLAIN, more=more)
    path = tmp_path / "x.dcm"
    errors = [_said(path, sound[:end]) for end in range(len(sound))]
    generator = np.random.default_rng(0)
    for _ in range(400):
        content = bytearray(sound)
        for place in generator.integers(132, len(sound), size=3):
            content[place] = generator.integers(256)
        errors.append(_said(path, bytes(content)))
    texts = ["".join(traceback.format_exception(error)) for error in errors if error is not None]
    assert len(texts) > len(sound) - 40
    assert not [text for text in texts if "ERIKA" in text]
    assert "ERIKA" not in caplog.text
    assert not [str(each.message) for each in recwarn if "ERIKA" in str(each.message)]


def test_pydicoms_log_is_silent_only_while_we_read(caplog):
    caplog.set_level(logging.DEBUG)
    FolderImages([packaged("MR_small.dcm")], size=4)[:]
    assert "pydicom" not in {record.name for record in caplog.records}
    logging.getLogger("pydicom").warning("of somebody else")
    assert "of somebody else" in caplog.text


def test_filters_of_warnings_change_with_the_first_file_only(tmp_path, monkeypatch):
    """Each change lets Python forget what it has warned of: "once a place" would become "once a file"."""
    (tmp_path / "x.dcm").write_bytes(dicom(PLAIN))
    images = FolderImages([tmp_path / "x.dcm"], size=4)
    changes, change = [], warnings.filterwarnings

    def changed(*arguments, **options):
        changes.append(options)
        change(*arguments, **options)

    with warnings.catch_warnings():
        warnings.resetwarnings()
        monkeypatch.setattr(warnings, "filterwarnings", changed)
        for _ in range(3):
            images[:]
    assert [each["module"] for each in changes] == [r"pydicom\."]


@pytest.mark.parametrize("undefined", [(), (0x00081140, VOI_TABLE, MODALITY_TABLE)])
def test_nothing_but_what_pixels_need_is_kept(tmp_path, undefined):
    from fedkl.data.dicom_header import read as header_of

    name = element(0x00100010, "PN", PATIENT)
    nested = element(0x00281111, "SQ", item(name))
    table = element(0x00283002, "US", (2, 0, 8)) + element(0x00283006, "OW", words(1, 2))
    items = item(name + nested + table) + item(name + table)
    more = [(0x00091001, "LO", "private"), (0x00100030, "DA", "19640812"), (0x00080005, "CS", "ISO_IR 100")]
    more += [(0x00081140, "SQ", item(name)), (MODALITY_TABLE, "SQ", items), (VOI_TABLE, "SQ", items)]
    content = dicom(PLAIN, more=more, undefined=undefined)
    (tmp_path / "x.dcm").write_bytes(content)
    with (tmp_path / "x.dcm").open("rb") as file:
        header, _ = header_of(file)
    assert {int(tag) >> 16 for tag in header.elements.keys()} == {0x0028}
    assert PATIENT.decode() not in repr(header)
    assert PATIENT.decode() not in str(header.elements)
    kept = [[int(tag) for tag in each.keys()] for each in header.elements.VOILUTSequence]
    assert kept == [[0x00283002, 0x00283006]]
    assert "elements" not in repr(header)


def test_decoders_that_are_installed_are_not_used(tmp_path, monkeypatch):
    """Others, whose memory nobody has looked at, would be asked where Pillow fails."""
    decoders = pytest.importorskip("pydicom.pixels.decoders.base")
    module = types.ModuleType("installed")
    module.is_available = lambda uid: True
    asked = []
    module.decode = lambda frame, runner: asked.append(frame) or bytes(256)
    monkeypatch.setitem(sys.modules, "installed", module)
    for syntax, kind in ((JPEG, "JPEG"), (JPEG_2000, "JPEG2000")):
        stream = io.BytesIO()
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(stream, kind)
        content = dicom(encapsulated(stream.getvalue()[:-40]), size=(16, 16), bits=8, syntax=syntax)
        decoder = decoders.get_decoder(pydicom.uid.UID(syntax))
        decoder.add_plugin("installed", ("installed", "decode"))
        try:
            assert "expected a readable DICOM file" in str(_said(tmp_path / "x.dcm", content))
            assert pydicom.dcmread(io.BytesIO(content)).pixel_array.shape == (16, 16)  # it does ask
        finally:
            decoder.remove_plugin("installed")
        assert len(asked) == 1
        asked.clear()


def _not_decoded(*_, **__):
    raise AssertionError("pixels were decoded")


@pytest.mark.parametrize("syntax", [EXPLICIT, RUNS, JPEG, JPEG_2000])
def test_too_many_pixels_are_refused_before_they_are_decoded(tmp_path, monkeypatch, syntax):
    monkeypatch.setattr("fedkl.data.dicom_pixels.raster", _not_decoded)
    monkeypatch.setattr(decoding, "MOST_PIXELS", 15)
    pixels = PLAIN[:16] if syntax == EXPLICIT else encapsulated(b"junk")
    error = _said(tmp_path / "x.dcm", dicom(pixels, bits=8, syntax=syntax))
    assert "x.dcm: expected an image of at most 15 pixels, got 4×4. Shrink" in str(error)


def test_color_in_jpeg_2000_counts_twice(tmp_path, monkeypatch):
    pixels = _compressed("JPEG2000", mode="RGB")
    options = {"samples": 3, "photometric": "YBR_RCT", "bits": 8, "syntax": JPEG_2000}
    monkeypatch.setattr(decoding, "MOST_PIXELS", 32)
    assert _said(tmp_path / "x.dcm", dicom(pixels, **options)) is None
    monkeypatch.setattr(decoding, "MOST_PIXELS", 31)
    error = _said(tmp_path / "x.dcm", dicom(pixels, **options))
    assert "at most 31 pixels, got 4×4, where color in JPEG 2000 counts twice. Shrink" in str(error)


def _jpeg_2000(size=(64, 64), *, boxes=False, **options):
    stream = io.BytesIO()
    Image.new("L", size, 9).save(stream, "JPEG2000", no_jp2=not boxes, **options)
    return stream.getvalue()


def _tiled(size, tile):
    """A frame whose header announces tiles of another size than it has."""
    frame = bytearray(_jpeg_2000(size, tile_size=(64, 64), num_resolutions=1))
    struct.pack_into(">II", frame, frame.index(b"\xff\x51") + 22, *tile)
    return bytes(frame)


def _with(frame, marker, segment, *, in_tile=False):
    """Another segment before the tile-part, or in its header."""
    more = marker + struct.pack(">H", len(segment) + 2) + segment
    at = frame.index(b"\xff\x90") + (12 if in_tile else 0)
    found = bytearray(frame[:at] + more + frame[at:])
    if in_tile:
        length = struct.unpack_from(">I", found, at - 6)[0]
        struct.pack_into(">I", found, at - 6, length + len(more))
    return bytes(found)


def _layered(frame, layers):
    found = bytearray(frame)
    struct.pack_into(">H", found, found.index(b"\xff\x52") + 6, layers)
    return bytes(found)


def _ended(frame):
    """A frame whose tile-part announces to end inside of its own header, where another one seems to begin."""
    part = b"\xff\x90" + struct.pack(">HHIBB", 10, 0, 0, 0, 1) + b"\xff\x93"
    found = bytearray(_with(frame, b"\xff\x64", part, in_tile=True))
    struct.pack_into(">I", found, found.index(b"\xff\x90") + 6, 16)
    return bytes(found)


COD, COC = b"\xff\x52", b"\xff\x53"
SMALL = bytes([0, 0, 0, 1, 0, 5, 0, 0, 0, 1])  # code blocks of 4×4
TOO_MUCH = {
    "tiles": (_tiled((64, 64), (1, 2)), "JPEG 2000 of 2048 tiles; 1024 are read"),
    "in boxes": (
        _jpeg_2000(boxes=True, codeblock_size=(4, 4)),
        "code blocks or precincts that are too small",
    ),
    "blocks": (_jpeg_2000(codeblock_size=(4, 4)), "code blocks or precincts that are too small"),
    "blocks in one direction": (_jpeg_2000(codeblock_size=(1024, 4)), "too small"),
    "precincts": (_jpeg_2000(precinct_size=(16, 16)), "too small"),
    "layers": (_layered(_jpeg_2000(), 65), "JPEG 2000 of 65 layers; 64 are read"),
    "blocks said again": (_with(_jpeg_2000(), COD, SMALL), "too small"),
    "blocks of a component": (_with(_jpeg_2000(), COC, b"\0" + SMALL[:1] + SMALL[5:]), "too small"),
    "blocks of a tile": (_with(_jpeg_2000(), COD, SMALL, in_tile=True), "too small"),
    "an unknown marker": (_with(_jpeg_2000(), b"\xff\x6f", b"\xff\x52"), "not well-formed"),
    "another size": (_jpeg_2000((65, 64)), "compressed pixels of 65×64 where 64×64 were announced"),
    "a palette": (_jpeg_2000(boxes=True).replace(b"colr", b"pclr"), "a palette of its own|of other colors"),
    "cut in its headers": (_jpeg_2000()[:80], "not well-formed"),
    "cut in a segment": (_with(_jpeg_2000(), COD, b""), "not well-formed"),
    "a part that ends before it begins": (_ended(_jpeg_2000()), "not well-formed"),
}


@pytest.mark.parametrize("case", TOO_MUCH)
def test_jpeg_2000_that_takes_more_than_its_pixels_is_refused_undecoded(tmp_path, monkeypatch, case):
    monkeypatch.setattr("fedkl.data.dicom_pixels.get_decoder", _not_decoded)
    frame, expected = TOO_MUCH[case]
    error = _said(tmp_path / "x.dcm", dicom(encapsulated(frame), size=(64, 64), bits=8, syntax=JPEG_2000))
    assert re.search(f"x.dcm: expected a DICOM image, got .*{expected}", str(error)), str(error)


@pytest.mark.parametrize("boxes", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tile_size": (4, 4)},
        {"codeblock_size": (16, 16)},
        {"precinct_size": (256, 256)},
        {"precinct_size": (128, 128)},
        {"quality_layers": [40, 20, 10], "progression": "RPCL"},
    ],
)
def test_jpeg_2000_of_usual_settings_is_read(tmp_path, boxes, options):
    frame = _jpeg_2000(boxes=boxes, **options)
    found = read(tmp_path / "x.dcm", dicom(encapsulated(frame), size=(64, 64), bits=8, syntax=JPEG_2000))
    assert (found * 255).round().unique().tolist() == [9]


MEMORY = """
import sys
from pathlib import Path
from fedkl.data import FolderImages
from fedkl.errors import DataError

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
FolderImages([sys.argv[1]], size=4)[:]  # imports
before = peak()
for name in sys.argv[2:]:
    try:
        FolderImages([name], size=4)[:]
    except DataError:
        pass
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux only")
def test_small_files_do_not_become_large(tmp_path):
    """Runs of more bytes than there are pixels, a frame of another size, a sea of elements, many tiles."""
    one = tmp_path / "sound.dcm"
    one.write_bytes(dicom(PLAIN))
    runs = words(1, 64, *[0] * 14, kind="I") + bytes([129, 7]) * 8_000_000
    frame = io.BytesIO()
    Image.new("L", (9000, 9000)).save(frame, "JPEG")
    boxed = bytearray(_jpeg_2000((9000, 9000), boxes=True))
    struct.pack_into(">II", boxed, boxed.index(b"ihdr") + 4, 64, 64)
    blocks = _jpeg_2000((3000, 3000), codeblock_size=(4, 4), num_resolutions=1)
    in_2000 = {"bits": 8, "syntax": JPEG_2000}
    files = {
        "tiles": dicom(encapsulated(_tiled((255, 257), (1, 1))), size=(255, 257), **in_2000),
        "blocks": dicom(encapsulated(blocks), size=(3000, 3000), **in_2000),
        "box": dicom(encapsulated(bytes(boxed)), size=(64, 64), **in_2000),
        "runs": dicom(encapsulated(runs), size=(4000, 4000), bits=8, syntax=RUNS),
        "frame": dicom(encapsulated(frame.getvalue()), size=(2000, 2000), bits=8, syntax=JPEG),
        "items": dicom(PLAIN, more=[(VOI_TABLE, "SQ", _sea((1 << 20) - 2000))]),
        "undefined": dicom(PLAIN, more=[(0x00081140, "SQ", _sea((1 << 20) - 2000))], undefined=(0x00081140,)),
        "sea": dicom(PLAIN, more=[(VOI_TABLE, "SQ", item(element(0x00283002, "US", 1) * 2_000_000))]),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", MEMORY, one, *(tmp_path / name for name in files)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    assert float(done.stdout) < 200  # MiB; runs alone became 1 GB


def test_without_pydicom_a_sentence_says_what_to_install(tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pydicom"]:
        monkeypatch.delitem(sys.modules, name)
    for name in ("fedkl.data.dicom_pixels", "fedkl.data.dicom_header"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "pydicom", None)
    monkeypatch.delattr("fedkl.data.dicom_pixels", raising=False)
    with pytest.raises(DataError, match=r"x\.dcm: expected pydicom.*pip install 'fedkl\[dicom\]'"):
        read(tmp_path / "x.dcm", dicom(PLAIN))


def test_a_file_called_dcm_has_to_be_dicom(tmp_path):
    with pytest.raises(DataError, match=r"x\.dcm: expected a DICOM image, got one without the letters DICM"):
        read(tmp_path / "x.dcm", b"old" * 100)


@pytest.mark.parametrize("values", [(40.0, 0.0), (float("nan"), 3.0), (0.0, float("inf"))])
def test_a_choice_of_values_that_is_none_is_an_error(tmp_path, values):
    with pytest.raises(DataError, match=r"dicom: expected 'window', 'stored', or a window's center"):
        FolderImages([tmp_path / "x.dcm"], size=4, dicom=values)


def test_a_folder_of_classes_may_mix_dicom_with_other_images(tmp_path):
    for split, name in itertools.product(("train", "val"), ("ill", "well")):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        (folder / "a.dcm").write_bytes(dicom(words(*[65535] * 16)))
        (folder / "b.DICOM").write_bytes(dicom(words(*[0] * 16)))
        Image.new("RGB", (5, 5), (255, 255, 255)).save(folder / "c.png")
        Image.fromarray(np.full((5, 5), 32768, dtype=np.uint16)).save(folder / "d.tif")
    expected = torch.tensor([1, 0, 1, 32768 / 65535] * 2)
    for channels in (1, 3):
        dataset = load("imagefolder", root=tmp_path, size=4, channels=channels, dicom="stored")
        torch.testing.assert_close(dataset.train_images[:].mean((1, 2, 3)), expected)
        assert dataset.spec.shape == (channels, 4, 4)


def test_only_folders_take_the_option():
    with pytest.raises(DataError, match="'mnist-sample' has no DICOM files"):
        load("mnist-sample", dicom="stored")
