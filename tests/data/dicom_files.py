"""DICOM files, written byte by byte: what is announced may be anything, and pydicom is not needed."""

import io
import struct

from PIL import Image

PATIENT = b"MUSTERMANN^ERIKA"
IMPLICIT, EXPLICIT, BIG = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"
DEFLATED, RUNS = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.5"
JPEG, JPEG_2000, JPEG_LOSSLESS = (f"1.2.840.10008.1.2.4.{last}" for last in (50, 90, 70))
UNDEFINED = 0xFFFFFFFF
END = struct.pack("<HHI", 0xFFFE, 0xE0DD, 0)
CENTER, WIDTH, FUNCTION, INTERCEPT, SLOPE = 0x00281050, 0x00281051, 0x00281056, 0x00281052, 0x00281053
MODALITY_TABLE, VOI_TABLE = 0x00283000, 0x00283010
_LONG = {"OB", "OW", "SQ", "UN", "UT"}


def words(*values, order="<", kind="H"):
    """Numbers of 16 bits, or of another kind."""
    return struct.pack(f"{order}{len(values)}{kind}", *values)


def element(tag, vr, value, *, order="<", implicit=False, length=None):
    """One element; numbers are packed, texts padded."""
    if isinstance(value, int):
        value = (value,)
    if isinstance(value, tuple):
        value = struct.pack(f"{order}{len(value)}H", *value)
    if isinstance(value, str):
        value = value.encode()
    value += b"\0" * (len(value) % 2)
    length = len(value) if length is None else length
    head = struct.pack(f"{order}HH", tag >> 16, tag & 0xFFFF)
    if implicit:
        return head + struct.pack(f"{order}I", length) + value
    if vr in _LONG:
        return head + vr.encode() + bytes(2) + struct.pack(f"{order}I", length) + value
    return head + vr.encode() + struct.pack(f"{order}H", length) + value


def item(content):
    """An item of a sequence."""
    return struct.pack("<HHI", 0xFFFE, 0xE000, len(content)) + content


def encapsulated(*fragments):
    """Compressed pixels: an empty table of offsets, fragments, and the end."""
    padded = [fragment + b"\0" * (len(fragment) % 2) for fragment in fragments]
    return item(b"") + b"".join(map(item, padded)) + END


def dicom(
    pixels=b"",
    *,
    syntax=EXPLICIT,
    size=(4, 4),
    samples=1,
    photometric="MONOCHROME2",
    bits=16,
    stored=None,
    signed=False,
    more=(),
    change=None,
    vr="OW",
    length=None,
    undefined=(),
    meta=b"",
):
    """A file of one image, with a patient's name.

    Args:
        pixels: As they are in the file.
        syntax: How they are encoded.
        size: Width and height.
        samples: A pixel.
        photometric: What they mean.
        bits: Allocated.
        stored: Bits that count; None: all.
        signed: Whether two's complement.
        more: Further elements: tag, kind, value.
        change: Values in place of others, by tag; None: without that element.
        vr: Kind of the pixels.
        length: That is announced of the pixels.
        undefined: Tags of sequences that say their end instead of their length.
        meta: Further elements of the meta information.
    """
    stored = bits if stored is None else stored
    fields = {
        0x00100010: ("PN", PATIENT),
        0x00280002: ("US", samples),
        0x00280004: ("CS", photometric + " " * (len(photometric) % 2)),
        0x00280006: ("US", 0),
        0x00280010: ("US", size[1]),
        0x00280011: ("US", size[0]),
        0x00280100: ("US", bits),
        0x00280101: ("US", stored),
        0x00280102: ("US", stored - 1),
        0x00280103: ("US", int(signed)),
    }
    fields |= {tag: (kind, value) for tag, kind, value in more}
    for tag, value in (change or {}).items():
        fields[tag] = (fields[tag][0] if tag in fields else "US", value)
    order, implicit = ">" if syntax == BIG else "<", syntax == IMPLICIT
    if length is None and syntax not in (IMPLICIT, EXPLICIT, BIG):
        length = UNDEFINED
    body = b"".join(
        element(tag, kind, value + END, order=order, implicit=implicit, length=UNDEFINED)
        if tag in undefined
        else element(tag, kind, value, order=order, implicit=implicit)
        for tag, (kind, value) in sorted(fields.items())
        if value is not None
    )
    body += element(0x7FE00010, vr, pixels, order=order, implicit=implicit, length=length)
    meta = element(0x00020010, "UI", syntax) + meta
    group = element(0x00020000, "UL", struct.pack("<I", len(meta)))
    return bytes(128) + b"DICM" + group + meta + body


def table(entries, *, first=0, bits=8, implicit=False):
    """An item with a lookup table."""
    descriptor = element(0x00283002, "US", (len(entries), first % 65536, bits), implicit=implicit)
    return item(descriptor + element(0x00283006, "OW", words(*entries), implicit=implicit))


def compressed(kind, size=(4, 4), mode="L"):
    """Pixels of one color, compressed by Pillow."""
    stream = io.BytesIO()
    Image.new(mode, size, 99).save(stream, kind)
    return encapsulated(stream.getvalue())


def sea(length):
    """Empty items, that many bytes of them: each becomes an object."""
    return item(b"") * (length // 8)


PLAIN = words(*range(16))
"""The pixels of 4×4, 16 bits each."""
