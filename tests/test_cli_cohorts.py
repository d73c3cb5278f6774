"""`fedkl member` and `fedkl cohort`: five members in five folders, and every file in the wrong place."""

from __future__ import annotations

import json
import shutil
import typing
from datetime import timedelta

import pytest
import typer

from fedkl import lockfile
from fedkl.cli import cohort, membership
from fedkl.errors import FedKLError
from fedkl.masking import MemberFile, MemberKeys, Mode
from fedkl.masking.exchange import read_card, read_cohort
from fedkl.masking.texts import card_to_bytes, roster_to_bytes
from tests.masking.cohorts import TODAY
from tests.test_cli import fedkl as fedkl

NAMES = ("a", "b", "c", "d", "e")
PASSPHRASE = "correct horse"


@pytest.fixture(autouse=True)
def _setting(monkeypatch):
    monkeypatch.setattr(lockfile, "_SCRYPT", {"n": 2, "r": 1, "p": 1})
    monkeypatch.setattr(cohort, "today", lambda: TODAY)
    monkeypatch.setattr("fedkl.cli.member.today", lambda: TODAY)
    monkeypatch.setenv("COLUMNS", "200")


class Hospitals:
    """Members, each in a folder of its own."""

    def __init__(self, fedkl, root, monkeypatch):
        self._fedkl, self.root, self._patch = fedkl, root, monkeypatch

    def make(self, name):
        (self.root / name).mkdir()
        code, text = self(name, "member", "new", name)
        assert code == 0, text

    def __call__(self, name, *words):
        self._patch.chdir(self.root / name)
        return self._fedkl(*words)

    def refused(self, name, *words):
        """The message; what is in the folder stays as it was."""
        before = self.state(name)
        code, text = self(name, *words)
        assert code == 2, text
        assert self.state(name) == before
        assert text.count("Error: ") == 1
        return text.partition("Error: ")[2]

    def state(self, name):
        folder = self.root / name
        return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}

    def send(self, pattern, source):
        for path in (self.root / source).glob(pattern):
            for name in (folder.name for folder in self.root.iterdir()):
                if name != source:
                    shutil.copy(path, self.root / name / path.name)

    def sealed(self, name="a"):
        return read_cohort(self.root / name / "study.cohort")

    def membership(self, name):
        with MemberFile.open(self.root / name / f"{name}.secret", passphrase=PASSPHRASE) as file:
            return file.membership()

    def found(self, *options):
        for name in NAMES:
            self.send(f"{name}.member", name)
        cards = [f"{name}.member" for name in NAMES]
        code, text = self("a", "cohort", "new", "study.cohort", *cards, *options)
        assert code == 0, text
        self.send("study.cohort", "a")

    def join(self, *names):
        for name in names or NAMES:
            mark = self.sealed(name).roster.fingerprint
            code, text = self(name, "cohort", "join", "study.cohort", "--fingerprint", mark)
            assert code == 0, text


def build(hospitals, steps):
    for name in NAMES:
        hospitals.make(name)
    if steps > 0:
        hospitals.found()
    if steps > 1:
        hospitals.join()


@pytest.fixture(scope="module")
def templates(tmp_path_factory):
    return tmp_path_factory.mktemp("hospitals")


@pytest.fixture
def at(fedkl, tmp_path, monkeypatch, templates):
    """Hospitals that have got so far; each state is made once, and copied."""

    def copied(steps):
        template = templates / str(steps)
        if not template.exists():
            template.mkdir()
            build(Hospitals(fedkl, template, monkeypatch), steps)
        root = tmp_path / "hospitals"
        shutil.copytree(template, root)
        return Hospitals(fedkl, root, monkeypatch)

    return copied


@pytest.fixture
def hospitals(at):
    return at(0)


@pytest.fixture
def founded(at):
    return at(1)


@pytest.fixture
def joined(at):
    return at(2)


def answer(monkeypatch, said):
    def confirm(question, default):
        assert (question, default) == ("Do the others read the same?", False)
        if isinstance(said, BaseException):
            try:
                raise said
            except BaseException:  # as click does
                raise typer.Abort from None
        return said

    monkeypatch.setattr(typer, "confirm", confirm)


