"""Peak memory of decoding large images: `python -m tests.data.large_images` prints rows of docs/data.md."""

import subprocess
import sys
import tempfile
import zlib
from pathlib import Path

from PIL import Image

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
    return lambda path: Image.new(mode, (side, side), (10, 20, 30, 40)[: len(mode)]).save(path, **options)


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
}


def main(*, threads: str) -> None:
    """Prints a row for each image: eight times the same in a batch, in a process of its own."""
    Image.MAX_IMAGE_PIXELS = None
    with tempfile.TemporaryDirectory() as folder:
        for name, (suffix, make) in IMAGES.items():
            path = Path(folder) / f"image{suffix}"
            make(path)
            command = [sys.executable, "-W", "ignore", "-c", MEMORY, "8", threads, str(path)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            came = f"{float(done.stdout):.0f} MiB" if done.returncode == 0 else "refused"
            sys.stdout.write(f"| {name} | {came} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(threads=sys.argv[1] if len(sys.argv) > 1 else "4")
