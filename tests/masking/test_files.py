"""Cards, rosters and members' files: written and read back, or refused in one clear sentence."""

from __future__ import annotations

import json
import pickle
import random
import stat
import subprocess
import sys
from datetime import timedelta

import pytest
import torch

from fedkl import files, lockfile
from fedkl.errors import ConfigError, FedKLError, KeyFileError, MaskingError, SecretError
from fedkl.masking import Call, Contribution, MemberFile, MemberKeys, Membership, Rules, new_roster
from fedkl.masking.canonical import canonical
from fedkl.masking.texts import (
    MAX_COHORT,
    card_from_bytes,
    card_to_bytes,
    card_values,
    roster_from_bytes,
    roster_to_bytes,
)
from tests.masking.cohorts import TODAY

PASSPHRASE = "correct horse"


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


def test_nothing_is_joined_that_nobody_has_compared(file, sealed):
    assert file.needs_fingerprint(sealed)
    for given in (None, "", "0" * 24, sealed.roster.fingerprint.lower()):
        with pytest.raises(MaskingError, match="fingerprint"):
            file.join(sealed, today=TODAY, fingerprint=given)
    assert not file.cohorts


def test_the_next_epoch_has_another_key_and_needs_no_call_with_blind_masks(file, keys):
    sealed = roster_of(keys, mode="blind")
    old = joined(file, sealed)
    new = keys_of(4)[3:]
    after = roster_of([*keys, *new], previous=sealed.roster, signer=keys[1])
    assert not file.needs_fingerprint(after)
    now = file.join(after, today=TODAY)
    assert reveals(now) == reveals(after.opened(new[0])) != reveals(old)
    with pytest.raises(MaskingError, match="not the one that the roster names"):
        Membership(roster=after.roster, keys=keys[0], secret=old.secret)
    assert file.join(after, today=TODAY) == file.membership()


def test_one_member_cannot_put_others_into_the_cohort_where_masks_protect_from_members(file, keys, sealed):
    joined(file, sealed)
    same = roster_of(keys, previous=sealed.roster, signer=keys[1])  # a new key only
    assert not file.needs_fingerprint(same)
    after = roster_of([keys[0], keys[1], *keys_of(5)[3:]], previous=sealed.roster, signer=keys[1])
    assert file.needs_fingerprint(after)
    with pytest.raises(MaskingError, match="nobody has compared"):
        file.join(after, today=TODAY)
    assert file.membership().roster == sealed.roster
    assert file.join(after, today=TODAY, fingerprint=after.roster.fingerprint).roster == after.roster


def test_one_member_cannot_change_the_rules(file, keys, sealed):
    joined(file, sealed)
    weaker = new_roster(
        name="study",
        cards=[each.card() for each in keys],
        rules=Rules(mode="blind"),
        signer=keys[1],
        today=TODAY,
        previous=sealed.roster,
    )
    assert file.needs_fingerprint(weaker)
    with pytest.raises(MaskingError, match="nobody has compared"):
        file.join(weaker, today=TODAY)
    assert file.membership().roster == sealed.roster


def test_rosters_that_do_not_follow(file, keys, sealed):
    joined(file, sealed)
    strangers = keys_of(3)
    next_one = roster_of(keys, previous=sealed.roster)
    skipped = roster_of(keys, previous=next_one.roster)
    another = roster_of(keys, mode="both")
    forged = roster_of([keys[0], *strangers[1:]], mode="both")
    forged = roster_of(keys, previous=forged.roster)
    unsigned = type(next_one)(
        roster=next_one.roster, wrapped=next_one.wrapped, signer="h001", signature=next_one.signature
    )
    for wrong, text in {
        "skipped": "does not follow epoch 0",
        "another": "this file is of epoch 0, and epoch 0 with the fingerprint",
        "forged": "does not follow epoch 0",
        "unsigned": "not signed by a member of the epoch before",
    }.items():
        found = {"skipped": skipped, "another": another, "forged": forged, "unsigned": unsigned}[wrong]
        with pytest.raises(MaskingError, match=text):
            file.join(found, today=TODAY, fingerprint=found.roster.fingerprint)
    assert file.membership().roster == sealed.roster
    file.join(next_one, today=TODAY)
    with pytest.raises(MaskingError, match="Ask for the newest file"):
        file.join(sealed, today=TODAY, fingerprint=sealed.roster.fingerprint)


