"""What members of masked federations send one another, and a member's own secret file."""

from __future__ import annotations

import tempfile
from datetime import date
from pathlib import Path

from fedkl.masking import MemberFile, MemberKeys, Rules, new_roster
from fedkl.masking.exchange import read_card, read_cohort
from fedkl.masking.texts import card_to_bytes, roster_to_bytes
from tests.fuzzing.archive import packed, unpacked
from tests.fuzzing.binaries import PASSPHRASE
from tests.fuzzing.contract import Finding
from tests.fuzzing.sandbox import Sandbox
from tests.fuzzing.surface import ArchiveSurface

_TODAY = date(2026, 11, 29)
_CARD, _COHORT, _SECRET, _MEMORY = "a.json", "study.json", "a.fedkl", "a.fedkl.memory"


class Members(ArchiveSurface):
    """`read_card`, `read_cohort`, `MemberFile.open` and `join`; what is accepted is what was written."""

    name = "members"
    precious = ("notes.txt",)
    confined = True
    target = "fedkl.masking.exchange.card_from_bytes"

    def seeds(self) -> list[bytes]:
        """A member before and after it has joined, in every mode."""
        keys = [MemberKeys.new(name, today=_TODAY) for name in "abc"]
        inputs = []
        for rules in (Rules(), Rules(mode="pairwise", server_model=True, bits=32), Rules(mode="both")):
            sealed = new_roster(
                name="study",
                cards=[each.card() for each in keys],
                rules=rules,
                signer=keys[0],
                today=_TODAY,
            )
            files = {_CARD: card_to_bytes(keys[0].card()), _COHORT: roster_to_bytes(sealed)}
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / _SECRET
                with MemberFile.create(path, keys[0], passphrase=PASSPHRASE) as file:
                    inputs.append(packed({**files, _SECRET: path.read_bytes()}))
                    file.join(sealed, today=_TODAY, fingerprint=sealed.roster.fingerprint)
                    memory = file.memory()
                    memory.sets["00"] = "00"
                    memory.keep(memory)
                    files |= {name: (Path(folder) / name).read_bytes() for name in (_SECRET, _MEMORY)}
            inputs.append(packed(files))
        return inputs

    def call(self, data: bytes, sandbox: Sandbox) -> None:
        """Reads every file, and joins with what could be read."""
        sandbox.write(unpacked(data))
        place = sandbox.place
        self.attempt(lambda: self._read_card(place / _CARD))
        with MemberFile.open(place / _SECRET, passphrase=PASSPHRASE) as file:
            for name in file.cohorts:
                self.attempt(lambda name=name: file.memory(name))
            sealed = read_cohort(place / _COHORT)
            file.join(sealed, today=_TODAY, fingerprint=sealed.roster.fingerprint)
            joined = file.membership(sealed.roster.name)
        with MemberFile.open(place / _SECRET, passphrase=PASSPHRASE) as again:
            if again.membership(joined.roster.name).roster != joined.roster:
                raise Finding("a cohort is another one after it was written and read")

    def _read_card(self, path: Path) -> None:
        card = read_card(path)
        if card_to_bytes(card) != path.read_bytes().replace(b"\r\n", b"\n").rstrip():
            raise Finding("a card is another one after it was read and written")
