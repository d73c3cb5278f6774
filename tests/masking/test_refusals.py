"""What members and server refuse: one table, and no secret in any of its texts."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
import torch

from fedkl.errors import MaskingError, SecretError
from fedkl.masking import (
    Call,
    Contribution,
    Layout,
    ListMessage,
    MaskedSum,
    Member,
    MemberKeys,
    Memory,
    Words,
    keyring,
    roster,
    schedule,
    sharing,
    stream,
)
from fedkl.masking.encoding import Masks, encoded
from fedkl.masking.stream import Room
from fedkl.update import TensorSpec
from tests.masking.cohorts import RUN, SPECS, TODAY, Cohort, drawn, member_of, new_cohort

Case = Callable[[], object]


def ready(cohort: Cohort, *, of: tuple[str, ...] | None = None) -> MaskedSum:
    server = cohort.server(cohort.call())
    for upload in cohort.uploads(cohort.call(), of=of).values():
        server.offer(upload)
    return server


def member(**rules: object) -> tuple[Cohort, Member]:
    cohort = new_cohort(5, **rules)
    return cohort, cohort.members["h001"]


# Calls


def upload(**changed: object) -> Callable[[], object]:
    """An upload to a call in which something is changed."""

    def case() -> object:
        cohort, own = member(mode="both")
        return own.upload(replace(cohort.call(), **changed), cohort.updates["h001"])

    return case


def without_me() -> object:
    cohort, own = member(sampled=True)
    return own.upload(cohort.call(cohort=("h000", "h002", "h003")), cohort.updates["h001"])


def past_round() -> object:
    cohort, own = member(mode="pairwise")
    own.upload(cohort.call(round=3), cohort.updates["h001"])
    return own.upload(cohort.call(round=2), cohort.updates["h001"])


def opened_round() -> object:
    cohort, own = member(mode="blind")
    own.open(cohort.summed(cohort.call(), of=("h000", "h002", "h003")))
    return own.upload(cohort.call(), cohort.updates["h001"])


def context_again(mode: str, attempt: int) -> Callable[[], object]:
    def case() -> object:
        cohort, own = member(mode=mode)
        own.upload(cohort.call(attempt=1), cohort.updates["h001"])
        return own.upload(cohort.call(attempt=attempt), cohort.updates["h001"])

    return case


def no_model() -> object:
    cohort = new_cohort(3, accept=False)
    return cohort.members["h000"].upload(cohort.call(), cohort.updates["h000"])


# Updates and models


def contribution(**changed: object) -> Callable[[], object]:
    def case() -> object:
        cohort, own = member(max_samples=1000)
        return own.upload(cohort.call(), replace(cohort.updates["h001"], **changed))

    return case


def tensor(name: str, value: object) -> Callable[[], object]:
    return contribution(tensors={**drawn(0), name: value})


def model_after_a_sum() -> object:
    cohort, own = member()
    own.open(cohort.summed(cohort.call()))
    return own.accept_model(RUN, drawn(0))


def model_after_an_upload() -> object:
    cohort, own = member()
    cohort.uploads(cohort.call())
    return own.accept_model(RUN, drawn(5))


def model(name: str, value: torch.Tensor) -> Callable[[], object]:
    return lambda: member()[1].accept_model(RUN, {**drawn(0), name: value})


# Reveals


def reveal(change: Callable[[ListMessage], ListMessage], *, of: int = 5) -> Callable[[], object]:
    def case() -> object:
        cohort, own = member(mode="pairwise")
        server = ready(cohort, of=cohort.names[:of])
        return own.reveal(change(server.list_for("h001")))

    return case


def only(message: ListMessage, names: list[str]) -> ListMessage:
    pick = {name: message.listed[name] for name in names}
    return replace(message, listed=pick, shares={name: message.shares[name] for name in names})


def listed(message: ListMessage, **nonces: bytes) -> ListMessage:
    return replace(message, listed={**message.listed, **nonces})


def shares(message: ListMessage, **found: bytes) -> ListMessage:
    return replace(message, shares={**message.shares, **found})


def flipped(share: bytes) -> bytes:
    return bytes([share[0] ^ 1]) + share[1:]


def swapped(message: ListMessage) -> ListMessage:
    return shares(message, h002=message.shares["h003"], h003=message.shares["h002"])


def reveal_blind() -> object:
    cohort, own = member(mode="blind")
    server = ready(cohort)
    return own.reveal(ListMessage(call=cohort.call(), listed=server.listed, shares={}))


def second_list() -> object:
    cohort, own = member(mode="pairwise")
    message = ready(cohort).list_for("h001")
    own.reveal(message)
    return own.reveal(only(message, ["h000", "h001", "h002", "h003"]))


def second_set() -> object:
    cohort, own = member(mode="pairwise")
    own.reveal(ready(cohort).list_for("h001"))
    cohort.summed(cohort.call(round=1), of=cohort.names[1:])
    return None


def reveal_late() -> object:
    cohort, own = member(mode="pairwise")
    message = ready(cohort).list_for("h001")
    own.upload(cohort.call(round=1), cohort.updates["h001"])
    return own.reveal(message)


# Sums


def total(mode: str = "blind", **changed: object) -> Callable[[], object]:
    def case() -> object:
        cohort, own = member(mode=mode)
        return own.open(replace(cohort.summed(cohort.call()), **changed))

    return case


def entries(change: Callable[[dict[str, bytes]], dict[str, bytes]]) -> Callable[[], object]:
    def case() -> object:
        cohort, own = member()
        found = cohort.summed(cohort.call())
        return own.open(replace(found, listed=change(dict(found.listed))))

    return case


def other_roster() -> object:
    cohort, _ = member()
    _, own = member()
    own.upload(cohort.call(), cohort.updates["h001"])
    return own.open(cohort.summed(cohort.call(), of=("h000", "h002", "h003")))


def other_metrics() -> object:
    cohort, _ = member()
    layout = replace(cohort.layout, metrics=("accuracy",))
    own = member_of(cohort.sealed, cohort.keys[4], layout)
    return own.open(cohort.summed(cohort.call(), of=cohort.names[:4]))


def other_tensors() -> object:
    cohort, _ = member()
    layout = replace(cohort.layout, specs={name: SPECS[name] for name in ("weight", "flag")})
    own = member_of(cohort.sealed, cohort.keys[4], layout)
    return own.open(cohort.summed(cohort.call(), of=cohort.names[:4]))


def other_suite() -> object:
    cohort, _ = member()
    words = Words(bits=32, members=5, max_samples=cohort.sealed.roster.rules.max_samples)
    return member_of(cohort.sealed, cohort.keys[0], Layout(specs=SPECS, words=words))


def expired(days: int) -> Callable[[], object]:
    def case() -> object:
        cohort, _ = member()
        today = TODAY + timedelta(days=days)
        return Member(
            cohort.sealed.opened(cohort.keys[0]),
            layout=cohort.layout,
            memory=Memory(),
            booleans={"flag": drawn(0)["flag"]},
            today=today,
        )

    return case


def expires_meanwhile(step: str) -> Callable[[], object]:
    """A member that goes on running: the date is looked at in every round."""

    def case() -> object:
        cohort = new_cohort(3, mode="pairwise")
        days = iter([0, 0, 91] if step == "reveal" else [0, 91])
        own = Member(
            cohort.sealed.opened(cohort.keys[0]),
            layout=cohort.layout,
            memory=Memory(),
            booleans={"flag": drawn(0)["flag"]},
            today=lambda: TODAY + timedelta(days=next(days)),
        )
        own.accept_model(RUN, drawn(1000))
        if step == "upload":
            return own.upload(cohort.call(), cohort.updates["h000"])
        cohort.members["h000"] = own
        return own.reveal(ready(cohort).list_for("h000"))

    return case


def listed_without_an_upload() -> object:
    """Of a round that comes after all that it took part in."""
    cohort, own = member(mode="blind")
    found = cohort.summed(cohort.call(), of=("h000", "h002", "h003"))
    return own.open(replace(found, listed=dict(sorted({**found.listed, "h001": bytes(32)}.items()))))


def complex_layout() -> object:
    specs = {"c": TensorSpec(shape=(2,), dtype=torch.complex64)}
    return Layout(specs=specs, words=Words(bits=64, members=3, max_samples=1))


def huge_whole_number() -> object:
    """What does not fit into 64 bits with a sign would come out as a small negative number."""
    cohort = new_cohort(3)
    layout = replace(cohort.layout, specs={"seed": TensorSpec(shape=(1,), dtype=torch.uint64)}, metrics=())
    given = Contribution(tensors={"seed": torch.tensor([2**64 - 1], dtype=torch.uint64)}, samples=1)
    return encoded(layout, given, masks=Masks(), tag_key=(bytes(16), bytes(32)))


def without_booleans() -> object:
    cohort, _ = member()
    opened = cohort.sealed.opened(cohort.keys[0])
    return Member(opened, layout=cohort.layout, memory=Memory(), today=TODAY)


def words(**changed: int) -> Callable[[], object]:
    return lambda: Words(**{"bits": 64, "members": 3, "max_samples": 9} | changed)


def another_sum() -> object:
    cohort, own = member()
    uploads = cohort.uploads(cohort.call())
    for part in (cohort.names[:4], cohort.names[1:]):
        server = cohort.server(cohort.call())
        for name in part:
            server.offer(uploads[name])
        own.open(server.sealed())
    return None


def sum_of_others() -> object:
    """It follows a sum that this member has not seen, though none can be between."""
    cohort, own = member()
    for each in cohort.members.values():
        if each is not own:
            each.accept_model(RUN, drawn(2))
    found = cohort.summed(cohort.call(), of=("h000", "h002", "h003"))
    own.upload(cohort.call(), cohort.updates["h001"])
    return own.open(found)


def damaged_memory(**about: object) -> Callable[[], object]:
    return lambda: Memory.from_json({"runs": {"a": about}, "sets": {}}, keep=lambda memory: None)


# The server


def offered(**changed: object) -> Callable[[], object]:
    def case() -> object:
        cohort, _ = member(mode="pairwise")
        found = cohort.uploads(cohort.call())
        server = cohort.server(cohort.call())
        server.offer(found["h000"])
        server.offer(replace(found["h001"], **changed))
        return None

    return case


def twice() -> object:
    cohort, _ = member(mode="pairwise")
    found = cohort.uploads(cohort.call())
    server = cohort.server(cohort.call())
    server.offer(found["h000"])
    return server.offer(found["h000"])


def too_few() -> object:
    cohort, _ = member(mode="pairwise")
    return ready(cohort, of=cohort.names[:3]).sealed()


def revealed(**changed: object) -> Callable[[], object]:
    def case() -> object:
        cohort, own = member(mode="pairwise")
        server = ready(cohort, of=cohort.names[:4])
        return server.offer_reveal(replace(own.reveal(server.list_for("h001")), **changed))

    return case


def not_yet_revealed() -> object:
    cohort, own = member(mode="pairwise")
    server = ready(cohort)
    server.offer_reveal(own.reveal(server.list_for("h001")))
    return server.sealed()


def split(**changed: object) -> Callable[[], object]:
    return lambda: sharing.split(**{"secret": bytes(32), "points": [1, 2, 3], "threshold": 2} | changed)


NAMES = tuple(f"h{place:03}" for place in range(5))
NAN, INF = float("nan"), float("inf")
REFUSALS: dict[str, tuple[Case, str]] = {
    "another roster": (other_roster, "did not send|tag does not fit"),
    "another layout, as long": (other_metrics, "tag does not fit"),
    "another layout": (other_tensors, "expected a sum of"),
    "another suite": (other_suite, "the roster's words"),
    "roster expired": (expired(91), "the roster expired"),
    "card expired": (expired(366), "h000's card expired"),
    "expired before an upload": (expires_meanwhile("upload"), "the roster expired"),
    "expired before a reveal": (expires_meanwhile("reveal"), "the roster expired"),
    "booleans missing": (without_booleans, "'flag' is missing"),
    "complex numbers": (complex_layout, "'c' has dtype torch.complex64"),
    "words for too many members": (words(members=1001), "1 to 1000 members"),
    "words for too many samples": (words(max_samples=2**20 + 1), "1 to 1048576 samples"),
    "run's name": (upload(run=bytes(15)), "a run's name of 16 bytes"),
    "round below 0": (upload(round=-1), "round and attempt from 0"),
    "round as a truth value": (upload(round=True), "round and attempt from 0"),
    "attempt too high": (upload(attempt=2**40), "round and attempt from 0"),
    "cohort unsorted": (upload(cohort=NAMES[::-1]), "the cohort is not sorted"),
    "cohort repeated": (upload(cohort=(*NAMES, "h004")), "the cohort repeats a name"),
    "cohort foreign": (upload(cohort=(*NAMES, "h005")), "the cohort has names that do not belong"),
    "cohort too small": (upload(cohort=NAMES[:2], attempt=1), "the cohort has 2 names, expected 3"),
    "cohort not whole": (upload(cohort=NAMES[:4]), "asks all members"),
    "without me": (without_me, "not in the cohort"),
    "past round": (past_round, "a past round"),
    "round with a sum": (opened_round, "a past round"),
    "context again": (context_again("pairwise", 1), "used up"),
    "context again, both": (context_again("both", 1), "used up"),
    "earlier attempt": (context_again("pairwise", 0), "used up"),
    "earlier attempt, blind": (context_again("blind", 0), "used up"),
    "no model": (no_model, "accepted no model"),
    "NaN": (tensor("bias", torch.full((7,), NAN)), "'bias' has values beyond"),
    "infinite": (tensor("bias", torch.full((7,), INF)), "'bias' has values beyond"),
    "out of range": (tensor("bias", torch.full((7,), 1024.1)), "'bias' has values beyond"),
    "whole numbers out of range": (tensor("batches", torch.tensor(2**30 + 1)), "beyond ±2"),
    "whole numbers below the range": (tensor("batches", torch.tensor(-(2**30) - 1)), "beyond ±2"),
    "whole numbers that are huge": (huge_whole_number, "'seed' has whole numbers beyond ±2"),
    "other booleans": (tensor("flag", torch.tensor([True, True])), "'flag' .bool. differs"),
    "wrong shape": (tensor("bias", torch.zeros(8)), "'bias' has shape"),
    "wrong dtype": (tensor("bias", torch.zeros(7, dtype=torch.float64)), "'bias' has dtype"),
    "unknown tensor": (tensor("more", torch.zeros(1)), "'more' is unexpected"),
    "missing tensor": (contribution(tensors={"flag": drawn(0)["flag"]}), "'weight' is missing"),
    "no samples": (contribution(samples=0), "expected 1 to 1000 samples"),
    "too many samples": (contribution(samples=1001), "expected 1 to 1000 samples"),
    "samples as a truth value": (contribution(samples=True), "expected 1 to 1000 samples"),
    "metric missing": (contribution(metrics={}), "expected the metrics loss"),
    "metric unknown": (contribution(metrics={"loss": 0.5, "more": 1.0}), "expected the metrics loss"),
    "metric not finite": (contribution(metrics={"loss": NAN}), "metric 'loss' is not a number within"),
    "metric out of range": (contribution(metrics={"loss": 9000.0}), "metric 'loss' is not a number within"),
    "model after a sum": (model_after_a_sum, "this run has a sum already"),
    "model after an upload": (model_after_an_upload, "sent another model"),
    "model not finite": (model("bias", torch.full((7,), NAN)), "'bias' has non-finite values"),
    "model of another shape": (model("bias", torch.zeros(8)), "'bias' has shape"),
    "model with other booleans": (model("flag", torch.tensor([False, False])), "'flag' .bool. differs"),
    "reveal with blind masks": (reveal_blind, "nothing is ever revealed"),
    "reveal for a past round": (reveal_late, "has no upload in this attempt"),
    "reveal for another attempt": (
        reveal(lambda m: replace(m, call=replace(m.call, attempt=1))),
        "has no upload in this attempt",
    ),
    "second list": (second_list, "a second list"),
    "second set on a model": (second_set, "on this model this member has revealed for other members"),
    "list unsorted": (
        reveal(lambda m: replace(m, listed=dict(sorted(m.listed.items(), reverse=True)))),
        "the list is not sorted",
    ),
    "list foreign": (reveal(lambda m: listed(m, h009=bytes(32))), "the list has names that do not belong"),
    "list short": (reveal(lambda m: only(m, ["h000", "h001", "h002"])), "has 3 names, expected 4"),
    "list without me": (reveal(lambda m: only(m, ["h000", "h002", "h003", "h004"])), "not this member's own"),
    "my nonce altered": (reveal(lambda m: listed(m, h001=bytes(32))), "not this member's own upload"),
    "another's nonce altered": (reveal(lambda m: listed(m, h000=bytes(32))), "of h000's seed was altered"),
    "nonce of a wrong size": (reveal(lambda m: listed(m, h000=bytes(31))), "nonces of 32 bytes"),
    "altered share": (reveal(lambda m: shares(m, h000=flipped(m.shares["h000"]))), "h000's seed was altered"),
    "shares swapped": (reveal(swapped), "seed was altered"),
    "share cut off": (reveal(lambda m: shares(m, h000=b"")), "h000's seed was altered"),
    "share missing": (reveal(lambda m: replace(m, shares={})), "one share of each listed member"),
    "share of somebody unlisted": (
        reveal(lambda m: shares(m, h004=m.shares["h000"]), of=4),
        "one share of each listed member",
    ),
    "share of a stranger": (reveal(lambda m: shares(m, h009=bytes(48))), "one share of each listed member"),
    "false tag": (entries(lambda found: {**found, "h000": bytes(32)}), "tag does not fit"),
    "my entry altered": (entries(lambda found: {**found, "h001": bytes(32)}), "did not send"),
    "listed without an upload": (listed_without_an_upload, "did not send"),
    "sum's nonce of a wrong size": (entries(lambda found: {**found, "h000": b""}), "nonces of 32 bytes"),
    "sum of an unsorted cohort": (
        total(call=Call(run=RUN, round=0, attempt=0, cohort=NAMES[::-1])),
        "the cohort is not sorted",
    ),
    "sum's list unsorted": (entries(lambda found: dict(sorted(found.items(), reverse=True))), "not sorted"),
    "sum's list foreign": (entries(lambda found: {**found, "h009": bytes(32)}), "do not belong"),
    "sum's list short": (entries(lambda found: dict(list(found.items())[:2])), "2 names, expected 3"),
    "sum of a wrong size": (total(words=np.zeros(64, dtype=np.uint8)), "expected a sum of"),
    "sum of another history": (total(transcript=bytes(32)), "did not send"),
    "sum that follows others": (sum_of_others, "follows other sums"),
    "another sum of a round": (another_sum, "another sum of a round"),
    "damaged memory": (damaged_memory(round="0"), "memory is damaged"),
    "memory with a truth value": (damaged_memory(round=True), "memory is damaged"),
    "memory with unknown fields": (damaged_memory(more=1), "memory is damaged"),
    "two uploads of one member": (twice, "h000 has uploaded already"),
    "upload of a stranger": (offered(member="h009"), "h009 was not asked"),
    "upload of a wrong size": (offered(words=np.zeros(8, dtype=np.uint8)), "sent other words than"),
    "upload of another shape": (
        lambda: offered(words=np.zeros((1, member()[0].layout.size), dtype=np.uint8))(),
        "sent other words than",
    ),
    "upload's nonce of a wrong size": (offered(nonce=bytes(31)), "a nonce of a wrong size"),
    "upload of another context": (offered(context=bytes(32)), "another roster, model or history"),
    "upload without shares": (offered(shares={}), "shares for others"),
    "upload with a stranger's share": (
        offered(shares={"h001": b"", "h009": b""}),
        "shares for others than the cohort",
    ),
    "upload without a commitment": (offered(commitment=b""), "sent no commitment"),
    "too few uploads": (too_few, "expected 4 uploads or more"),
    "reveal of somebody unlisted": (revealed(member="h004"), "is not listed"),
    "reveal of other things": (revealed(pairs={}), "other things than it was asked for"),
    "reveal with a stranger": (
        revealed(pairs={"h004": bytes(32), "h009": bytes(32)}),
        "other things than it was asked for",
    ),
    "reveal without shares": (revealed(shares={}), "other things than it was asked for"),
    "reveal of a wrong size": (revealed(pairs={"h004": bytes(31)}), "parts of a wrong size"),
    "shares missing": (not_yet_revealed, "1 shares of 4"),
    "equal points": (split(points=[1, 1, 2]), "different points"),
    "point 0": (split(points=[0, 1, 2]), "different points from 1"),
    "threshold above the points": (split(threshold=4), "expected 1 to 3"),
    "no field's number": (split(secret=b"\xff" * 32), "below the prime"),
    "no shares": (lambda: sharing.join({}), "expected shares"),
    "share beyond the field": (lambda: sharing.join({1: b"\xff" * 32}), "below the prime"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name):
    case, text = REFUSALS[name]
    with pytest.raises(MaskingError, match=text):
        case()


def texts(error: BaseException | None) -> Iterator[str]:
    """All that a log could print of an exception and of what it came from."""
    while error is not None:
        yield f"{error} {error!r} {error.args!r} {getattr(error, '__notes__', '')}"
        error = error.__cause__ or error.__context__


def secrets_of(cohort: Cohort) -> list[bytes]:
    """Every secret of a cohort that is derived or kept."""
    found = [seed.reveal() for keys in cohort.keys for seed in keys.seeds.values()]
    for own in cohort.members.values():
        ring, remembered = own._keyring, own.memory.runs[RUN.hex()]
        context = own._current(cohort.call(), remembered)
        nonce = bytes.fromhex(remembered.uploads[context.digest.hex()])
        found += [ring._key, *ring.tag_key(context, own.name, nonce), ring.self_seed(context, nonce)]
        found += [ring.pair_seed(context, name) for name in ring.around(context)]
        found += [secret.reveal() for secret in ring._pairs.values()]
    return found


def shows(data: bytes, secret: bytes) -> bool:
    forms = (secret, secret.hex().encode(), repr(secret).encode())
    return any(form.lower() in data.lower() for form in forms)


def test_no_secret_is_in_what_objects_show_or_pickle():
    cohort = new_cohort(3, mode="both")
    server = ready(cohort)
    own = cohort.members["h001"]
    context = own._current(cohort.call(), own.memory.runs[RUN.hex()])
    masks = own._keyring.masks(context, bytes(32))
    message = server.list_for("h001")
    membership = cohort.sealed.opened(cohort.keys[1])
    objects = [
        *(cohort.sealed, cohort.sealed.roster, membership, membership.secret, cohort.keys[0]),
        *(cohort.keys[0].card(), own, own._keyring, own.memory, own.layout, context, cohort.call()),
        *(masks, *masks.plus, Room(), message, server, *server._uploads.values()),
        *(cohort.updates["h000"], own._keyring._pairs),
    ]
    secrets = secrets_of(cohort)
    assert len(secrets) > 30
    pickled = 0
    for each in objects:
        shown = [f"{each} {each!r}".encode(), repr(getattr(each, "__dict__", "")).encode()]
        try:
            shown.append(pickle.dumps(each))
            pickled += 1
        except (SecretError, TypeError, pickle.PicklingError):
            pass
        assert not any(shows(data, secret) for data in shown for secret in secrets), type(each)
    assert pickled >= 8


@pytest.mark.parametrize("kind", ["secret", "keys", "membership", "keyring", "member", "mask", "room"])
def test_what_holds_secrets_refuses_to_be_pickled(kind):
    cohort = new_cohort(3, mode="both")
    own, membership = cohort.members["h001"], cohort.sealed.opened(cohort.keys[1])
    context = own._current(cohort.call(), own.memory.runs[RUN.hex()])
    found = {
        "secret": membership.secret,
        "keys": cohort.keys[0],
        "membership": membership,
        "keyring": own._keyring,
        "member": own,
        "mask": own._keyring.masks(context, bytes(32)),
        "room": Room(),
    }[kind]
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        with pytest.raises(SecretError):
            pickle.dumps(found, protocol=protocol)


def test_copies_of_a_membership_hold_no_bytes():
    cohort = new_cohort(3)
    membership = cohort.sealed.opened(cohort.keys[0])
    assert copy.deepcopy(membership.secret) is membership.secret
    with pytest.raises(SecretError):
        dataclasses.asdict(membership)


@pytest.mark.parametrize("name", REFUSALS)
def test_no_secret_is_in_the_text_of_a_refusal(name, monkeypatch):
    """Every key that is derived while a case runs, and all keys of its members, are looked for."""
    seen: list[bytes] = []

    def spy(secret: bytes, *args: object, **options: object) -> bytes:
        found = schedule.derive(secret, *args, **options)
        seen.extend((bytes(secret), found))
        return found

    for module in (keyring, roster, stream):
        monkeypatch.setattr(module, "derive", spy)
    original = MemberKeys.exchanged
    monkeypatch.setattr(
        MemberKeys, "exchanged", lambda self, other: seen.append(found := original(self, other)) or found
    )
    with pytest.raises(MaskingError) as caught:
        REFUSALS[name][0]()
    said = " ".join(texts(caught.value)).encode() + pickle.dumps(caught.value)
    assert not any(shows(said, secret) for secret in seen if len(secret) >= 16)
