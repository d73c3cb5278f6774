"""What a server, members and both try; beside most attacks the same with its protection taken out."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedkl.errors import MaskingError
from fedkl.masking import (
    Call,
    Contribution,
    Layout,
    ListMessage,
    MaskedSum,
    Mean,
    Memory,
    Reveal,
    SealedSum,
    Upload,
    Words,
    opened_mean,
    seal,
    sharing,
)
from fedkl.masking.encoding import Bytes, Masks, Opening, add_to_tag, decoded, encoded, unmasked
from fedkl.masking.keyring import self_commitment, self_mask
from fedkl.masking.quorum import least_listed
from fedkl.masking.stream import MaskStream
from fedkl.update import TensorSpec
from tests.masking.cohorts import RUN, Cohort, drawn, member_of, new_cohort

MODES = ("blind", "pairwise", "both")


def no_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes the masks out: what is left is what the tag protects."""
    monkeypatch.setattr(MaskStream, "next", lambda self, size, room: np.zeros(size, dtype=np.uint8))


def no_tags(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Opening, "holds", lambda self, pads: True)


def constant(cohort: Cohort) -> None:
    """Every member gives nothing but zeros."""
    for name, update in cohort.updates.items():
        tensors = {key: tensor * 0 for key, tensor in update.tensors.items()} | {
            "flag": update.tensors["flag"]
        }
        cohort.updates[name] = Contribution(tensors=tensors, samples=100, metrics={"loss": 0.0})


def nonuniformity(messages: Sequence[Bytes]) -> float:
    """By how many standard deviations the bytes of messages, tags aside, are off uniform ones."""
    found = np.concatenate([message[seal.SIZE :] for message in messages])
    expected = len(found) / 256
    chi2 = float(((np.bincount(found, minlength=256) - expected) ** 2).sum() / expected)
    return (chi2 - 255) / (2 * 255) ** 0.5


def changed(total: SealedSum, change: Callable[[Bytes], None]) -> SealedSum:
    words = total.words.copy()
    change(words)
    return replace(total, words=words)


def add(words: Bytes, other: Bytes, *, sign: int = 1) -> None:
    """Adds a message to one with long words, as a server does."""
    add_to_tag(words, sign * seal.number(other[: seal.SIZE].tobytes()))
    words[seal.SIZE :].view("<i8")[:] += sign * other[seal.SIZE :].view("<i8")


def pairwise_sum(cohort: Cohort, call: Call, *, of: tuple[str, ...]) -> Mean:
    """What the server reads of uploads that are already there or are asked for now."""
    return opened_mean(cohort.summed(call, of=of), layout=cohort.layout, booleans=drawn(0))


def difference(whole: Mean, less: Mean) -> tuple[int, torch.Tensor]:
    """Whose update it is that two sums differ by: its samples and a tensor of it."""
    samples = whole.samples - less.samples
    weight = whole.tensors["weight"].double() * whole.samples - less.tensors["weight"].double() * less.samples
    return samples, weight / samples