def test_five_members_from_nothing_to_joined(founded, monkeypatch):
    answer(monkeypatch, True)
    mark = founded.sealed().roster.fingerprint
    for name in NAMES:
        code, text = founded(name, "cohort", "join", "study.cohort")
        assert code == 0, text
        assert f"Fingerprint: {mark}" in text
        assert " ".join(mark.split()[0]) in text, "large"
        assert f"{name}.secret: {name} has joined study, epoch 0." in text
    found = [founded.membership(name) for name in NAMES]
    assert len({each.secret.reveal() for each in found}) == 1
    assert {each.roster.digest for each in found} == {founded.sealed().roster.digest}
    assert found[0].roster.members == NAMES


def test_a_new_member(hospitals):
    files = hospitals.root / "a"
    assert (files / "a.secret").stat().st_mode & 0o777 == 0o600
    assert read_card(files / "a.member").name == "a"
    code, text = hospitals("a", "member", "show", "a.member")
    assert (code, text) == (0, "a.member: the card of a, whole, good until 2027-11-29.\n")


def test_rules_are_those_that_were_asked_for(hospitals):
    flags = ("--mode", "pairwise", "--minimum", 4, "--max-samples", 99, "--sampled", "--server-model")
    hospitals.found(*flags, "--bits", 32)
    rules = hospitals.sealed().roster.rules
    assert rules.fields() == ("pairwise", 32, 4, 99, True, True)
    code, text = hospitals("a", "cohort", "show", "study.cohort")
    assert code == 0
    assert (
        "Masks: pairwise, words of 32 bits. Sums of 4 members or more, each with at most 99 samples." in text
    )
    assert "Rounds may ask some members only; the server may change the model." in text
    assert typing.get_args(cohort.Mode) == typing.get_args(Mode)


def test_short_words_ask_for_the_most_samples(hospitals):
    """With 2²⁰ all clients of fewer than 384 images would count the same."""
    with pytest.raises(AssertionError, match="Give --max-samples"):
        hospitals.found("--bits", 32)


def test_nobody_joins_without_comparing(founded, monkeypatch):
    answer(monkeypatch, False)
    assert "not joined. If the others read something else" in founded.refused(
        "b", "cohort", "join", "study.cohort"
    )
    answer(monkeypatch, EOFError())
    assert "nobody has answered. In a script" in founded.refused("b", "cohort", "join", "study.cohort")
    answer(monkeypatch, KeyboardInterrupt())
    code, text = founded("b", "cohort", "join", "study.cohort")
    assert code == 130
    assert "Every file is whole" in text
    for wrong in ("", "0000 0000 0000 0000 0000", founded.sealed().roster.fingerprint.lower()):
        message = founded.refused("b", "cohort", "join", "study.cohort", "--fingerprint", wrong)
        assert f"its fingerprint is {founded.sealed().roster.fingerprint}, not '{wrong}'" in message


def test_a_change_and_its_new_key(joined, monkeypatch):
    answer(monkeypatch, False)
    old = joined.membership("b")
    joined.make("f")
    shutil.copy(joined.root / "f" / "f.member", joined.root / "b")
    code, text = joined("b", "cohort", "change", "study.cohort", "--add", "f.member", "--remove", "e")
    assert code == 0, text
    assert "New: f. Gone: e. The key is a new one." in text
    assert read_cohort(joined.root / "b" / "study.cohort.old-1").roster == old.roster
    joined.send("study.cohort", "b")
    for name in ("a", "b", "c", "d"):
        code, text = joined(name, "cohort", "join", "study.cohort")
        assert code == 0, text
        assert "New: f. Gone: e." in text
        assert "Do the others" not in text
    assert "not joined" in joined.refused("f", "cohort", "join", "study.cohort")
    joined.join("f")
    new = joined.membership("a")
    assert new.roster.members == ("a", "b", "c", "d", "f")
    assert joined.membership("f").secret.reveal() == new.secret.reveal() != old.secret.reveal()
    with pytest.raises(FedKLError, match="not the one that the roster names"):
        type(new)(roster=new.roster, keys=new.keys, secret=old.secret)
    assert "e is not a member of cohort study" in joined.refused("e", "cohort", "join", "study.cohort")


def test_a_cohort_is_renewed_when_it_has_expired(joined, monkeypatch):
    later = TODAY + timedelta(days=91)
    monkeypatch.setattr(cohort, "today", lambda: later)
    message = joined.refused("a", "cohort", "join", "study.cohort")
    assert "the roster expired on 2027-02-27" in message
    assert "fedkl cohort change" in message
    assert joined("a", "cohort", "change", "study.cohort")[0] == 0
    joined.send("study.cohort", "a")
    code, text = joined("b", "cohort", "join", "study.cohort")
    assert code == 0
    assert "The members stay. The key is a new one." in text


