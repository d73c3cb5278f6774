"""A member's last update on disk, encrypted, until its round is over.

With pair masks a round may be tried again after somebody has gone. The update is then masked anew: training
again would give another one, and the difference of the two would be known.
"""

from __future__ import annotations

from pathlib import Path

from fedkl import lockfile
from fedkl.errors import KeyFileError, MaskingError
from fedkl.masking.encoding import Contribution
from fedkl.masking.schedule import Call, Secret


class UpdateFile:
    """One update.

    Args:
        path: Where it is, or will be.
        key: Encrypts it, 32 bytes.
    """

    def __init__(self, path: Path, *, key: Secret) -> None:
        self.path = path
        self._key = key

    def write(self, call: Call, contribution: Contribution) -> None:
        """Writes an update down, in place of the one before.

        Args:
            call: The round that it was made for.
            contribution: The update.

        Raises:
            KeyFileError: It cannot be written.
        """
        lockfile.write(
            self.path,
            kind="update",
            meta={
                "round": _round(call),
                "samples": contribution.samples,
                "metrics": dict(contribution.metrics),
            },
            tensors=contribution.tensors,
            passphrase=self._key.reveal().hex(),
        )

    def read(self, call: Call) -> Contribution:
        """The update that was made for a round.

        Raises:
            MaskingError: There is none, or it is of another round or other settings.
        """
        try:
            meta, tensors = lockfile.read(self.path, kind="update", passphrase=self._key.reveal().hex())
        except KeyFileError as error:
            raise MaskingError(f"{self.path}: this member's last update is not there any more.") from error
        if meta.get("round") != _round(call):
            raise MaskingError(f"{self.path}: this member has no update of the round that is tried again.")
        return Contribution(tensors=tensors, samples=meta["samples"], metrics=meta["metrics"])

    def remove(self) -> None:
        """Forgets it."""
        self.path.unlink(missing_ok=True)


def _round(call: Call) -> list[str | int]:
    return [call.run.hex(), call.round, call.settings.hex()]