def nearly(model: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model that is another one and trains to the same."""
    return {**model, "bias": model["bias"] + 2.0**-20}


def two_sums_on_nearly_one_model(cohort: Cohort, *, later: Call) -> tuple[Mean, Mean]:
    """A sum of all, then, on nearly the same model, one that the last member is left out of."""
    whole = pairwise_sum(cohort, cohort.call(), of=cohort.names)
    for member in cohort.members.values():
        member.accept_model(RUN, nearly(drawn(1000)))
    return whole, pairwise_sum(cohort, later, of=cohort.names[:-1])


def test_a_server_cannot_send_nearly_the_same_model_for_a_second_sum(monkeypatch):
    later = new_cohort(5).call(round=1)
    with pytest.raises(MaskingError, match="another model"):
        two_sums_on_nearly_one_model(new_cohort(5, mode="pairwise"), later=later)
    monkeypatch.setattr("fedkl.masking.member.check_same_start", lambda *_: None)
    cohort = new_cohort(5, mode="pairwise")
    samples, weight = difference(*two_sums_on_nearly_one_model(cohort, later=later))
    assert samples == cohort.updates["h004"].samples
    assert torch.allclose(weight.float(), cohort.updates["h004"].tensors["weight"], atol=1e-5)


def test_a_server_that_may_change_the_model_gets_one_set_of_names_a_round():
    """It has one stored update masked on two models, and wants a sum of each."""
    cohort = new_cohort(5, mode="pairwise", server_model=True)
    call = cohort.call()
    first = cohort.server(call)
    for upload in cohort.uploads(call).values():
        first.offer(upload)
    for member in cohort.members.values():
        member.accept_model(RUN, nearly(drawn(1000)))
    pairwise_sum(cohort, cohort.call(attempt=1), of=cohort.names[:-1])
    for member in cohort.members.values():
        member.accept_model(RUN, drawn(1000))
    with pytest.raises(MaskingError, match="in this round this member has revealed for other members"):
        cohort.members["h000"].reveal(first.list_for("h000"))


@pytest.mark.parametrize("mode", MODES)
def test_uploads_of_zeros_look_like_random_bytes(mode, monkeypatch):
    cohort = new_cohort(3, mode=mode)
    constant(cohort)
    call = cohort.call()
    words = [upload.words for upload in cohort.uploads(call).values()]
    assert abs(nonuniformity(words)) < 12
    no_masks(monkeypatch)
    words = [upload.words for upload in cohort.uploads(cohort.call(attempt=1)).values()]
    assert nonuniformity(words) > 1000


def test_a_million_zeros_look_like_random_bytes(monkeypatch):
    """More words than one chunk has, so that a mask that began anew would show."""
    specs = {"v": TensorSpec(shape=(1_000_000,), dtype=torch.float32)}
    layout = Layout(specs=specs, words=Words(bits=64, members=3, max_samples=9))
    given = Contribution(tensors={"v": torch.zeros(1_000_000)}, samples=3)

    def message() -> Bytes:
        masks = Masks(plus=[MaskStream(secrets.token_bytes(32))], minus=[MaskStream(secrets.token_bytes(32))])
        return encoded(layout, given, masks=masks, tag_key=(secrets.token_bytes(16), secrets.token_bytes(32)))

    found = message()
    assert abs(nonuniformity([found])) < 12
    words = found[layout.head :].view("<u8")
    assert len(np.unique(words)) == len(words)  # by chance twice the same: once in 37 million
    no_masks(monkeypatch)
    assert nonuniformity([message()]) > 1_000_000


@pytest.mark.parametrize("mode", MODES)
def test_two_uploads_of_one_update_differ_by_words_that_say_nothing(mode, monkeypatch):
    """Also where a member has forgotten the first: each upload has a nonce, and its own mask hangs on it."""
    cohort = new_cohort(3, mode=mode)

    def pair() -> Bytes:
        found = []
        for _ in range(2):
            member = member_of(cohort.sealed, cohort.keys[0], cohort.layout)
            member.accept_model(RUN, drawn(1000))
            found.append(member.upload(cohort.call(), cohort.updates["h000"]).words.copy())
        add(found[0], found[1], sign=-1)
        return found[0]

    said = pair()[seal.SIZE :].view("<i8")
    assert len(set(said.tolist())) == len(said)
    assert abs(nonuniformity([pair()])) < 12
    monkeypatch.setattr("fedkl.masking.member.secrets.token_bytes", bytes)
    assert not pair().any()


@pytest.mark.parametrize("mode", MODES)
def test_nothing_leaves_before_it_is_written_down(mode):
    written: list[dict] = []
    cohort = new_cohort(3, mode=mode, accept=False)
    member = member_of(cohort.sealed, cohort.keys[0], cohort.layout)
    member.memory.keep = lambda memory: written.append(memory.to_json())
    member.accept_model(RUN, drawn(1000))
    upload = member.upload(cohort.call(), cohort.updates["h000"])
    assert written[-1]["runs"][RUN.hex()]["uploads"] == {upload.context.hex(): upload.nonce.hex()}
    again = Memory.from_json(written[-1], keep=lambda memory: None)
    restarted = member_of(cohort.sealed, cohort.keys[0], cohort.layout, memory=again)
    if mode != "blind":
        with pytest.raises(MaskingError, match="used up"):
            restarted.upload(cohort.call(), cohort.updates["h000"])


def test_a_sum_is_written_down_before_it_is_given():
    """Else a crash would bring the member back to where the server may show it another sum."""
    written: list[dict] = []
    cohort = new_cohort(3, mode="blind", accept=False)
    member = member_of(cohort.sealed, cohort.keys[0], cohort.layout)
    for each in (member, *cohort.members.values()):
        each.accept_model(RUN, drawn(1000))
    total = cohort.summed(cohort.call(), of=cohort.names)
    cohort.members["h000"].memory.keep = lambda memory: written.append(memory.to_json())
    cohort.members["h000"].open(total)
    restarted = member_of(cohort.sealed, cohort.keys[0], cohort.layout, memory=Memory.from_json(written[-1]))
    with pytest.raises(MaskingError, match="this run has a sum already"):
        restarted.accept_model(RUN, drawn(2000))
    with pytest.raises(MaskingError, match="a past round"):
        restarted.upload(cohort.call(), cohort.updates["h000"])
    cohort.members["h001"].memory.keep = full_disk
    with pytest.raises(OSError):
        cohort.members["h001"].open(total)


def full_disk(memory: Memory) -> None:
    raise OSError


def test_an_upload_that_could_not_be_written_down_is_not_sent_and_not_made_again():
    cohort = new_cohort(3, mode="pairwise")
    member = cohort.members["h000"]
    member.memory.keep = full_disk
    with pytest.raises(OSError):
        member.upload(cohort.call(), cohort.updates["h000"])
    member.memory.keep = lambda memory: None
    with pytest.raises(MaskingError, match="used up"):
        member.upload(cohort.call(), cohort.updates["h000"])


def test_a_reveal_that_could_not_be_written_down_is_not_sent_and_binds_all_the_same():
    cohort = new_cohort(5, mode="pairwise")
    server = ready(cohort, of=cohort.names)
    member = cohort.members["h000"]
    member.memory.keep = full_disk
    with pytest.raises(OSError):
        member.reveal(server.list_for("h000"))
    member.memory.keep = lambda memory: None
    message = server.list_for("h000")
    fewer = {name: message.listed[name] for name in cohort.names[:-1]}
    with pytest.raises(MaskingError, match="a second list"):
        member.reveal(replace(message, listed=fewer, shares={n: message.shares[n] for n in fewer}))


def test_an_update_that_is_refused_uses_nothing_up():
    cohort = new_cohort(3, mode="pairwise")
    before = cohort.members["h000"].memory.to_json()
    bad = {**cohort.updates["h000"].tensors, "bias": torch.full((7,), float("nan"))}
    with pytest.raises(MaskingError):
        cohort.members["h000"].upload(cohort.call(), replace(cohort.updates["h000"], tensors=bad))
    assert cohort.members["h000"].memory.to_json() == before


@pytest.mark.parametrize("mode", MODES)
def test_an_old_sum_is_not_taken_again(mode, monkeypatch):
    cohort = new_cohort(3, mode=mode)
    old = cohort.summed(cohort.call())
    member = cohort.members["h001"]
    for each in cohort.members.values():
        each.open(old)
    assert torch.equal(member.open(old).tensors["bias"], member.open(old).tensors["bias"])  # the last one
    new = cohort.summed(cohort.call(round=1))
    relabeled = [
        replace(old, call=new.call),
        replace(new, words=old.words),
        replace(old, call=new.call, model=new.model, transcript=new.transcript, listed=new.listed),
    ]
    for total in relabeled:
        with pytest.raises(MaskingError, match=r"tag does not fit|did not send"):
            member.open(total)
    member.open(new)
    with pytest.raises(MaskingError, match="past round"):
        member.open(old)
    monkeypatch.setattr("fedkl.masking.member.check_sequence", lambda *_: None)
    monkeypatch.setattr("fedkl.masking.member.check_own_entry", lambda *_, **__: None)
    assert member.open(old).samples == 303


def wrong_sums(cohort: Cohort) -> dict[str, SealedSum]:
    """A blind sum of all but one member, and what a server could make of the uploads beside."""
    server = cohort.server(cohort.call())
    uploads = cohort.uploads(cohort.call())
    for name in cohort.names[:-1]:
        server.offer(uploads[name])
    total, last = server.sealed(), cohort.names[-1]
    every = {**total.listed, last: uploads[last].nonce}
    return {
        "right": total,
        "left out": replace(total, listed=every),
        "added": changed(total, lambda words: add(words, uploads[last].words)),
        "doubled": changed(total, lambda words: add(words, uploads["h001"].words)),
        "exchanged": replace(
            changed(total, lambda words: add(words, uploads["h001"].words, sign=-1)),
            listed={name: nonce for name, nonce in total.listed.items() if name != "h002"},
        ),
        "a nonce of another upload": replace(total, listed={**total.listed, "h002": bytes(32)}),
    }


@pytest.mark.parametrize("masks", [True, False])
def test_a_sum_of_others_than_the_listed_is_refused(masks, monkeypatch):
    if not masks:
        no_masks(monkeypatch)
    cohort = new_cohort(5, mode="blind")
    sums = wrong_sums(cohort)
    right = sums.pop("right")
    for total in sums.values():
        with pytest.raises(MaskingError, match="its tag does not fit"):
            cohort.members["h000"].open(total)
    cohort.members["h000"].open(right)
    no_tags(monkeypatch)
    no_masks(monkeypatch)
    monkeypatch.setattr("fedkl.masking.member.check_own_entry", lambda *_, **__: None)  # it has sent nothing
    taken = {}
    for name, total in wrong_sums(new := new_cohort(5, mode="blind")).items():
        fresh = member_of(new.sealed, new.keys[0], new.layout)
        taken[name] = fresh.open(total).samples
    assert taken["doubled"] == taken["right"] + 101


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bit", [0, 63])
def test_one_word_that_was_changed_is_noticed(mode, bit, monkeypatch):
    cohort = new_cohort(3, mode=mode)
    total, member = cohort.summed(cohort.call()), cohort.members["h001"]

    def altered(place: int) -> SealedSum:
        words = total.words.copy()
        words[place:][:8].view("<u8")[:] += np.uint64(1 << bit)
        return replace(total, words=words)

    for place in (0, 8, 32, 40, 48, 56, -8, -16, -64):
        with pytest.raises(MaskingError, match="its tag does not fit"):
            member.open(altered(place))
    no_tags(monkeypatch)
    if bit == 0:  # a top bit is out of range as well
        member.open(altered(cohort.layout.head))
    else:
        with pytest.raises(MaskingError, match="beyond what its samples allow"):
            member.open(altered(cohort.layout.head))


def test_a_code_over_whole_numbers_lets_half_of_all_flips_of_a_top_bit_pass():
    """Why the tag is none: the control of the test above."""
    passed = 0
    for _ in range(400):
        key, word = secrets.randbits(64), secrets.randbits(64)
        passed += key * word % 2**64 == key * (word ^ 1 << 63) % 2**64
    assert 80 < passed < 320  # 12 standard deviations


def test_400_random_changes_are_refused():
    cohort = new_cohort(3, mode="blind")
    total, member = cohort.summed(cohort.call()), cohort.members["h001"]
    generator = np.random.default_rng(5)
    for _ in range(400):
        words = total.words.copy()
        begin = int(generator.integers(len(words)))
        piece = words[begin : begin + int(generator.integers(1, 40))]
        piece ^= generator.integers(1, 256, size=len(piece), dtype=np.uint8)
        with pytest.raises(MaskingError, match="its tag does not fit"):
            member.open(replace(total, words=words))
    member.open(total)


@pytest.mark.parametrize("bits", [64, 32])
def test_honest_extreme_sums_are_never_refused(bits):
    """A tag that is right but for a chance would stop trainings."""
    cohort = new_cohort(4, mode="blind", bits=bits, max_samples=4096)
    layout, limit = cohort.layout, {64: 1024.0, 32: 8.0}[bits]
    generator = torch.Generator().manual_seed(3)
    for trial in range(60):
        r, pads = secrets.token_bytes(16), [secrets.token_bytes(32) for _ in range(4)]
        server = MaskedSum(cohort.call(), layout=layout, mode="blind", minimum=3)
        for name, pad in zip(cohort.names, pads, strict=True):
            signs = torch.sign(torch.rand(40, 11, generator=generator) - (trial % 3) / 2) * limit
            tensors = {**drawn(0), "weight": signs}
            given = Contribution(tensors=tensors, samples=4096, metrics={"loss": 2.0**13})
            words = encoded(layout, given, masks=Masks(), tag_key=(r, pad))
            about = dict.fromkeys(("context", "model", "transcript", "nonce"), bytes(32))
            server.offer(Upload(member=name, words=words, **about))
        words, opening = server.sealed().words, Opening(layout, r=r)
        unmasked(layout, words, masks=Masks(), on_chunk=opening.chunk)
        assert opening.holds(pads)
        decoded(layout, words, members=4, booleans=drawn(0))


def ready(cohort: Cohort, *, of: Sequence[str]) -> MaskedSum:
    """A server with uploads of some members."""
    server = cohort.server(cohort.call())
    for upload in cohort.uploads(cohort.call(), of=of).values():
        server.offer(upload)
    return server


def test_a_late_upload_stays_closed():
    cohort = new_cohort(5, mode="pairwise")
    server = ready(cohort, of=cohort.names[:-1])
    late = cohort.members["h004"].upload(cohort.call(), cohort.updates["h004"])
    reveals = [cohort.members[name].reveal(server.list_for(name)) for name in server.listed]
    assert not any("h004" in reveal.shares for reveal in reveals)
    with pytest.raises(MaskingError, match="too late"):
        server.offer(late)
    words = late.words.copy()
    pairs = [MaskStream(reveal.pairs["h004"]) for reveal in reveals]
    unmasked(cohort.layout, words, masks=Masks(plus=pairs))  # h004 took them away: it sorts last
    assert abs(nonuniformity([words])) < 12
    # The control: its own seed, had there been shares of it.
    member = cohort.members["h004"]
    context = member._current(cohort.call(), member.memory.runs[RUN.hex()])
    seed = member._keyring.self_seed(context, late.nonce)
    unmasked(cohort.layout, words, masks=Masks(minus=[self_mask(seed)]))
    read = decoded(cohort.layout, words, members=1, booleans=drawn(0))
    assert torch.allclose(read.tensors["weight"], cohort.updates["h004"].tensors["weight"], atol=1e-7)


def test_of_each_member_a_share_or_a_pair_seed_and_never_both():
    """Both would open one upload: its own mask, and the masks between it and the others."""
    cohort = new_cohort(5, mode="pairwise")
    server = ready(cohort, of=cohort.names[:-1])
    for name in server.listed:
        reveal = cohort.members[name].reveal(server.list_for(name))
        assert set(reveal.shares) == set(server.listed)
        assert set(reveal.pairs) == {"h004"}


def test_a_member_that_was_shown_another_model_reveals_nothing(monkeypatch):
    def shown_another() -> tuple[Cohort, MaskedSum]:
        cohort = new_cohort(4, mode="pairwise", accept=False)
        for name, member in cohort.members.items():
            member.accept_model(RUN, drawn(2000 if name == "h000" else 1000))
        uploads = cohort.uploads(cohort.call())
        first = uploads["h001"]
        server = cohort.server(cohort.call())
        for upload in uploads.values():  # the server helps: it says that all are alike
            server.offer(replace(upload, context=first.context, model=first.model))
        return cohort, server

    cohort, server = shown_another()
    for name in ("h000", "h001"):
        with pytest.raises(MaskingError, match="was altered"):
            cohort.members[name].reveal(server.list_for(name))
    monkeypatch.setattr("fedkl.masking.member.model_digest", lambda *_: bytes(32))
    cohort, server = shown_another()
    for name in cohort.names:
        server.offer_reveal(cohort.members[name].reveal(server.list_for(name)))
    assert opened_mean(server.sealed(), layout=cohort.layout, booleans=drawn(0)).samples == 406


def needs(monkeypatch: pytest.MonkeyPatch, least: Callable[[int], int]) -> None:
    """Lets lists of fewer do, and as few shares."""

    def of_these(cohort: Sequence[str], *, minimum: int) -> int:
        return least(len(cohort))

    for module in ("member", "keyring", "server"):
        monkeypatch.setattr(f"fedkl.masking.{module}.least_listed", of_these)


def read_with_a_list_for_each(cohort: Cohort, *, of: int, spare: int) -> Mean | None:
    """What a server alone reads that shows each member another list: the sum of the first so many members.

    Each pair of one of these and another member is left out of one of both lists: who is shown the list
    reveals the pair's seed. Everyone else gives a share of the mask of each of the first.

    Args:
        cohort: Its members.
        of: How many.
        spare: How many may be missing in a list.

    Returns:
        None where that leaves out more than may be missing, or too few shares.
    """
    names, call = cohort.names, cohort.call()
    wanted, others = names[:of], names[of:]
    left_out = {
        name: {others[(place * spare + step) % len(others)] for step in range(min(spare, len(others)))}
        for place, name in enumerate(wanted)
    }
    left_out |= {other: {name for name in wanted if other not in left_out[name]} for other in others}
    if max(map(len, left_out.values())) > spare:
        return None
    uploads, reveals = cohort.uploads(call), {}
    for name in names:
        listed = {each: uploads[each].nonce for each in names if each not in left_out[name]}
        shares = {each: uploads[each].shares[name] for each in listed}
        message = ListMessage(call=call, listed=listed, shares=shares)
        reveals[name] = cohort.members[name].reveal(message)
    plus, minus, total = [], [], None
    for name in wanted:
        held = {place: reveals[each].shares.get(name) for place, each in enumerate(names, start=1)}
        seed = sharing.join({place: share for place, share in held.items() if share is not None})
        if self_commitment(seed) != uploads[name].commitment:
            return None
        minus.append(self_mask(seed))
        for other in others:
            pair = reveals[name].pairs.get(other) or reveals[other].pairs[name]
            (minus if name < other else plus).append(MaskStream(pair))
        total = uploads[name].words.copy() if total is None else total
        if name != wanted[0]:
            add(total, uploads[name].words)
    unmasked(cohort.layout, total, masks=Masks(plus=plus, minus=minus))
    return decoded(cohort.layout, total, members=of, booleans=drawn(0))


@pytest.mark.parametrize(("members", "minimum", "before"), [(4, 3, 2), (10, 7, 4), (20, 10, 8)])
def test_a_server_that_shows_every_member_another_list_learns_no_sum_of_fewer(
    members, minimum, before, monkeypatch
):
    def smallest(least: int) -> tuple[int, Mean]:
        for of in range(1, members):
            fresh = new_cohort(members, mode="pairwise", minimum=minimum)
            found = read_with_a_list_for_each(fresh, of=of, spare=members - least)
            if found is not None:
                return of, found
        return members, pairwise_sum(fresh, fresh.call(round=1), of=fresh.names)

    cohort = new_cohort(members, mode="pairwise", minimum=minimum)
    of, _ = smallest(least_listed(cohort.names, minimum=minimum))
    assert of >= minimum
    needs(monkeypatch, lambda count: 2 * count // 3 + 1)  # the control: two thirds, as until 1 December 2026
    of, mean = smallest(2 * members // 3 + 1)
    assert of == before < minimum
    expected = cohort.expected("weight", of=cohort.names[:of])
    assert (mean.tensors["weight"].double() - expected).abs().max() < 1e-6


def test_who_has_revealed_uploads_in_that_round_for_the_same_members_only():
    """A server that says they are gone would get the sum of the others, too."""
    cohort = new_cohort(9, mode="pairwise")
    pairwise_sum(cohort, cohort.call(), of=cohort.names)
    again = cohort.call(attempt=1, cohort=cohort.names[:-1])
    with pytest.raises(MaskingError, match="has revealed for other members than are asked now"):
        cohort.uploads(again, of=["h000"])
    cohort.uploads(cohort.call(attempt=1), of=["h000"])


def halves(cohort: Cohort) -> list[Mean]:
    """Two sums of one round: each half of the members is told that the other has gone."""
    call, uploads, means = cohort.call(), cohort.uploads(cohort.call()), []
    for half in (cohort.names[:3], cohort.names[3:]):
        server = MaskedSum(call, layout=cohort.layout, mode="pairwise", minimum=3)
        for name in half:
            server.offer(uploads[name])
        for name in half:
            shares = {owner: uploads[owner].shares[name] for owner in half}
            listed = {owner: uploads[owner].nonce for owner in half}
            reveal = cohort.members[name].reveal(ListMessage(call=call, listed=listed, shares=shares))
            server.offer_reveal(reveal)
        means.append(opened_mean(server.sealed(), layout=cohort.layout, booleans=drawn(0)))
    return means


def test_one_round_has_one_sum(monkeypatch):
    with pytest.raises(MaskingError, match="has 3 names, expected 5"):
        halves(new_cohort(6, mode="pairwise"))
    needs(monkeypatch, lambda count: count // 2)
    assert [mean.samples for mean in halves(new_cohort(6, mode="pairwise"))] == [303, 312]


def test_sets_that_differ_by_one_member_give_its_update_away_and_are_refused():
    cohort = new_cohort(5, mode="pairwise")
    whole = pairwise_sum(cohort, cohort.call(), of=cohort.names)
    with pytest.raises(MaskingError, match="on this model this member has revealed for other members"):
        pairwise_sum(cohort, cohort.call(round=1), of=cohort.names[:-1])
    for name, keys in zip(cohort.names, cohort.keys, strict=True):  # the control: all have forgotten
        cohort.members[name] = member_of(cohort.sealed, keys, cohort.layout)
        cohort.members[name].accept_model(RUN, drawn(1000))
    samples, weight = difference(whole, pairwise_sum(cohort, cohort.call(round=1), of=cohort.names[:-1]))
    assert samples == 104
    assert (weight - cohort.updates["h004"].tensors["weight"]).abs().max() < 1e-6


def test_the_same_names_may_be_revealed_for_again():
    """A reply that got lost, and a round that is asked for again on the same model."""
    cohort = new_cohort(4, mode="pairwise")
    server = ready(cohort, of=cohort.names)
    message = server.list_for("h001")
    first, again = (cohort.members["h001"].reveal(message) for _ in range(2))
    assert first == again
    pairwise_sum(cohort, cohort.call(round=1), of=cohort.names)


def test_a_false_share_is_noticed_by_the_server(monkeypatch):
    cohort = new_cohort(4, mode="pairwise")
    server = ready(cohort, of=cohort.names)
    for name in cohort.names:
        reveal = cohort.members[name].reveal(server.list_for(name))
        if name == "h002":
            reveal = Reveal(member=name, shares={**reveal.shares, "h000": bytes(32)}, pairs=reveal.pairs)
        server.offer_reveal(reveal)
    with pytest.raises(MaskingError, match="false"):
        server.sealed()


# What does not hold, as docs/masked.md says.


def test_a_member_may_lie_about_its_samples_and_poison_within_the_bounds_and_not_beyond():
    cohort = new_cohort(3, mode="blind", max_samples=200)
    honest = cohort.updates["h000"]
    far = {**honest.tensors, "bias": torch.full((7,), 1024.0)}
    cohort.updates["h000"] = replace(honest, tensors=far, samples=200)
    mean = cohort.members["h001"].open(cohort.summed(cohort.call()))
    assert mean.samples == 200 + 101 + 102
    assert (mean.tensors["bias"] > 400).all()
    for beyond in (replace(honest, samples=201), replace(honest, tensors={**far, "bias": far["bias"] * 2})):
        with pytest.raises(MaskingError, match=r"expected 1 to 200 samples|beyond ±1024"):
            cohort.members["h000"].upload(cohort.call(), beyond)


def test_one_member_can_stop_a_round_and_nobody_learns_which(monkeypatch):
    """Whoever gives another tag, or other words than it tagged, spoils the sum of all."""
    cohort = new_cohort(4, mode="both")
    keyring = cohort.members["h002"]._keyring
    monkeypatch.setattr(keyring, "tag_key", lambda *_: (bytes(16), bytes(32)))
    total = cohort.summed(cohort.call())
    for member in cohort.members.values():
        with pytest.raises(MaskingError, match="its tag does not fit") as caught:
            member.open(total)
        assert not any(name in str(caught.value) for name in cohort.names)


def test_blind_two_honest_subsets_are_both_taken_and_noticed_one_round_later():
    cohort = new_cohort(6, mode="blind")
    uploads = cohort.uploads(cohort.call())
    for part, names in ((cohort.names[:4], ("h000", "h001")), (cohort.names[1:], ("h004", "h005"))):
        server = cohort.server(cohort.call())
        for name in part:
            server.offer(uploads[name])
        total = server.sealed()
        for name in names:
            cohort.members[name].open(total)
    later = cohort.call(round=1)
    server = cohort.server(later)
    server.offer(cohort.members["h000"].upload(later, cohort.updates["h000"]))
    other = cohort.members["h005"].upload(later, cohort.updates["h005"])
    with pytest.raises(MaskingError, match="another roster, model or history"):
        server.offer(other)


def test_blind_ends_with_one_member_who_works_with_the_server():
    cohort = new_cohort(3, mode="blind")
    upload = cohort.uploads(cohort.call())["h000"]
    colluder = cohort.members["h002"]
    context = colluder._current(cohort.call(), colluder.memory.runs[RUN.hex()])
    mask = colluder._keyring.blind_mask(context, "h000", upload.nonce)
    words = upload.words.copy()
    unmasked(cohort.layout, words, masks=Masks(minus=[mask]))
    read = decoded(cohort.layout, words, members=1, booleans=drawn(0))
    assert torch.allclose(read.tensors["weight"], cohort.updates["h000"].tensors["weight"], atol=1e-7)


def test_pairwise_one_member_who_works_with_the_server_reads_no_upload():
    """It has K and its own pair seeds; the masks between the others are not among them."""
    cohort = new_cohort(4, mode="both")
    upload = cohort.uploads(cohort.call())["h000"]
    colluder = cohort.members["h003"]
    context = colluder._current(cohort.call(), colluder.memory.runs[RUN.hex()])
    keyring, words = colluder._keyring, upload.words.copy()
    known = [
        keyring.blind_mask(context, "h000", upload.nonce),
        MaskStream(keyring.pair_seed(context, "h000")),
    ]
    unmasked(cohort.layout, words, masks=Masks(minus=known))
    assert abs(nonuniformity([words])) < 12


def test_minimum_3_and_two_members_who_work_with_the_server_read_the_third():
    cohort = new_cohort(3, mode="pairwise")
    mean = pairwise_sum(cohort, cohort.call(), of=cohort.names)
    rest = mean.tensors["weight"].double() * mean.samples
    for name in ("h001", "h002"):
        rest -= cohort.updates[name].tensors["weight"].double() * cohort.updates[name].samples
    assert (rest / 100 - cohort.updates["h000"].tensors["weight"]).abs().max() < 1e-6


def test_a_further_attempt_may_ask_few_without_a_first_one():
    """The server says who has gone: only the minimum bounds how few it may ask."""
    cohort = new_cohort(9, mode="pairwise")
    few = cohort.call(attempt=1, cohort=cohort.names[:3])
    assert pairwise_sum(cohort, few, of=few.cohort).samples == 303
    with pytest.raises(MaskingError, match="expected 3 or more"):
        cohort.members["h000"].upload(
            replace(few, attempt=2, cohort=cohort.names[:2]), cohort.updates["h000"]
        )