def test_a_cohort_is_left(joined):
    code, text = joined("a", "cohort", "end", "study.cohort")
    assert code == 0
    assert "Not destroyed: backups of this secret file" in text
    assert "no cohort 'study'. It has joined none yet" in joined.refused("a", "cohort", "end", "study.cohort")
    message = joined.refused(
        "a", "cohort", "join", "study.cohort", "--fingerprint", joined.sealed().roster.fingerprint
    )
    assert "this member has left it" in message
    (joined.root / "b" / "study.cohort").unlink()
    assert joined("b", "cohort", "end", "study.cohort")[0] == 0


def test_joining_twice_changes_nothing(joined):
    before = joined.state("a")
    code, text = joined("a", "cohort", "join", "study.cohort")
    assert (code, joined.state("a")) == (0, before)
    assert "joined already" in text
    assert "its fingerprint is" in joined.refused("a", "cohort", "join", "study.cohort", "--fingerprint", "X")


def test_the_secret_file_is_found(hospitals):
    hospitals.found()
    (hospitals.root / "nobody").mkdir()
    shutil.copy(hospitals.root / "a" / "study.cohort", hospitals.root / "nobody")
    message = hospitals.refused("nobody", "cohort", "join", "study.cohort")
    assert "no member's secret file, NAME.secret, is in this folder" in message
    shutil.copy(hospitals.root / "b" / "b.secret", hospitals.root / "a")
    (hospitals.root / "a" / "._a.secret").write_bytes(b"of a Mac's finder")
    message = hospitals.refused("a", "cohort", "join", "study.cohort")
    assert "a.secret, b.secret. Say which one with --member" in message
    mark = hospitals.sealed().roster.fingerprint
    words = ("cohort", "join", "study.cohort", "--member", "a.secret", "--fingerprint", mark)
    assert hospitals("a", *words)[0] == 0


def test_new_never_replaces(founded):
    assert "a.member: exists already. Nothing was made. Send it around" in founded.refused(
        "a", "member", "new", "a"
    )
    assert "its b.secret is not here" in founded.refused("a", "member", "new", "b").lower()
    message = founded.refused("a", "cohort", "new", "study.cohort", "a.member", "b.member", "c.member")
    assert "study.cohort: exists already" in message
    (founded.root / "a" / "a.member").unlink()
    code, text = founded("a", "member", "new", "a")
    assert code == 0
    assert "its keys stay" in text
    assert read_card(founded.root / "a" / "a.member") == read_card(founded.root / "b" / "a.member")


def test_a_card_that_cannot_be_written_is_made_later(fedkl, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fail(path, data, *, mode):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fedkl.masking.exchange.create_once", fail)
        code, text = fedkl("member", "new", "a")
    assert code == 2
    assert "No space left" in text
    assert fedkl("member", "new", "a")[0] == 0
    assert read_card(tmp_path / "a.member").name == "a"


def altered(path, old, new):
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new, 1))


def test_every_file_in_a_wrong_place(founded):
    a = founded.root / "a"
    (a / "broken.member").write_bytes((a / "b.member").read_bytes()[:-3])
    (a / "photo.member").write_bytes(b"\x89PNG\r\n\x1a\n")
    shutil.copy(a / "b.member", a / "renamed.member")
    altered(a / "renamed.member", b'"name": "b"', b'"name": "z"')
    (founded.root / "folder.member").mkdir()
    new, three = ("cohort", "new", "other.cohort"), ("a.member", "b.member", "c.member")
    cases = {
        ("member", "show", "study.cohort"): "expected a member's card (.member), this is a cohort's file",
        ("member", "show", "a.secret"): "this is an encrypted file with secrets. Keep it to yourself",
        ("member", "show", "broken.member"): "not a member's card (.member), or damaged. Ask the member",
        ("member", "show", "photo.member"): "not a member's card (.member), or damaged",
        ("member", "show", "renamed.member"): "Card of z: altered, its signature does not fit",
        ("member", "show", "none.member"): "none.member: cannot be read (No such file or directory)",
        ("member", "new", "Hospital A"): "expected small letters, digits",
        ("member", "new", "x.member"): "expected a name, not a file",
        ("cohort", "show", "a.member"): "expected a cohort's file (.cohort), this is a member's card",
        ("cohort", "join", "a.secret"): "expected a cohort's file (.cohort), this is an encrypted file",
        ("cohort", "end", "a.member"): "expected a cohort's file (.cohort), this is a member's card",
        ("cohort", "change", "a.member"): "expected a cohort's file (.cohort), this is a member's card",
        ("cohort", "join", "study.cohort", "--member", "a.member"): "a.member: not a member's secret file",
        ("cohort", "join", "study.cohort", "--member", "x"): "x: cannot be read (No such file or directory)",
        (*new[:2], *three): "a.member: expected the name of the cohort's new file first, NAME.cohort",
        (*new, *three, "study.cohort"): "study.cohort: expected a member's card",
        (*new, *three, "a.secret"): "a.secret: expected a member's card (.member), this is an encrypted file",
        (*new, *three, "b.member"): "b.member: a card of b, as b.member is. Give one card of each member",
        (*new, "b.member", "c.member", "d.member"): "a.member is not among the cards",
        (*new, *three[:2]): "expected 3 cards or more, got 2",
        (*new, *three, "../folder.member"): "../folder.member: cannot be read (Is a directory)",
        (*new, *three, "--minimum", 4): "expected 4 cards or more, got 3",
        (*new, *three, "--server-model"): "a server that cannot read the sum cannot change the model",
        ("cohort", "new", "öther.cohort", *three): "Cohort name 'öther': expected letters",
        (
            "cohort",
            "change",
            "study.cohort",
        ): "no cohort 'study'. It has joined none yet. Run `fedkl cohort join",
    }
    for words, message in cases.items():
        assert message in founded.refused("a", *words), words


