"""A store with a client that has a lock and a member, and what tests of it share."""

from __future__ import annotations

from datetime import date

from fedkl.custody import ClientStore
from fedkl.custody.member import admit, new_member_of
from fedkl.masking import MemberFile, MemberKeys, Rules, new_roster
from tests.custody.network import DEFENSE, net

PASSPHRASE, BACKUP = "correct horse", "battery staple"


def opened(store, name="a"):
    return store.client(name, model=net(), defense=DEFENSE)


def client_of(folder, name="a"):
    """A store whose client has a lock."""
    store = ClientStore(folder, passphrase=PASSPHRASE)
    with opened(store, name) as client:
        store.save(client)
    return store


def member_in(folder, *, today, name="a"):
    """Makes a member in a client's folder; its secret file."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    path, _, _ = new_member_of(folder, name, passphrase=PASSPHRASE, today=today)
    return path


def member_file(path):
    return MemberFile.open(path, passphrase=PASSPHRASE)


def seen_together(folder, path):
    """As a node does with every message."""
    with member_file(path) as file:
        admit(folder, file)


class Study:
    """A cohort of the member in a file and two others, who have keys only."""

    def __init__(self, path, *, today: date, name="study", **rules):
        with member_file(path) as file:
            own = file.keys
        self.others = [MemberKeys.new(other, today=today) for other in ("x", "y")]
        self.keys = [own, *self.others]
        self.name = name
        self.sealed = self._roster(today, Rules(**rules), None)

    def _roster(self, today, rules, previous):
        return new_roster(
            name=self.name,
            cards=[each.card() for each in self.keys],
            rules=rules,
            signer=self.others[0],
            today=today,
            previous=previous,
        )

    def change(self, *, today):
        """The next epoch, signed by another member."""
        roster = self.sealed.roster
        self.sealed = self._roster(today, roster.rules, roster)
        return self.sealed

    def join(self, path, *, today):
        with member_file(path) as file:
            file.join(self.sealed, today=today, fingerprint=self.sealed.roster.fingerprint)
