"""Which lines of the package inputs have reached; lines that are known cost nothing any more."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import CodeType, FrameType
from typing import Any

from tests.fuzzing.contract import PACKAGE

Line = tuple[str, int]
"""File below the package, and number."""


class Lines:
    """The lines of the package that were reached while it was on.

    Args:
        known: Those of earlier inputs.
    """

    def __init__(self, known: Iterable[Line] = ()) -> None:
        self.known = set(known)
        self.grown = False
        self._left: dict[int, set[int]] = {}
        self._kept: list[CodeType] = []  # or else another code object may get the number of a gone one

    @contextmanager
    def tracing(self) -> Iterator[None]:
        """Watches the calls within; sets `grown` if they reach a line for the first time."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        code = frame.f_code
        left = self._left.get(id(code))
        if left is None:
            left = self._lines_of(code)
        return self._line if left else None

    def _lines_of(self, code: CodeType) -> set[int]:
        left: set[int] = set()
        if code.co_filename.startswith(PACKAGE):
            file = _short(code)
            left = {line for _, _, line in code.co_lines() if line and (file, line) not in self.known}
        self._kept.append(code)
        self._left[id(code)] = left
        return left

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        left = self._left[id(frame.f_code)]
        if event == "line" and frame.f_lineno in left:
            left.discard(frame.f_lineno)
            self.known.add((_short(frame.f_code), frame.f_lineno))
            self.grown = True
        return self._line if left else None


def _short(code: CodeType) -> str:
    return code.co_filename[len(PACKAGE) + 1 :]
