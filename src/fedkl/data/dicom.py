"""A DICOM file becomes a raster, and nothing that it says about a patient gets out.

Texts of pydicom's errors are withheld, and its log is silent meanwhile: both may quote the file.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import BinaryIO, Literal

from PIL import Image

from fedkl.data.messages import place
from fedkl.data.squares import Raster, RefusedError
from fedkl.errors import DataError

Values = Literal["window", "stored"] | tuple[float, float]
"""What is black and white: the file's window (or lookup table), the ends of what its bits can store, or a
window of the user's: center and width in the units of the modality, for example Hounsfield's."""

SUFFIXES = (".dcm", ".dicom")


def check_values(values: Values) -> None:
    """Checks the choice.

    Raises:
        DataError: It is none.
    """
    if values in ("window", "stored"):
        return
    numbers = values if isinstance(values, tuple | list) else ()
    if len(numbers) != 2 or not all(math.isfinite(number) for number in numbers) or numbers[1] < 1:
        raise DataError(
            "dicom: expected 'window', 'stored', or a window's center and width (at least 1), for example "
            f"(40, 400), got {values!r}."
        )


def is_dicom(file: BinaryIO, *, name: str) -> bool:
    """Whether a file is DICOM by its content, or claims to be by its name; leaves it at its beginning."""
    head = file.read(132)
    file.seek(0)
    return head[128:] == b"DICM" or name.lower().endswith(SUFFIXES)


def raster_of(
    file: BinaryIO,
    *,
    path: str | os.PathLike[str],
    taken: Callable[[int, str], None],
    channels: int,
    values: Values,
) -> Raster:
    """Reads and decodes a file of one image.

    Args:
        file: At its beginning.
        path: Its name, for messages.
        taken: Called with the number of pixels, and how that is said, before they are decoded.
        channels: 1 or 3.
        values: What is black and white.

    Raises:
        DataError: pydicom is not installed, or the file is damaged, too large or of a kind that is not read.
    """
    problem: str
    try:
        with _silent():
            from fedkl.data import dicom_pixels  # imports pydicom
            from fedkl.data.dicom_header import read

            header, pixels = read(file)
            taken(*header.extent)
            return dicom_pixels.raster(header, pixels(), channels=channels, values=values)
    except (DataError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("pydicom"):
            raise
        problem = "expected pydicom, which reads DICOM, got none. Install it: pip install 'fedkl[dicom]'"
    except RefusedError as error:
        problem = f"expected a DICOM image, got {error}"
    except Exception as error:  # not `from error`, and outside of here: its text may quote the file
        problem = f"expected a readable DICOM file, got {type(error).__name__}. Replace or remove it"
    raise DataError(f"{place(path)}: {problem}.")


_OF_PYDICOM = r"pydicom\."
_IGNORED = ("ignore", None, Warning, re.compile(_OF_PYDICOM), 0)  # as Python keeps it

_reading = threading.local()


def _said(record: logging.LogRecord) -> bool:
    """A filter of pydicom's log: what it says while we read, in this thread, may quote the file."""
    return not getattr(_reading, "active", False)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    for name in ("pydicom", "pydicom.pixels.decoders.base"):
        logging.getLogger(name).addFilter(_said)  # only once, however often it is called
    # Behind filters of the user's own. Not `catch_warnings`, which threads cannot share. Only once: a change
    # of the filters lets Python forget what it has warned of.
    if _IGNORED not in warnings.filters:
        warnings.filterwarnings("ignore", module=_OF_PYDICOM, append=True)
    _reading.active = True
    try:
        yield
    finally:
        _reading.active = False