def test_rosters_of_others(file, keys):
    others = roster_of(keys_of(3))
    with pytest.raises(MaskingError, match="has another card of h000"):
        joined(file, others)
    without = roster_of([*keys[1:], *keys_of(4)[3:]], signer=keys[1])
    with pytest.raises(MaskingError, match="h000 is not a member of cohort study"):
        joined(file, without)
    late = roster_of(keys)
    with pytest.raises(MaskingError, match="expired"):
        file.join(late, today=TODAY + timedelta(days=91), fingerprint=late.roster.fingerprint)


def test_a_false_key_is_refused(file, keys, sealed):
    wrapped = {**sealed.wrapped, "h000": keys[0].card().wrap(keys[0].own_secret, info=sealed.roster.digest)}
    false = type(sealed)(
        roster=sealed.roster, wrapped=wrapped, signer=sealed.signer, signature=sealed.signature
    )
    with pytest.raises(MaskingError, match="not the one that the roster names"):
        joined(file, false)


@pytest.mark.parametrize("what", ["the cohort's end", "its next epoch"])
def test_an_update_that_was_kept_goes_with_what_it_was_for(what, file, sealed, keys):
    joined(file, sealed)
    call = Call(run=bytes(16), round=1, attempt=0, cohort=sealed.roster.members)
    kept = file.update_file("study")
    kept.write(call, Contribution(tensors={"w": torch.zeros(2)}, samples=3, metrics={}))
    assert kept.path.exists()
    if what == "the cohort's end":
        file.end("study")
    else:
        joined(file, roster_of(keys, previous=sealed.roster))
    assert not kept.path.exists()


def test_a_cohort_that_was_left_is_not_joined_again(path, file, sealed, keys):
    key = reveals(joined(file, sealed))
    memory = file.memory()
    file.end("study")
    assert not file.cohorts
    assert key not in plain(path, "member")
    with pytest.raises(MaskingError, match="left or changed"):
        memory.keep(memory)
    with pytest.raises(MaskingError, match="has left it"):
        joined(file, sealed)
    file.close()
    with opened(path) as again:
        with pytest.raises(MaskingError, match="has left it"):
            joined(again, sealed)
        joined(again, roster_of(keys, previous=sealed.roster))
        assert again.membership().roster.epoch == 1


def plain(path, kind):
    """All that a secret file holds, decrypted."""
    meta, tensors = lockfile.read(path, kind=kind, passphrase=PASSPHRASE)
    return json.dumps(meta).encode() + b"".join(bytes(tensor.tolist()) for tensor in tensors.values())


def test_several_cohorts(file, keys, sealed):
    with pytest.raises(MaskingError, match=r"no cohort named\. It has joined none yet"):
        file.membership()
    joined(file, sealed)
    joined(file, roster_of(keys, name="other one"))
    assert list(file.cohorts) == ["study", "other one"]
    with pytest.raises(MaskingError, match=r"It has joined other one, study\. Name one of these"):
        file.membership()
    with pytest.raises(MaskingError, match=r"no cohort 'x'\. It has joined other one, study"):
        file.memory("x")
    assert file.membership("other one").roster.name == "other one"
    one, two = file.memory("study"), file.memory("other one")
    for memory, text in ((one, "1"), (two, "2"), (one, "3")):
        memory.sets["x"] = text
        memory.keep(memory)
    file.end("study")
    file.close()
    with opened(file.path) as again:
        assert again.memory().sets == {"x": "2"}


def test_the_end_of_a_cohort_destroys_what_was_remembered_of_it(path, file, keys, sealed):
    joined(file, sealed)
    joined(file, roster_of(keys, name="other one"))
    keep(file, a="of the study")
    keep(file, "other one", a="of the other")
    key, kept = file._content.memory_key.reveal().hex(), path.with_suffix(".memory")
    file.end("study")
    held = json.dumps(lockfile.read(kept, kind="memory", passphrase=key)[0])
    assert "of the study" not in held
    assert "of the other" in held
    file.close()
    with opened(path) as again:
        assert again.memory().sets == {"a": "of the other"}
        again.end("other one")
        assert "of the" not in json.dumps(lockfile.read(kept, kind="memory", passphrase=key)[0])


