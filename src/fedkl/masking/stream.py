"""Masks: streams of random words, from a seed, in chunks."""

from __future__ import annotations

from typing import Any, NoReturn

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

from fedkl.errors import SecretError
from fedkl.masking.schedule import Label, Secret, derive

CHUNK = 2**18
"""Bytes that are worked on at once; they stay in the processor's cache."""

SEGMENT = 2**24
"""Bytes of a mask that one AES key gives; a multiple of `CHUNK`."""

_COUNTER = bytes(15) + b"\x02"  # where AES-GCM's own key stream begins for a nonce of zeros
_ZEROS = bytes(CHUNK)
_TAIL = 15  # what `update_into` wants beyond its output


class _NotPickled:
    """What holds bytes of masks."""

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise SecretError("Masks cannot be pickled.")

    def __getstate__(self) -> NoReturn:
        self.__reduce_ex__(2)


class Room(_NotPickled):
    """A buffer of one chunk that streams write into, one after the other."""

    def __init__(self) -> None:
        self._bytes = bytearray(CHUNK + _TAIL)
        self._array = np.frombuffer(self._bytes, dtype=np.uint8)

    def filled(self, context: CipherContext, size: int) -> NDArray[np.uint8]:
        """The next bytes of a cipher's key stream; valid until the next call."""
        context.update_into(memoryview(_ZEROS)[:size], self._bytes)
        return self._array[:size]


class MaskStream(_NotPickled):
    """The words of a mask, from the first to the last.

    The key stream of AES-256 in counter mode, a key of its own for every 16 MiB. It is that of AES-256-GCM
    over zeros, which is the faster one to compute on some processors and the slower one on others.

    Args:
        seed: 32 bytes, of one mask only.
    """

    def __init__(self, seed: bytes) -> None:
        self._seed = Secret(seed)
        self._done = 0
        self._context: CipherContext | None = None

    def next(self, size: int, room: Room) -> NDArray[np.uint8]:
        """The next bytes.

        Args:
            size: At most `CHUNK`; all but the last chunk of a mask are whole.
            room: Where they are written; they are valid until it is used again.
        """
        if self._done % SEGMENT == 0:
            key = derive(self._seed.reveal(), Label.SEGMENT, self._done // SEGMENT)
            self._context = Cipher(algorithms.AES(key), modes.CTR(_COUNTER)).encryptor()
        if self._context is None:
            raise AssertionError("the first chunk makes a context")
        self._done += CHUNK
        return room.filled(self._context, size)