def test_changes_that_are_refused(joined):
    change = ("cohort", "change", "study.cohort")
    joined.make("f")
    shutil.copy(joined.root / "f" / "f.member", joined.root / "a")
    cases = {
        ("--remove", "z"): "there is no member 'z' to remove. Its members are a, b, c, d, e",
        ("--remove", "b.member"): "there is no member 'b.member' to remove",
        ("--add", "b.member"): "b is a member already. Give --remove b too to exchange its card",
        ("--add", "f.member", "--add", "f.member"): "f.member: a card of f, as f.member is",
        ("--remove", "b", "--remove", "c", "--remove", "d"): "2 members would be left",
        ("--add", "study.cohort"): "study.cohort: expected a member's card",
    }
    for words, message in cases.items():
        assert message in joined.refused("a", *change, *words), words
    assert joined("a", *change, "--remove", "e")[0] == 0
    message = joined.refused("a", *change)
    assert "study.cohort: holds epoch 1" in message
    assert "Join the newest file first" in message


def test_an_epoch_is_not_skipped(joined):
    for _ in range(2):
        assert joined("a", "cohort", "change", "study.cohort")[0] == 0
        assert joined("a", "cohort", "join", "study.cohort")[0] == 0
    shutil.copy(joined.root / "a" / "study.cohort", joined.root / "b")
    message = joined.refused("b", "cohort", "join", "study.cohort")
    assert "epoch 2, does not follow epoch 0" in message
    shutil.copy(joined.root / "a" / "study.cohort.old-2", joined.root / "b" / "study.cohort")
    assert joined("b", "cohort", "join", "study.cohort")[0] == 0
    message = joined.refused("a", "cohort", "join", "study.cohort.old-1")
    assert "this file is of epoch 0, and epoch 2 with the fingerprint" in message


def test_two_changes_at_once_are_noticed(joined):
    for name in ("a", "b"):
        assert joined(name, "cohort", "change", "study.cohort")[0] == 0
        assert joined(name, "cohort", "join", "study.cohort")[0] == 0
    shutil.copy(joined.root / "b" / "study.cohort", joined.root / "a")
    assert "this file is of epoch 1, and epoch 1 with the fingerprint" in joined.refused(
        "a", "cohort", "join", "study.cohort"
    )


def test_cards_that_have_expired(founded, monkeypatch):
    founded.join("a")
    monkeypatch.setattr(cohort, "today", lambda: TODAY + timedelta(days=366))
    message = founded.refused("a", "cohort", "new", "x.cohort", "a.member", "b.member", "c.member")
    assert "the card of a expired on 2027-11-29. Ask a for a new one" in message
    message = founded.refused("a", "cohort", "change", "study.cohort")
    assert "study.cohort: the card of a expired on 2027-11-29" in message
    monkeypatch.setattr(membership, "today", lambda: TODAY + timedelta(days=366))
    monkeypatch.setattr("fedkl.cli.member.today", lambda: TODAY + timedelta(days=366))
    assert "expired on 2027-11-29: ask for a new one" in founded("a", "member", "show", "a.member")[1]
    assert "EXPIRED on 2027-02-27" in founded("a", "cohort", "show", "study.cohort")[1]


