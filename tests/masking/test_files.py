"""Cards, rosters and members' files: written and read back, or refused in one clear sentence."""

from __future__ import annotations

import stat
from datetime import timedelta

import pytest

from fedkl import lockfile
from fedkl.masking import MemberFile, MemberKeys, Rules, new_roster
from fedkl.masking.texts import (
    card_from_bytes,
    card_to_bytes,
    roster_from_bytes,
    roster_to_bytes,
)
from tests.masking.cohorts import TODAY

PASSPHRASE = "correct horse"
LATER = TODAY + timedelta(days=1)


@pytest.fixture(autouse=True)
def _cheap(monkeypatch):
    monkeypatch.setattr(lockfile, "_SCRYPT", {"n": 2, "r": 1, "p": 1})


def keys_of(count, today=TODAY):
    return [MemberKeys.new(f"h{place:03}", today=today) for place in range(count)]


def roster_of(keys, *, name="study", previous=None, signer=None, today=TODAY, **rules):
    return new_roster(
        name=name,
        cards=[each.card() for each in keys],
        rules=Rules(**rules) if previous is None else previous.rules,
        signer=signer or keys[0],
        today=today,
        previous=previous,
    )


@pytest.fixture
def keys():
    return keys_of(3)


@pytest.fixture
def sealed(keys):
    return roster_of(keys, mode="both")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "h000.secret"


@pytest.fixture
def file(path, keys):
    with MemberFile.create(path, keys[0], passphrase=PASSPHRASE) as file:
        yield file


def opened(path):
    return MemberFile.open(path, passphrase=PASSPHRASE)


def joined(file, sealed):
    return file.join(sealed, today=TODAY, fingerprint=sealed.roster.fingerprint)


def reveals(membership):
    return membership.secret.reveal()


def test_cards_and_rosters_are_the_same_when_they_are_read(keys, sealed):
    card = keys[0].card()
    assert card_from_bytes(card_to_bytes(card)) == card
    data = roster_to_bytes(sealed)
    again = roster_from_bytes(data)
    assert again == sealed
    assert again.roster.fingerprint == sealed.roster.fingerprint
    assert again.opened(keys[1]).secret.reveal() == sealed.opened(keys[0]).secret.reveal()


def test_a_member_is_the_same_when_its_file_is_opened(path, file, keys, sealed):
    key = reveals(joined(file, sealed))
    file.close()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    with opened(path) as again:
        assert again.keys.card() == keys[0].card()
        assert {kind: seed.reveal() for kind, seed in again.keys.seeds.items()} == {
            kind: seed.reveal() for kind, seed in keys[0].seeds.items()
        }
        assert list(again.cohorts) == ["study"]
        assert again.membership().roster == sealed.roster
        assert reveals(again.membership("study")) == key


def test_the_memory_is_there_after_a_crash(path, file, sealed):
    joined(file, sealed)
    memory = file.memory()
    assert file.memory("study") is memory
    memory.sets["a"] = "b"
    memory.keep(memory)
    file.close()
    with opened(path) as again:
        assert again.memory().sets == {"a": "b"}