@pytest.mark.parametrize("damaged", [True, False])
def test_a_cohort_whose_memory_is_damaged_or_was_never_written_ends(path, file, sealed, damaged):
    joined(file, sealed)
    if damaged:
        keep(file, a="1")
        file.close()
        path.with_suffix(".memory").write_bytes(b"no memory")
    else:
        file.close()
    with opened(path) as again:
        again.end("study")
        assert not again.cohorts
    assert path.with_suffix(".memory").exists() == damaged


def keep(file, cohort="study", **sets):
    memory = file.memory(cohort)
    memory.sets.update(sets)
    memory.keep(memory)


@pytest.mark.parametrize("name", ["gone", "older", "damaged", "another's"])
def test_a_memory_that_is_not_the_last_one(path, file, keys, sealed, tmp_path, name):
    joined(file, sealed)
    keep(file, a="1")
    memory = path.with_suffix(".memory")
    first = memory.read_bytes()
    keep(file, a="2")
    last = memory.read_bytes()
    file.close()
    assert stat.S_IMODE(memory.stat().st_mode) == 0o600
    with MemberFile.create(tmp_path / "other.secret", keys[1], passphrase=PASSPHRASE) as other:
        joined(other, sealed)
        keep(other, a="3")
    foreign = (tmp_path / "other.memory").read_bytes()
    memory.unlink()
    damage = {"older": first, "damaged": last[:-1], "another's": foreign}
    if name in damage:
        memory.write_bytes(damage[name])
    reason = {"gone": "is gone", "older": "is an older one: written 1 times, expected 2"}
    with opened(path) as again:
        with pytest.raises(MaskingError, match=reason.get(name, "is damaged, or another member's")) as error:
            again.memory()
        assert "Put the newest file back, or have the cohort changed" in str(error.value)
        assert memory.exists() == (name in damage)
        again.join(roster_of(keys, previous=sealed.roster), today=TODAY)
        assert again.memory().sets == {}
        keep(again, b="1")
    with opened(path) as again:
        assert again.memory().sets == {"b": "1"}
    copies = list(tmp_path.glob("h000.memory.old-*"))
    assert len(copies) == (name in ("damaged", "another's"))


def test_the_newest_memory_is_taken_again(path, file, sealed):
    joined(file, sealed)
    keep(file, a="1")
    memory = path.with_suffix(".memory")
    last = memory.read_bytes()
    memory.unlink()
    file.close()
    with opened(path) as again, pytest.raises(MaskingError, match="is gone"):
        again.memory()
    memory.write_bytes(last)
    with opened(path) as again:
        assert again.memory().sets == {"a": "1"}


def test_a_memory_ahead_of_its_count_is_the_last_one(path, file, sealed):
    """As after a crash between the two writes."""
    joined(file, sealed)
    keep(file, a="1")
    before = path.read_bytes()
    keep(file, a="2")
    file.close()
    path.write_bytes(before)
    with opened(path) as again:
        assert again.memory().sets == {"a": "2"}
        keep(again, a="3")
        keep(again, a="4")
    with opened(path) as again:
        assert again.memory().sets == {"a": "4"}


def test_another_cohorts_memory_cannot_hide_a_loss(path, file, keys, sealed):
    joined(file, sealed)
    joined(file, roster_of(keys, name="other"))
    keep(file, "study", a="1")
    file.close()
    path.with_suffix(".memory").unlink()
    with opened(path) as again:
        keep(again, "other", b="1")
    with opened(path) as again:
        assert again.memory("other").sets == {"b": "1"}
        with pytest.raises(MaskingError, match="does not hold it"):
            again.memory("study")


def test_a_memory_that_cannot_be_written_is_not_kept(path, file, sealed, monkeypatch):
    joined(file, sealed)
    keep(file, a="1")

    def fail(path, data, *, mode):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", fail)
        with pytest.raises(KeyFileError, match="No space left"):
            keep(file, a="2")
    file.close()
    with opened(path) as again:
        assert again.memory().sets == {"a": "1"}


def test_a_failed_join_changes_nothing(path, file, sealed, monkeypatch):
    before = path.read_bytes()

    def fail(path, data, *, mode):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "write_atomically", fail)
        with pytest.raises(KeyFileError):
            joined(file, sealed)
    assert not file.cohorts
    assert path.read_bytes() == before
    joined(file, sealed)


