"""DICOM files that cannot be read are named, and nothing of the patient is kept or told."""

import logging
import re
import sys
import traceback
import warnings

import numpy as np
import pytest

from fedkl.data import FolderImages
from fedkl.errors import DataError
from tests.data.dicom_files import (
    CENTER,
    DEFLATED,
    FUNCTION,
    INTERCEPT,
    JPEG,
    JPEG_2000,
    JPEG_LOSSLESS,
    MODALITY_TABLE,
    PATIENT,
    PLAIN,
    RUNS,
    SLOPE,
    UNDEFINED,
    VOI_TABLE,
    WIDTH,
    compressed,
    dicom,
    element,
    encapsulated,
    item,
    sea,
    table,
    words,
)
from tests.data.dicom_reading import packaged, read, said

pytest.importorskip("pydicom", reason="of the extra dicom")


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
        {"pixels": compressed("JPEG", (64, 64)), "bits": 8, "syntax": JPEG},
        "compressed pixels of 64×64 where 4×4 were announced",
    ),
    "another format inside": (
        {"pixels": compressed("PNG"), "bits": 8, "syntax": JPEG},
        "got UnidentifiedImageError",
    ),
    "another format inside 2000": (
        {"pixels": compressed("JPEG"), "bits": 8, "syntax": JPEG_2000},
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
        {"pixels": PLAIN, "more": [(VOI_TABLE, "SQ", table([1, 2, 3, 4])[:-2])]},
        "got ",
    ),
    "a table that is too large": (
        {"pixels": PLAIN, "more": [(VOI_TABLE, "SQ", table([300] * 3))]},
        "lookup table that is not what it says",
    ),
    "no palette": ({"pixels": PLAIN, "photometric": "PALETTE COLOR"}, "lookup table without"),
    "a long header": (
        {"pixels": PLAIN, "more": [(VOI_TABLE, "SQ", table([1] * 60_000) * 20)]},
        "got one with more than 1 MiB before its pixels. Remove",
    ),
    "long meta information": (
        {"pixels": PLAIN, "meta": element(0x00020013, "SH", b"ERIKA ") * 2000},
        "got one with more than 8 KiB of meta information. Remove",
    ),
    "a long sequence of undefined length": (
        {"pixels": PLAIN, "more": [(0x00081140, "SQ", sea(1 << 20))], "undefined": (0x00081140,)},
        "got one with more than 1 MiB before its pixels. Remove",
    ),
    "a long sequence that is passed over": (
        {"pixels": PLAIN, "more": [(0x00081140, "SQ", sea(1 << 21))]},
        "accepted",
    ),
    "nested": ({"pixels": PLAIN, "more": [(0x00081140, "SQ", DEEP)]}, "accepted"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.filterwarnings("ignore")
def test_what_cannot_be_read_is_named_and_nothing_of_the_patient(tmp_path, case, caplog):
    caplog.set_level(logging.DEBUG)
    options, expected = BAD[case]
    error = said(tmp_path / "x.dcm", dicom(**options))
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
    more = [(0x00080005, "CS", "ERIKA "), (0x00091001, "LO", "ERIKA "), (VOI_TABLE, "SQ", table([1, 2]))]
    sound = dicom(PLAIN, more=more)
    path = tmp_path / "x.dcm"
    errors = [said(path, sound[:end]) for end in range(len(sound))]
    generator = np.random.default_rng(0)
    for _ in range(400):
        content = bytearray(sound)
        for place in generator.integers(132, len(sound), size=3):
            content[place] = generator.integers(256)
        errors.append(said(path, bytes(content)))
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
