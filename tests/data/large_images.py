"""Peak memory of decoding large images: `python -m tests.data.large_images`, rows of docs/large-data.md."""

import io
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from PIL import Image

from tests.data.dicom_files import JPEG_2000, RUNS, dicom, encapsulated, words
from tests.data.test_decoding import MEMORY, tiled_tiff


def _palette(path, side):
    image = Image.new("P", (side, side), 7)
    image.putpalette(bytes(range(256)) * 3)
    image.save(path, transparency=bytes(256))


def _tile(path):
    packer = zlib.compressobj(1)
    content = b"".join(packer.compress(bytes(3 * 16384)) for _ in range(16384)) + packer.flush()
    path.write_bytes(tiled_tiff(16, tile=16384, content=content))


def _plain(mode, side, **options):
    color = 7 if mode == "I;16" else (10, 20, 30, 40)[: len(mode)]
    return lambda path: Image.new(mode, (side, side), color).save(path, **options)


def _scan(path, side, *, runs=False, codec=False):
    if runs:
        plane = bytes([129, 7]) * -(-side * side // 128)
        head = words(2, 64, 64 + len(plane), *[0] * 13, kind="I")
        path.write_bytes(dicom(encapsulated(head + 2 * plane), syntax=RUNS, size=(side, side)))
    elif codec:
        stream = io.BytesIO()
        Image.new("I;16", (side, side), 7).save(stream, "JPEG2000", no_jp2=True)
        path.write_bytes(dicom(encapsulated(stream.getvalue()), syntax=JPEG_2000, size=(side, side)))
    else:
        path.write_bytes(dicom(bytes(2 * side * side), size=(side, side)))


IMAGES = {
    "PNG, palette with transparency, 13376×13376": (".png", lambda path: _palette(path, 13376)),
    "PNG, palette with transparency, 9459×9459": (".png", lambda path: _palette(path, 9459)),
    "PNG, RGBA, 9459×9459": (".png", _plain("RGBA", 9459, compress_level=1)),
    "PNG, RGB, 7800×7800": (".png", _plain("RGB", 7800, compress_level=1)),
    "TIFF, CMYK, LZW, 7800×7800": (".tif", _plain("CMYK", 7800, compression="tiff_lzw")),
    "TIFF, RGB in one strip, 7800×7800": (
        ".tif",
        _plain("RGB", 7800, compression="tiff_adobe_deflate", tiffinfo={278: 7800}),
    ),
    "TIFF, 16×16 in a tile of 16384×16384": (".tif", _tile),
    "WebP, RGB, 8192×8192": (".webp", _plain("RGB", 8192, method=0)),
    "JPEG, progressive, 7800×7800": (".jpg", _plain("RGB", 7800, progressive=True)),
    "JPEG, 7800×7800": (".jpg", _plain("RGB", 7800)),
    "PNG, gray, 16 bits, 9459×9459": (".png", _plain("I;16", 9459, compress_level=1)),
    "DICOM, gray, 16 bits, 9459×9459": (".dcm", lambda path: _scan(path, 9459)),
    "DICOM, gray, 16 bits, run lengths, 9459×9459": (".dcm", lambda path: _scan(path, 9459, runs=True)),
    "DICOM, gray, 16 bits, JPEG 2000, 9459×9459": (".dcm", lambda path: _scan(path, 9459, codec=True)),
}


def main(*, threads: str, only: str = "") -> None:
    """Prints a row for each image: eight times the same in a batch, in a process of its own."""
    Image.MAX_IMAGE_PIXELS = None
    with tempfile.TemporaryDirectory() as folder:
        for name, (suffix, make) in IMAGES.items():
            if only not in name:
                continue
            path = Path(folder) / f"image{suffix}"
            make(path)
            command = [sys.executable, "-W", "ignore", "-c", MEMORY, "8", threads, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            came = f"{float(done.stdout):.0f} MiB" if done.returncode == 0 else "refused"
            sys.stdout.write(f"| {name} | {came} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(**dict(zip(("threads", "only"), sys.argv[1:] or ["4"], strict=False)))