def test_a_file_is_open_once(path, file):
    with pytest.raises(ConfigError, match="in use"):
        opened(path)
    code = (
        "from fedkl.masking import MemberFile\nfrom fedkl.errors import ConfigError\n"
        f"try: MemberFile.open({str(path)!r}, passphrase='x')\nexcept ConfigError: print('in use')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "in use\n", done.stderr
    file.close()
    file.close()
    with opened(path):
        pass
    with pytest.raises(MaskingError, match="closed already"):
        file.end("study")


def test_a_link_is_not_opened(path, file, tmp_path):
    """What is written would take its place: two files, of which each forgets what the other has done."""
    file.close()
    link = tmp_path / "link.secret"
    link.symlink_to(path)
    with pytest.raises(KeyFileError, match="got a symbolic link"):
        opened(link)
    opened(path).close()


def test_a_failed_open_gives_the_lock_back(path, file):
    file.close()
    with pytest.raises(KeyFileError, match="wrong passphrase"):
        MemberFile.open(path, passphrase="x")
    with opened(path):
        pass


def test_create_never_replaces(path, file, keys):
    before = path.read_bytes()
    file.close()
    with pytest.raises(KeyFileError, match="exists already"):
        MemberFile.create(path, keys[1], passphrase=PASSPHRASE)
    assert path.read_bytes() == before
    with pytest.raises(KeyFileError, match="passphrase is empty"):
        MemberFile.create(path.with_name("x.secret"), keys[1], passphrase="")
    assert not path.with_name("x.secret").exists()


def test_a_changed_passphrase_opens_both_files(path, file, sealed):
    joined(file, sealed)
    keep(file, a="1")
    file.close()
    lockfile.change_passphrase(path, old=PASSPHRASE, new="mule")
    with MemberFile.open(path, passphrase="mule") as again:
        assert again.memory().sets == {"a": "1"}


def test_secrets_do_not_show(path, file, sealed, keys, tmp_path):
    joined(file, sealed)
    keep(file, a="1")
    hidden = [seed.reveal() for seed in keys[0].seeds.values()] + [reveals(file.membership())]
    hidden += [PASSPHRASE.encode(), file._content.memory_key.reveal()]
    shown = repr(file) + repr(file._content) + repr(file.membership()) + repr(vars(file))
    assert not any(secret.hex() in shown or str(secret) in shown for secret in hidden)
    assert PASSPHRASE not in shown
    for value in (file, file._content, file.keys, file.membership()):
        with pytest.raises(SecretError):
            pickle.dumps(value)
    for left in tmp_path.iterdir():
        data = left.read_bytes()
        assert not any(secret in data or secret.hex().encode() in data for secret in hidden), left
    names = {"h000.secret", "h000.memory", ".h000.secret.lock"}
    assert {left.name for left in tmp_path.iterdir()} == names


def changed(data, rng):
    """One byte is another one, or the end is gone."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ rng.randrange(1, 256)]) + data[place + 1 :]


def test_altered_texts_are_refused(keys, sealed):
    rng = random.Random(0)
    for read, data in (
        (card_from_bytes, card_to_bytes(keys[0].card())),
        (roster_from_bytes, roster_to_bytes(sealed)),
    ):
        for _ in range(400):
            with pytest.raises(FedKLError):
                read(changed(data, rng))


def test_altered_files_are_refused(path, file, sealed):
    joined(file, sealed)
    keep(file, a="1")
    file.close()
    rng = random.Random(0)
    for place in (path, path.with_suffix(".memory")):
        sound = place.read_bytes()
        for _ in range(150):
            place.write_bytes(changed(sound, rng))
            with pytest.raises(FedKLError), opened(path) as again:
                again.memory()
        place.write_bytes(sound)


def test_texts_survive_a_mail(keys, sealed):
    """Line ends and white space at the end are what mail programs change."""
    card = card_to_bytes(keys[0].card())
    assert card_from_bytes(card.replace(b"\n", b"\r\n") + b"\r\n") == keys[0].card()
    assert roster_from_bytes(roster_to_bytes(sealed) + b"\n\n") == sealed


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda v: v.pop("pair"), "'pair' is missing"),
        (lambda v: v.update(more=1), "'more' is not known"),
        (lambda v: v.update(pair="AA"), "'pair': expected 32 bytes in base64"),
        (lambda v: v.update(pair=7), "'pair': expected a value of type str"),
        (lambda v: v.update(expires="soon"), "'expires': expected a date, YYYY-MM-DD"),
        (lambda v: v.update(name="A\x1b[31m"), "Member name"),
        (lambda v: v.update(version=0), "version 0, this fedkl reads version 1"),
        (lambda v: v.update(version=True), "version True"),
        (lambda v: v.update(format="fedkl cohort"), "this is a cohort's file"),
        (lambda v: v.update(format=["x"]), "this is something else"),
    ],
)
def test_every_field_of_a_card(keys, change, text):
    values = json.loads(card_to_bytes(keys[0].card()))
    change(values)
    with pytest.raises(MaskingError, match=text.replace("[", "\\[")):
        card_from_bytes(json.dumps(values, indent=1).encode())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda v: v["rules"].update(minimum="3"), "rules: 'minimum': expected a value of type int"),
        (lambda v: v["rules"].update(minimum=True), "rules: 'minimum': expected a value of type int"),
        (lambda v: v["rules"].update(minimum=2), "minimum: expected 3 to 1000"),
        (lambda v: v["rules"].update(mode="none"), "'mode': expected one of blind, pairwise, both"),
        (lambda v: v["rules"].update(bits=16), "'bits': expected one of 64, 32"),
        (lambda v: v["rules"].update(sampled=0), "'sampled': expected a value of type bool"),
        (lambda v: v.update(epoch=-1), "'epoch': expected a number from 0"),
        (lambda v: v.update(epoch=1), "'previous': expected 32 bytes in base64"),
        (lambda v: v.update(name="x\ny"), "'name': expected a short text"),
        (lambda v: v.update(name="/x"), "Cohort name '/x'"),
        (lambda v: v["cards"].reverse(), "expected the members sorted by name"),
        (lambda v: v["cards"].append(v["cards"][-1]), "h002 is on it twice"),
        (lambda v: v["cards"].pop(), "3 \\(the minimum\\) to 1000 members, got 2"),
        (lambda v: v.update(cards=[1, 2, 3]), "card: expected an object"),
        (lambda v: v.update(cards=v["cards"] * 400), "1200 cards, expected at most 1000"),
        (lambda v: v["wrapped"].pop("h001"), "wrapped keys: 'h001' is missing"),
        (lambda v: v["wrapped"].update(z="AA"), "wrapped keys: 'z' is not known"),
        (lambda v: v.update(signer="h001"), "it is not signed by one of its members"),
        (lambda v: v.update(checksum="0" * 64), "altered or damaged after it was written"),
    ],
)
def test_every_field_of_a_roster(sealed, change, text):
    values = json.loads(roster_to_bytes(sealed))
    change(values)
    with pytest.raises(MaskingError, match=text):
        roster_from_bytes(json.dumps(values, indent=1).encode())


def test_texts_that_are_too_large(keys):
    for data in (b" " * 2**24, card_to_bytes(keys[0].card()) + b" " * 2**14):
        with pytest.raises(MaskingError):
            card_from_bytes(data)


def test_keys_that_cannot_be_used(keys):
    """A signed card can still hold keys that a library would stumble over later."""
    for kind, size in (("pair", 32), ("receive_curve", 32)):
        card = signed(keys[0], **{kind: bytes(size)})
        with pytest.raises(MaskingError, match="has a key that cannot be used"):
            card_from_bytes(card_to_bytes(card))


def signed(keys, **changes):
    """A card with other keys, signed by its own identity."""
    card = keys.card()
    raw = {name: getattr(card, name) for name in ("identity", "pair", "receive_lattice", "receive_curve")}
    raw |= changes
    data = canonical("card", card.name, card.expires.isoformat(), *raw.values())
    return type(card)(name=card.name, expires=card.expires, **raw, signature=keys.sign(data))


def test_the_largest_roster_fits():
    one = keys_of(1)[0]
    cards = len(json.dumps(card_values(one.card()))) * 1000
    assert 1000 * 1168 * 4 // 3 + cards + 2**16 < MAX_COHORT
