"""What a JPEG 2000 frame says about itself, read before OpenJPEG takes memory for it.

OpenJPEG keeps records of each tile, code block and quality layer, whatever is in them: a frame of a few bytes
could take gigabytes. Markers are those of ITU-T T.800, annex A. Where OpenJPEG would read damaged headers in
another way than this does, they are refused.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from fedkl.data.squares import RefusedError

_IN_BOXES = b"\0\0\0\x0cjP  "
_SOC_SIZ, _COD, _COC, _SOT, _SOD = 0xFF4FFF51, 0xFF52, 0xFF53, 0xFF90, 0xFF93
_MAIN = (0xFF51, _COD, _COC, 0xFF55, 0xFF57, 0xFF5C, 0xFF5D, 0xFF5E, 0xFF5F, 0xFF60, 0xFF63, 0xFF64)
_MOST_TILES, _MOST_LAYERS = 1024, 64
_LEAST_BLOCK = 4  # exponent of width and height: 16×16
_MOST_BLOCKS = 1 / 128  # a pixel, over all levels
_LEAST_PART = 12  # bytes of a tile-part: its first marker
_DAMAGED = "a JPEG 2000 frame that is not well-formed. It is damaged"
_OTHERWISE = "Decompress it, or save it with an encoder's usual settings"


def check_frame(frame: bytes, *, size: tuple[int, int], samples: int) -> None:
    """Checks what decoding would take.

    Args:
        frame: A codestream, in JP2's boxes or without them.
        size: Width and height that the file announces.
        samples: A pixel, likewise.

    Raises:
        RefusedError: It is another image, or has too many tiles or layers, or too small code blocks.
    """
    try:
        start = _check_size(frame, size=size, samples=samples)
        for marker, segment in _segments(frame, start + 2):
            _check_segment(marker, segment)
    except (struct.error, IndexError):
        raise RefusedError(_DAMAGED) from None


def _check_size(frame: bytes, *, size: tuple[int, int], samples: int) -> int:
    """Checks image and tiles; returns where the codestream begins."""
    start = _start(frame)
    first, _, _, *numbers, found = struct.unpack_from(">IHH8IH", frame, start)
    right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = numbers
    if first != _SOC_SIZ or 0 in (tile_width, tile_height):
        raise RefusedError(_DAMAGED)
    if (right - left, bottom - top) != size or found != samples:
        raise RefusedError(
            f"compressed pixels of {right - left}×{bottom - top} where {size[0]}×{size[1]} were announced, "
            "or of other colors. It is damaged"
        )
    tiles = -((tile_left - right) // tile_width) * -((tile_top - bottom) // tile_height)
    if tiles > _MOST_TILES:
        raise RefusedError(f"JPEG 2000 of {tiles} tiles; {_MOST_TILES} are read. {_OTHERWISE}")
    return start


def _check_segment(marker: int, segment: bytes) -> None:
    if marker == _COD:
        (layers,) = struct.unpack_from(">H", segment, 2)
        if layers > _MOST_LAYERS:
            raise RefusedError(f"JPEG 2000 of {layers} layers; {_MOST_LAYERS} are read. {_OTHERWISE}")
        _check_blocks(segment[0], segment[5:])
    elif marker == _COC:
        _check_blocks(segment[1], segment[2:])


def _start(frame: bytes) -> int:
    """Where the codestream begins."""
    if not frame.startswith(_IN_BOXES):
        return 0
    at, kind, length = 0, b"", 0
    while kind != b"jp2c":
        at += length
        length, kind = struct.unpack_from(">I4s", frame, at)
        if length < 8 and kind != b"jp2c":
            raise RefusedError(_DAMAGED)
    if b"pclr" in frame[:at]:  # one sample would become up to 255
        raise RefusedError(f"JPEG 2000 with a palette of its own. {_OTHERWISE}")
    return at + (16 if length == 1 else 8)


def _segments(frame: bytes, at: int) -> Iterator[tuple[int, bytes]]:
    """Markers and what belongs to them: of the main header, and of those of all tile-parts."""
    part = end = 0
    while True:
        marker, length = struct.unpack_from(">2H", frame, at)
        if marker == _SOD and part:
            if frame[end : end + 2] != struct.pack(">H", _SOT):
                return
            if end <= at:
                raise RefusedError(_DAMAGED)
            at = end
            continue
        if marker == _SOT:
            (taken,) = struct.unpack_from(">I", frame, at + 6)
            part, end = at, at + taken if taken else len(frame)
            if 0 < taken < _LEAST_PART:
                raise RefusedError(_DAMAGED)
        if length < 2 or not (part or marker in _MAIN):
            raise RefusedError(_DAMAGED)
        yield marker, frame[at + 4 : at + 2 + length]
        at += 2 + length


def _check_blocks(style: int, sizes: bytes) -> None:
    """Checks how many code blocks there are a pixel.

    Precincts cut them, and each level has a quarter of the pixels of the next one.
    """
    levels, width, height = sizes[0], sizes[1], sizes[2]
    blocks = 0.0
    for level in range(levels + 1):
        precinct = sizes[5 + level] if style & 1 else 0xFF
        halved = level > 0
        wide, high = min(width + 2, (precinct & 15) - halved), min(height + 2, (precinct >> 4) - halved)
        blocks += 2.0 ** -(2 * (levels - level) + wide + high)
    if min(width, height) + 2 < _LEAST_BLOCK or blocks > _MOST_BLOCKS:
        raise RefusedError(f"JPEG 2000 in code blocks or precincts that are too small. {_OTHERWISE}")
