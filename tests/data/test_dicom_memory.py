"""A DICOM file takes no more memory than its pixels are allowed."""

import io
import re
import struct
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedkl.data import decoding
from tests.data.dicom_files import (
    EXPLICIT,
    JPEG,
    JPEG_2000,
    PLAIN,
    RUNS,
    VOI_TABLE,
    compressed,
    dicom,
    element,
    encapsulated,
    item,
    sea,
    words,
)
from tests.data.dicom_reading import read, said

pydicom = pytest.importorskip("pydicom", reason="of the extra dicom")


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
            assert "expected a readable DICOM file" in str(said(tmp_path / "x.dcm", content))
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
    error = said(tmp_path / "x.dcm", dicom(pixels, bits=8, syntax=syntax))
    assert "x.dcm: expected an image of at most 15 pixels, got 4×4. Shrink" in str(error)


def test_color_in_jpeg_2000_counts_twice(tmp_path, monkeypatch):
    pixels = compressed("JPEG2000", mode="RGB")
    options = {"samples": 3, "photometric": "YBR_RCT", "bits": 8, "syntax": JPEG_2000}
    monkeypatch.setattr(decoding, "MOST_PIXELS", 32)
    assert said(tmp_path / "x.dcm", dicom(pixels, **options)) is None
    monkeypatch.setattr(decoding, "MOST_PIXELS", 31)
    error = said(tmp_path / "x.dcm", dicom(pixels, **options))
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
    error = said(tmp_path / "x.dcm", dicom(encapsulated(frame), size=(64, 64), bits=8, syntax=JPEG_2000))
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
        "items": dicom(PLAIN, more=[(VOI_TABLE, "SQ", sea((1 << 20) - 2000))]),
        "undefined": dicom(PLAIN, more=[(0x00081140, "SQ", sea((1 << 20) - 2000))], undefined=(0x00081140,)),
        "sea": dicom(PLAIN, more=[(VOI_TABLE, "SQ", item(element(0x00283002, "US", 1) * 2_000_000))]),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    command = [sys.executable, "-c", MEMORY, one, *(tmp_path / name for name in files)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=200)
    assert float(done.stdout) < 400  # MiB: 182 alone, 239 beside other work; runs alone became 1 GB
