"""What a DICOM file says about its pixels; of what it says about a patient, nothing is kept.

Only elements that pixels need are kept; names, dates and private elements are passed over. What is announced
is checked before pixels are read.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, cast

from pydicom.datadict import tag_for_keyword
from pydicom.encaps import get_frame
from pydicom.filereader import read_dataset
from pydicom.uid import UID

from fedkl.data.squares import RefusedError

# Bytes that are read before the pixels. What is passed over does not count, but for sequences of undefined
# length: pydicom has to read them to find their end.
_MOST_HEADER = 1 << 20
_SHORT = 8 << 10  # bytes of meta information, and slack of compressed pixels
_PIXELS = 0x7FE00010
_FLOATS = (0x7FE00008, 0x7FE00009)
_UNDEFINED = 0xFFFFFFFF
_GRAY, _COLOR, _PALETTE = ("MONOCHROME1", "MONOCHROME2"), ("RGB", "YBR_FULL", "YBR_FULL_422"), "PALETTE COLOR"
_OF_JPEG_2000 = ("YBR_ICT", "YBR_RCT")
_PLAIN = ("1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2")
_RUNS = "1.2.840.10008.1.2.5"
_JPEG = ("1.2.840.10008.1.2.4.50",)
_JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
_KEYWORDS = (
    "SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns BitsAllocated "
    "BitsStored HighBit PixelRepresentation WindowCenter WindowWidth VOILUTFunction RescaleIntercept "
    "RescaleSlope RedPaletteColorLookupTableDescriptor GreenPaletteColorLookupTableDescriptor "
    "BluePaletteColorLookupTableDescriptor RedPaletteColorLookupTableData "
    "GreenPaletteColorLookupTableData BluePaletteColorLookupTableData ModalityLUTSequence VOILUTSequence"
).split()


@dataclass(frozen=True, kw_only=True)
class Header:
    """What the pixels of a file are, checked.

    Attributes:
        syntax: How they are encoded.
        vr: "OB" or "OW".
        rows: Height.
        columns: Width.
        samples: 1 of gray and palette images, 3 of color.
        photometric: What the samples mean.
        allocated: Bits that a sample takes: 8 or 16.
        stored: Bits of them that count: the lowest ones.
        signed: Whether samples are two's complement.
        planar: Whether colors lie one after the other.
        elements: All that was kept, as pydicom has it: windows, tables, palettes.
    """

    syntax: str
    vr: str
    rows: int
    columns: int
    samples: int
    photometric: str
    allocated: int
    stored: int
    signed: bool
    planar: bool
    elements: Any = field(repr=False)

    @property
    def is_plain(self) -> bool:
        """Whether pixels are not compressed."""
        return self.syntax in _PLAIN

    @property
    def is_run_length(self) -> bool:
        """Whether they are compressed by lengths of runs."""
        return self.syntax == _RUNS

    @property
    def codec(self) -> str:
        """What Pillow calls the format of compressed pixels."""
        return "JPEG" if self.syntax in _JPEG else "JPEG2000"

    @property
    def extent(self) -> tuple[int, str]:
        """The pixels that are decoded at once, as a number and in words."""
        told = f"{self.columns}×{self.rows}"
        if self.samples == 3 and self.syntax in _JPEG_2000:  # OpenJPEG takes 12 bytes for each
            return 2 * self.rows * self.columns, f"{told}, where color in JPEG 2000 counts twice"
        return self.rows * self.columns, told

    @property
    def bytes(self) -> int:
        """That the pixels take uncompressed."""
        samples = 2 if self.is_plain and self.photometric == "YBR_FULL_422" else self.samples
        return self.rows * self.columns * samples * (self.allocated // 8)

    @property
    def most_bytes(self) -> int:
        """That they may take as they are in the file."""
        return self.bytes + self.bytes % 2 if self.is_plain else self.bytes * 5 // 4 + _SHORT


def read(file: BinaryIO) -> tuple[Header, Callable[[], bytes]]:
    """What a file says about its pixels, and a function that reads them as they are."""
    head = _Head(file, most=_SHORT, told="8 KiB of meta information")
    if head.read(132)[128:] != b"DICM":
        raise RefusedError("one without the letters DICM at byte 128. Save it as DICOM Part 10")
    syntax = _syntax(head)
    elements, vr, length = _elements(_Head(file, most=_MOST_HEADER, told="1 MiB before its pixels"), syntax)
    header = _checked(elements, syntax=syntax, vr=vr)
    if (length == _UNDEFINED) == header.is_plain:
        raise RefusedError("pixels that are not encoded as the file says")
    if header.is_plain and length < header.bytes:
        raise RefusedError(f"{length} bytes of pixels where {header.bytes} were announced. It is truncated")

    def pixels() -> bytes:
        found = file.read(header.most_bytes)
        if header.is_plain and len(found) < header.bytes:
            raise RefusedError(f"{len(found)} bytes of pixels of {header.bytes}. It is truncated")
        return found

    return header, pixels


class _Head:
    """A file of which so many bytes may be read: what is passed over does not count.

    pydicom reads nested elements as objects that take many times their bytes.
    """

    def __init__(self, file: BinaryIO, *, most: int, told: str) -> None:
        self._file = file
        self._left, self._told = most, told
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if size > self._left:
            self._left = -1
            self.check()
        found = self._file.read(size)
        self._left -= len(found)
        return found

    def check(self) -> None:
        """Refuses the file if more was asked for: within sequences, pydicom makes an OSError of that."""
        if self._left < 0:
            raise RefusedError(f"one with more than {self._told}. Remove what images do not need")


def _syntax(head: _Head) -> str:
    """How the file is encoded; leaves it where the elements begin."""

    def ended(tag: int, vr: str | None, length: int) -> bool:
        return tag >> 16 != 2

    meta = read_dataset(cast(BinaryIO, head), False, True, stop_when=ended, specific_tags=[0x00020010])
    syntax = str(meta.get("TransferSyntaxUID", ""))
    if syntax in (*_PLAIN, _RUNS, *_JPEG, *_JPEG_2000):
        return syntax
    known = UID(syntax).name
    named = f"one in {known}" if known != syntax and not UID(syntax).is_private else "one in another encoding"
    raise RefusedError(
        f"{named}. Uncompressed, RLE, JPEG Baseline and JPEG 2000 are read. Decompress it, e.g. with "
        "`gdcmconv --raw` or DCMTK's dcmdjpeg"
    )


def _elements(head: _Head, syntax: str) -> tuple[Any, str, int]:
    """The elements that are needed, and kind and length of the pixels; leaves the file at the pixels."""
    found: list[tuple[int, str | None, int, int]] = []

    def ended(tag: int, vr: str | None, length: int) -> bool:
        if tag >= _FLOATS[0]:
            found.append((tag, vr, length, head.tell()))
        return tag >= _FLOATS[0]

    tags = [cast(int, tag_for_keyword(keyword)) for keyword in _KEYWORDS]
    implicit, little = syntax == _PLAIN[0], syntax != _PLAIN[2]
    try:
        elements = read_dataset(cast(BinaryIO, head), implicit, little, stop_when=ended, specific_tags=tags)
    except OSError:
        head.check()
        raise
    if not found or found[0][0] != _PIXELS:
        kind = "one of floats" if found and found[0][0] in _FLOATS else "one without pixels"
        raise RefusedError(f"{kind}. Remove it, or convert it to integers of 8 or 16 bits")
    _, vr, length, start = found[0]
    head.seek(start)
    _reduce(elements)
    return elements, vr or "OW", length


def _reduce(elements: Any) -> None:
    """Keeps the first item of a sequence of tables, and of that only the table."""
    needed = [tag_for_keyword(keyword) for keyword in ("LUTDescriptor", "LUTData")]
    if "SpecificCharacterSet" in elements:  # pydicom reads it whatever it is asked for
        del elements.SpecificCharacterSet
    for keyword in ("ModalityLUTSequence", "VOILUTSequence"):
        tables = elements.get(keyword)
        if not tables:
            continue
        del tables[1:]
        for tag in [tag for tag in tables[0].keys() if tag not in needed]:
            del tables[0][tag]


def _checked(elements: Any, *, syntax: str, vr: str) -> Header:
    frames = elements.get("NumberOfFrames")
    if frames is not None and int(frames) != 1:
        raise RefusedError(
            f"{int(frames)} frames. Save the frames that you want as files of their own, or give a torch "
            "Dataset that picks them (fedkl.data.from_torch)"
        )
    numbers = {
        keyword: _number(elements, keyword)
        for keyword in ("Rows", "Columns", "SamplesPerPixel", "BitsAllocated", "BitsStored")
    }
    header = Header(
        syntax=syntax,
        vr=vr,
        rows=numbers["Rows"],
        columns=numbers["Columns"],
        samples=numbers["SamplesPerPixel"],
        photometric=str(elements.get("PhotometricInterpretation", "")),
        allocated=numbers["BitsAllocated"],
        stored=numbers["BitsStored"],
        signed=bool(_number(elements, "PixelRepresentation", least=0, most=1)),
        planar=bool(_number(elements, "PlanarConfiguration", least=0, most=1, missing=0)),
        elements=elements,
    )
    _check_kind(header)
    high = _number(elements, "HighBit", least=0, missing=header.stored - 1)
    if header.allocated not in (8, 16) or header.stored > header.allocated or high != header.stored - 1:
        raise RefusedError(
            f"samples of {header.stored} bits in {header.allocated}, the highest {high}. Convert it to "
            "samples of 8 or 16 bits"
        )
    if header.samples == 3 and header.stored != 8:  # what is white, then?
        raise RefusedError(f"color of {header.stored} bits in 8. Convert it to color of 8 bits")
    return header


def _check_kind(header: Header) -> None:
    kinds = {(1, each): (8, 16) for each in (*_GRAY, _PALETTE)} | {(3, each): (8,) for each in _COLOR}
    if header.codec == "JPEG2000" and not header.is_plain and not header.is_run_length:
        kinds |= {(3, each): (8,) for each in _OF_JPEG_2000}
    if header.allocated not in kinds.get((header.samples, header.photometric), ()):
        known = {name for _, name in kinds}
        named = header.photometric if header.photometric in known else "another kind"
        raise RefusedError(
            f"{header.samples} samples of {header.allocated} bits a pixel, of {named}. Gray and palette "
            "images of 8 and 16 bits are read, and color of 8. Convert it"
        )


def _number(
    elements: Any, keyword: str, *, least: int = 1, most: int = 65535, missing: int | None = None
) -> int:
    value = elements.get(keyword, missing)
    if not isinstance(value, int) or not least <= value <= most:
        raise RefusedError(f"one without a usable {keyword}. It is damaged")
    return value


def window_of(header: Header) -> tuple[float, float] | None:
    """Center and width of the first window; None where there is none.

    Raises:
        RefusedError: They are no finite numbers.
    """
    pair = []
    for keyword in ("WindowCenter", "WindowWidth"):
        value = header.elements.get(keyword)
        first = value[0] if hasattr(value, "__getitem__") and not isinstance(value, str) else value
        if first is None or first == "":
            return None
        pair.append(float(first))
    if not all(map(math.isfinite, pair)):
        raise RefusedError("a window that is no finite number. It is damaged")
    return pair[0], pair[1]


def frame_of(header: Header, pixels: bytes) -> bytes:
    """The compressed image, out of its fragments."""
    return bytes(get_frame(io.BytesIO(pixels), 0, number_of_frames=1))
