"""Pixels of a DICOM file, decoded within their announced size, and what they mean."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from pydicom.dataset import Dataset
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_windowing
from pydicom.uid import UID, ExplicitVRLittleEndian

from fedkl.data.dicom import Values
from fedkl.data.dicom_header import Header, frame_of, window_of
from fedkl.data.dicom_jpeg_2000 import check_frame
from fedkl.data.squares import Raster, RefusedError

_COLORS = ("Red", "Green", "Blue")
_TRANSFORMED = 1  # in Adobe's marker: YCbCr, which Pillow makes RGB of
_COMPONENTS = {"L": 1, "I;16": 1, "RGB": 3, "YCbCr": 3}


def raster(header: Header, pixels: bytes, *, channels: int, values: Values) -> Raster:
    """Decodes the pixels of a file.

    Args:
        header: What they are.
        pixels: As they are in the file.
        channels: 1 or 3.
        values: What is black and white, of gray.

    Raises:
        RefusedError: They are not what the header says, or a window or table is of no use.
        Exception: Whatever decoders raise on damaged pixels.
    """
    decoded, photometric = _decoded(header, pixels)
    if header.samples == 3:
        mode = "YCbCr" if photometric.startswith("YBR") else "RGB"
        samples = np.ascontiguousarray(decoded, dtype=np.uint8)
        image = Image.frombuffer(mode, (header.columns, header.rows), samples, "raw", mode, 0, 1)
        return Raster(image, "RGB" if channels == 3 else "L", lambda part: _color(part, channels))
    words = _words(header, decoded)
    table: npt.NDArray[Any]
    if header.photometric == "PALETTE COLOR":
        table = _palette(header)
        look = lambda part: _color(Image.fromarray(table[np.asarray(part)]), channels)  # noqa: E731
        return Raster(Image.fromarray(words), "RGB" if channels == 3 else "L", look)
    table = gray_levels(header, values)
    return Raster(Image.fromarray(words), "F", lambda part: Image.fromarray(table[np.asarray(part)]))


def _words(header: Header, decoded: npt.NDArray[Any]) -> npt.NDArray[np.uint16]:
    """The bits of gray samples that count.

    Others may hold anything where samples are as they were stored. A compressed frame has a precision of its
    own, and none of its bits is to spare.
    """
    signed = decoded.dtype.kind == "i"
    if not (header.is_plain or header.is_run_length):
        low, high = (
            (-(2 ** (header.stored - 1)), 2 ** (header.stored - 1)) if signed else (0, 2**header.stored)
        )
        if decoded.min() < low or decoded.max() >= high:
            raise RefusedError(
                f"compressed samples that need more than the {header.stored} bits announced. It is damaged"
            )
    wide = decoded.astype(np.int16 if signed else np.uint16, copy=False).view(np.uint16)
    return wide & np.uint16(2**header.stored - 1)


def _color(image: Image.Image, channels: int) -> Image.Image:
    return image.convert("RGB" if channels == 3 else "L")


def _decoded(header: Header, pixels: bytes) -> tuple[npt.NDArray[Any], str]:
    """Samples, of shape ``(rows, columns)`` or ``(rows, columns, 3)``, and what they mean."""
    # Compressed pixels lie one after the other, whatever the file says.
    syntax, planar, plugin = UID(header.syntax), header.planar and header.is_plain, ""
    is_rgb = False
    if header.is_run_length:
        # As if it were not compressed: pydicom's own decoder does not bound what runs become.
        syntax, planar, pixels = ExplicitVRLittleEndian, True, _unpacked(header, frame_of(header, pixels))
    elif not header.is_plain:
        is_rgb = _check_frame(header, frame_of(header, pixels))
        plugin = "pillow"  # others may be installed, whose memory nobody has looked at
    options: Any = {
        "rows": header.rows,
        "columns": header.columns,
        "number_of_frames": 1,
        "samples_per_pixel": header.samples,
        "photometric_interpretation": header.photometric,
        "bits_allocated": header.allocated,
        "bits_stored": header.stored,
        "pixel_representation": int(header.signed),
        "planar_configuration": int(planar),
        "pixel_keyword": "PixelData",
        "pixel_vr": header.vr,
    }
    decoder = get_decoder(syntax)
    found, about = decoder.as_array(pixels, index=0, raw=True, decoding_plugin=plugin, **options)
    native = found.dtype.newbyteorder("=")
    return found.astype(native, copy=False), "RGB" if is_rgb else str(about["photometric_interpretation"])


def _check_frame(header: Header, frame: bytes) -> bool:
    """Whether a compressed image becomes RGB, whatever the file says.

    It has a size of its own, which may be another one than the file announces.
    """
    with Image.open(io.BytesIO(frame), formats=(header.codec,)) as image:
        size, components = image.size, _COMPONENTS.get(image.mode)
        is_rgb = image.info.get("adobe_transform") == _TRANSFORMED
    if size != (header.columns, header.rows) or components != header.samples:
        raise RefusedError(
            f"compressed pixels of {size[0]}×{size[1]} where {header.columns}×{header.rows} were announced, "
            "or of other colors. It is damaged"
        )
    if header.codec == "JPEG2000":
        check_frame(frame, size=size, samples=header.samples)
    return is_rgb


def _unpacked(header: Header, frame: bytes) -> bytes:
    """Run lengths decoded: one plane of bytes after the other becomes one of samples after the other."""
    width, count = header.allocated // 8, header.rows * header.columns
    parts = header.samples * width
    heads = np.frombuffer(frame[:64], dtype="<u4")
    starts = [int(start) for start in heads[1 : parts + 1]]
    if len(heads) != 16 or heads[0] != parts or sorted(starts) != starts or starts[0] < 64:
        raise RefusedError(f"run lengths that are not of {parts} parts. It is damaged")
    found = np.empty((header.samples, count, width), dtype=np.uint8)
    for part, (start, end) in enumerate(zip(starts, [*starts[1:], len(frame)], strict=True)):
        plane = Image.frombytes("L", (count, 1), frame[start:end], "packbits", "L")
        sample, byte = divmod(part, width)
        found[sample, :, width - 1 - byte] = np.asarray(plane)[0]  # the high byte is first
    return found.tobytes()


def gray_levels(header: Header, values: Values) -> npt.NDArray[np.float32]:
    """What each stored word of a gray image is in [0, 1]: rescaled, windowed, inverted where 0 is white.

    Args:
        header: Of the file.
        values: "window" is the first lookup table or window of the file, and as "stored" where it has none;
            "stored" are the ends of what the bits can store; numbers are a window in its place.

    Raises:
        RefusedError: A slope, window or table is of no use.
    """
    words = np.arange(2**header.stored, dtype=np.int64)
    if header.signed:
        words -= (words >= 2 ** (header.stored - 1)) * 2**header.stored
    measured = _rescaled(header, words.astype(np.float64))
    low, high = measured.min(), measured.max()
    if not np.isfinite(measured).all() or low == high:
        raise RefusedError("a rescale slope or table that leaves nothing to see. It is damaged")
    levels = (measured - low) / (high - low)
    if not isinstance(values, str):
        levels = _through_window(measured, *values)
    elif values == "window":
        levels = _seen(header, measured, otherwise=levels)
    if header.photometric == "MONOCHROME1":
        levels = 1 - levels
    found: npt.NDArray[np.float32] = np.clip(levels, 0, 1).astype(np.float32)
    return found


def _rescaled(header: Header, stored: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Stored values in the units of the modality, for example Hounsfield's."""
    tables = header.elements.get("ModalityLUTSequence")
    if tables:
        entries, first, _ = _table(header, tables[0], "LUT")
        return _looked_up(entries, first, stored)
    slope, intercept = header.elements.get("RescaleSlope"), header.elements.get("RescaleIntercept")
    if slope is None or intercept is None:
        return stored
    return stored * float(slope) + float(intercept)


