"""What a surface is: seeds, a way to change inputs, and a call with a contract."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import ClassVar
from unittest import mock

from fedkl import lockfile
from fedkl.errors import FedKLError
from tests.fuzzing import mutation
from tests.fuzzing.archive import packed, unpacked
from tests.fuzzing.contract import Finding, check_text, outcome_of, template, watched
from tests.fuzzing.sandbox import Sandbox

CHEAP_SCRYPT = {"n": 2, "r": 1, "p": 1}


class Surface(ABC):
    """One place at which fedkl takes in what somebody else has written.

    Attributes:
        name: On the command line and in the corpus.
        form: How inputs are changed; see `mutation.FORMS`.
        allowed: What the call may raise.
        precious: Files of somebody else in the surface's folder.
        confined: Whether files outside the folder must not even be opened.
        quick: How many inputs the short run of the tests has.
        target: A function of fedkl that the first seed gets to; the harness's own tests break it.
    """

    name: ClassVar[str]
    form: ClassVar[str] = "bytes"
    allowed: ClassVar[tuple[type[Exception], ...]] = (FedKLError,)
    precious: ClassVar[tuple[str, ...]] = ()
    confined: ClassVar[bool] = False
    quick: ClassVar[int] = 120
    target: ClassVar[str]

    @abstractmethod
    def seeds(self) -> list[bytes]:
        """Sound inputs; called inside `entered`."""

    def load(self) -> None:  # noqa: B027 (most have nothing to load)
        """Imports what only the first inputs would import, so that workers need not do it one by one."""

    @abstractmethod
    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Gives an input to fedkl.

        Raises:
            Finding: What it made of the input is not right.
            Exception: Whatever fedkl raises.
        """

    def mutate(self, data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
        """An input like `data`; `other` is another one that parts may be taken from."""
        return mutation.mutated(data, self.form, rng, other)

    def parts(self, data: bytes) -> Iterator[bytes]:
        """Smaller inputs, to begin with when a small one of a finding is looked for."""
        yield from ()

    def setting(self) -> AbstractContextManager[object]:
        """What has to be in place while seeds are made and inputs run."""
        return nullcontext()

    def entered(self) -> AbstractContextManager[object]:
        """The setting, with a passphrase that costs nothing."""
        stack = ExitStack()
        stack.enter_context(mock.patch.object(lockfile, "_SCRYPT", CHEAP_SCRYPT))
        stack.enter_context(self.setting())
        return stack

    def prepared(self) -> list[bytes]:
        """The seeds, made without a word."""
        with self.entered(), watched():
            return self.seeds()

    def run(self, data: bytes, folder: Path) -> str:
        """Gives an input to fedkl and checks the contract.

        Args:
            data: The input.
            folder: For this surface alone; what is in it is replaced.

        Returns:
            What came of it: "accepted" or the kind of error, and what was warned of or logged.

        Raises:
            Finding: The contract is broken.
        """
        sandbox = Sandbox(folder, precious=self.precious)
        sandbox.prepare()
        with watched() as texts:
            outcome = self._outcome(data, sandbox)
        for of, text in texts:
            check_text(text, of=of)
        sandbox.check()
        return " | ".join([outcome, *sorted({template(text) for _, text in texts})[:3]])

    def _outcome(self, data: bytes, sandbox: Sandbox) -> str:
        try:
            with self.entered(), sandbox.confined() if self.confined else nullcontext():
                self.call(data, sandbox)
        except (Finding, KeyboardInterrupt):
            raise
        except self.allowed as error:
            check_text(str(error), of=type(error).__name__, trace=error.__traceback__)
            return outcome_of(error)
        except BaseException as error:
            raise Finding.of(error) from error
        return "accepted"

    def attempt(self, step: Callable[[], object]) -> object:
        """One of several calls on the same input: an allowed error ends it, not the input."""
        try:
            return step()
        except self.allowed as error:
            check_text(str(error), of=type(error).__name__, trace=error.__traceback__)
            return None


class ArchiveSurface(Surface):
    """A surface whose inputs are several files."""

    def form_of(self, name: str) -> str:
        """How the content of a file is changed, by its name."""
        return mutation.form_of(name)

    def mutate(self, data: bytes, rng: random.Random, other: bytes = b"") -> bytes:
        """Changes one file, or which files there are."""
        files = mutation.mutated_files(unpacked(data), self.form_of, rng, unpacked(other))
        return packed(self.repaired(files, rng))

    def parts(self, data: bytes) -> Iterator[bytes]:
        """The input without one of its files, for each of them."""
        files = unpacked(data)
        for name in list(files):
            yield packed({other: content for other, content in files.items() if other != name})

    def repaired(self, files: dict[str, bytes], rng: random.Random) -> dict[str, bytes]:
        """Makes files agree again that name each other's digests, so that what is in them is read."""
        return files