def test_a_card_that_claims_a_longer_life(hospitals):
    for name in NAMES:
        hospitals.send(f"{name}.member", name)
    with MemberFile.open(hospitals.root / "b" / "b.secret", passphrase=PASSPHRASE) as file:
        keys = MemberKeys(name="b", expires=TODAY + timedelta(days=400), seeds=dict(file.keys.seeds))
    (hospitals.root / "a" / "b.member").write_bytes(card_to_bytes(keys.card()))
    message = hospitals.refused("a", "cohort", "new", "study.cohort", *[f"{name}.member" for name in NAMES])
    assert "the card of b claims to be good until 2028-01-03, longer than the 365 days" in message
    assert "Ask b for a new one" in message
    shown = hospitals("a", "member", "show", "b.member")[1]
    assert "claims to be good until 2028-01-03" in shown


def test_a_roster_with_my_card_exchanged(hospitals):
    secret, card = (hospitals.root / "b" / name for name in ("b.secret", "b.member"))
    own = secret.read_bytes()
    card.unlink()
    secret.unlink()
    assert hospitals("b", "member", "new", "b")[0] == 0
    hospitals.found()
    secret.write_bytes(own)
    message = hospitals.refused("b", "cohort", "join", "study.cohort")
    assert "has another card of b than these keys make" in message
    message = hospitals.refused("b", "cohort", "new", "x.cohort", *[f"{n}.member" for n in NAMES])
    assert "b.member is not the card of this member's present keys" in message


def test_a_file_that_was_altered(founded):
    path = founded.root / "a" / "study.cohort"
    original = path.read_bytes()
    values = json.loads(original)
    for change in ({"epoch": 1}, {"signer": "b"}, {"checksum": "0" * 64}, {"extra": 1}, {"version": 2}):
        path.write_bytes(json.dumps({**values, **change}, indent=1).encode())
        assert "study.cohort: " in founded.refused("a", "cohort", "join", "study.cohort")
    sealed = founded.sealed("b")
    false = type(sealed)(
        roster=sealed.roster,
        wrapped={**sealed.wrapped, "a": sealed.wrapped["b"]},
        signer=sealed.signer,
        signature=sealed.signature,
    )
    path.write_bytes(roster_to_bytes(false))
    message = founded.refused("a", "cohort", "join", "study.cohort")
    assert "The cohort's key is not wrapped for a's keys" in message


def test_a_wrong_passphrase(founded, monkeypatch):
    monkeypatch.setenv("FEDKL_PASSPHRASE", "another")
    message = founded.refused("a", "cohort", "join", "study.cohort")
    assert "a.secret: wrong passphrase" in message
    assert "by --passphrase-file or FEDKL_PASSPHRASE" in message
    assert "another" not in message.replace("another card", "")


def test_a_passphrase_from_a_file(founded, monkeypatch):
    monkeypatch.setenv("FEDKL_PASSPHRASE", "another")
    file = founded.root / "a" / "passphrase"
    file.write_text(PASSPHRASE)
    file.chmod(0o600)
    mark = founded.sealed().roster.fingerprint
    options = ("--passphrase-file", "passphrase")
    assert founded("a", "cohort", "join", "study.cohort", "--fingerprint", mark, *options)[0] == 0
    assert founded("a", "cohort", "change", "study.cohort", *options)[0] == 0
    assert founded("a", "cohort", "end", "study.cohort", *options)[0] == 0


def test_a_file_that_is_in_use(founded):
    with MemberFile.open(founded.root / "a" / "a.secret", passphrase=PASSPHRASE):
        message = founded.refused("a", "cohort", "join", "study.cohort")
    assert "a.secret: in use, by another process" in message


def test_what_expires_soon_is_announced(founded, monkeypatch):
    shown = {
        "cohort": ("study.cohort", 80, "Cohort study expires in 10 days"),
        "member": ("a.member", 345, "20"),
    }
    for command, (name, days, says) in shown.items():
        assert "expires" not in founded("a", command, "show", name)[1]
        with monkeypatch.context() as patch:
            for module in (cohort, "fedkl.cli.member"):
                day = TODAY + timedelta(days=days)
                if isinstance(module, str):
                    patch.setattr(f"{module}.today", lambda day=day: day)
                else:
                    patch.setattr(module, "today", lambda day=day: day)
            code, text = founded("a", command, "show", name)
        assert code == 0, text
        assert says in text
        assert "Run `fedkl" in text.replace("run `fedkl", "Run `fedkl")
