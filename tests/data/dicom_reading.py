"""DICOM files read by fedkl."""

from fedkl.data import FolderImages
from fedkl.errors import DataError


def packaged(name):
    """One of the files inside pydicom's wheel; nothing is downloaded."""
    from pydicom.data import get_testdata_file

    return get_testdata_file(name, download=False)


def read(path, content, **options):
    """The image of a file with this content."""
    path.write_bytes(content)
    return FolderImages([path], **{"size": 4, "channels": 1, **options})[:][0]


def said(path, content):
    """The error that reading this content gives; None if it is read."""
    try:
        read(path, content)
    except DataError as error:
        return error
    return None
