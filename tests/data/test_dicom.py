"""What the numbers in a gray DICOM file become, and how files are given."""

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedkl.data import FolderImages, load
from fedkl.errors import DataError
from tests.data.dicom_files import (
    BIG,
    CENTER,
    EXPLICIT,
    FUNCTION,
    IMPLICIT,
    INTERCEPT,
    JPEG_2000,
    MODALITY_TABLE,
    RUNS,
    SLOPE,
    VOI_TABLE,
    WIDTH,
    dicom,
    encapsulated,
    table,
    words,
)
from tests.data.dicom_reading import packaged, read

pydicom = pytest.importorskip("pydicom", reason="of the extra dicom")
processing = pytest.importorskip("pydicom.pixels.processing")


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


def test_lookup_tables_are_applied(levels):
    more = [(VOI_TABLE, "SQ", table([255, 0, 127], first=1))]
    shown = levels([0, 1, 2, 3, 4, 4095] * 2 + [0] * 4, stored=12, more=more)[:6]
    assert shown == pytest.approx([1, 1, 0, 127 / 255, 127 / 255, 127 / 255])
    more = [(MODALITY_TABLE, "SQ", table([10, 20, 30]))]
    assert levels([0, 1, 2, 3] * 4, stored=2, bits=16, more=more)[:4] == pytest.approx([0, 0.5, 1, 1])


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_a_lookup_table_may_begin_below_zero(levels, syntax):
    lookup = table([0, 255, 51], first=-1, implicit=syntax == IMPLICIT)
    stored = [-2, -1, 0, 1, 2, 3, 4, 5] * 2
    more = [(VOI_TABLE, "SQ", lookup)]
    if syntax == EXPLICIT:  # it says that the second number is signed
        more = [(VOI_TABLE, "SQ", lookup.replace(b"US", b"SS", 1))]
    shown = levels(stored, kind="h", signed=True, more=more, syntax=syntax)
    assert shown[:5] == pytest.approx([0, 0, 1, 0.2, 0.2])


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


def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def test_a_folder_of_classes_may_mix_dicom_with_other_images(tmp_path):
    for split, name in itertools.product(("train", "val"), ("ill", "well")):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        (folder / "a.dcm").write_bytes(dicom(words(*[65535] * 16)))
        (folder / "b.DICOM").write_bytes(dicom(words(*[0] * 16)))
        Image.new("RGB", (5, 5), (255, 255, 255)).save(folder / "c.png")
        Image.fromarray(np.full((5, 5), 32768, dtype=np.uint16)).save(folder / "d.tif")
    expected = torch.tensor([0, 32768 / 65535, 1, 1]).repeat_interleave(2)
    for channels in (1, 3):
        dataset = load("imagefolder", root=tmp_path, size=4, channels=channels, dicom="stored")
        levels = dataset.train_images[:].mean((1, 2, 3))
        torch.testing.assert_close(levels.sort().values, expected)
        assert dataset.spec.shape == (channels, 4, 4)


def test_only_folders_take_the_option():
    with pytest.raises(DataError, match="'mnist-sample' has no DICOM files"):
        load("mnist-sample", dicom="stored")