def _seen(
    header: Header, measured: npt.NDArray[np.float64], *, otherwise: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    """Through the file's own first table or window."""
    tables = header.elements.get("VOILUTSequence")
    if tables:
        entries, first, bits = _table(header, tables[0], "LUT")
        return _looked_up(entries, first, measured) / float(2**bits - 1)
    window = window_of(header)
    if window is None:
        return otherwise
    function = str(header.elements.get("VOILUTFunction") or "LINEAR")
    known = function in ("LINEAR", "LINEAR_EXACT", "SIGMOID")
    if not known or window[1] <= 0 or (function == "LINEAR" and window[1] < 1):
        raise RefusedError("a window of no width, or of an unknown function. It is damaged")
    return _through_window(measured, *window, function=function)


def _through_window(
    measured: npt.NDArray[np.float64], center: float, width: float, *, function: str = "LINEAR"
) -> npt.NDArray[np.float64]:
    asked = Dataset()  # of 16 bits, so that what comes back is in 0 .. 65535
    asked.PhotometricInterpretation, asked.BitsStored, asked.PixelRepresentation = "MONOCHROME2", 16, 0
    asked.WindowCenter, asked.WindowWidth, asked.VOILUTFunction = float(center), float(width), function
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        found: npt.NDArray[np.float64] = apply_windowing(measured, asked) / 65535
    return found


def _looked_up(
    entries: npt.NDArray[Any], first: int, measured: npt.NDArray[np.float64]
) -> npt.NDArray[np.float64]:
    places = np.clip(np.round(measured) - first, 0, len(entries) - 1).astype(np.int64)
    found: npt.NDArray[np.float64] = entries[places].astype(np.float64)
    return found


def _palette(header: Header) -> npt.NDArray[np.uint8]:
    """The color of each stored word: shape ``(words, 3)``."""
    words = np.arange(2**header.stored, dtype=np.float64)
    found = np.empty((len(words), 3), dtype=np.uint8)
    for channel, color in enumerate(_COLORS):
        entries, first, bits = _table(header, header.elements, f"{color}PaletteColorLookupTable")
        levels = _looked_up(entries, first, words)
        found[:, channel] = np.round(levels * 255 / (2**bits - 1))
    return found


def _table(header: Header, elements: Any, name: str) -> tuple[npt.NDArray[Any], int, int]:
    """A lookup table: its entries, the value that the first is of, and the bits of an entry."""
    descriptor, data = elements.get(f"{name}Descriptor"), elements.get(f"{name}Data")
    if isinstance(descriptor, bytes) and len(descriptor) == 6:  # an implicit encoding does not say its kind
        descriptor = struct.unpack("<HhH" if header.signed else "<HHH", descriptor)
    if descriptor is None or data is None or len(descriptor) != 3:
        raise RefusedError("a lookup table without its description or data. It is damaged")
    count, first, bits = int(descriptor[0]) or 65536, int(descriptor[1]), int(descriptor[2])
    if isinstance(data, bytes):
        narrow = len(data) in (count, count + 1) and bits <= 8  # two entries a word
        order = ">" if header.syntax == "1.2.840.10008.1.2.2" else "<"
        if narrow and order == ">":  # the first entry is in the low byte
            data = np.frombuffer(data[: len(data) // 2 * 2], ">u2").astype("<u2").tobytes()
        data = np.frombuffer(data[:count] if narrow else data[: 2 * count], "u1" if narrow else f"{order}u2")
    entries = np.asarray(data, dtype=np.int64).reshape(-1)[:count]
    if len(entries) < count or not 1 <= bits <= 16 or entries.min() < 0 or entries.max() >= 2**bits:
        raise RefusedError("a lookup table that is not what it says it is. It is damaged")
    return entries, first, bits
