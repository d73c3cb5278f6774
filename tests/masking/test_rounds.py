"""Whole rounds: what comes out is the weighted mean, and every member gets the same."""

from __future__ import annotations

from dataclasses import replace
from itertools import islice

import pytest
import torch

from fedkl.errors import MaskingError
from fedkl.masking import MaskedSum
from fedkl.masking.server import _choices
from tests.masking.cohorts import Cohort, new_cohort

MODES = ("blind", "pairwise", "both")


def check(cohort: Cohort, call_round: int, *, of: tuple[str, ...] | None = None) -> None:
    """One round, compared with the mean in the clear."""
    total = cohort.summed(cohort.call(round=call_round), of=of)
    came = total.words.copy()
    means = [member.open(total) for member in cohort.members.values()]
    for name in ("weight", "bias"):
        error = (means[0].tensors[name].double() - cohort.expected(name, of=of)).abs().max()
        assert error <= 2.0**-21 / 100 + 2.0**-25  # the encoding's bound, then float32's rounding below 1
        assert all(torch.equal(mean.tensors[name], means[0].tensors[name]) for mean in means)
    assert (total.words == came).all()  # it is the caller's
    assert means[0].tensors["batches"] == 5
    assert means[0].tensors["flag"].tolist() == [True, False]
    updates = [cohort.updates[name] for name in of or cohort.names]
    samples = sum(update.samples for update in updates)
    loss = sum(update.metrics["loss"] * update.samples for update in updates) / samples
    assert means[0].samples == samples
    assert means[0].metrics["loss"] == pytest.approx(loss, abs=2.0**-20)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [3, 5, 10])
def test_sums_are_means(mode: str, size: int) -> None:
    cohort = new_cohort(size, mode=mode)
    for number in range(2):
        cohort.train(seed=100 * number)
        check(cohort, number)


@pytest.mark.parametrize("mode", MODES)
def test_members_that_are_gone_before_they_upload(mode: str) -> None:
    cohort = new_cohort(5, mode=mode)
    check(cohort, 0, of=cohort.names[:-1])
    cohort.train(seed=50)
    check(cohort, 1)


def test_in_a_large_cohort_too_each_has_a_mask_with_each() -> None:
    """With some only, a server that shows every member another list reads single updates."""
    cohort = new_cohort(70, mode="both")
    call = cohort.call()
    assert set(cohort.uploads(call, of=["h000"])["h000"].shares) == set(cohort.names)


def test_a_large_cohort_adds_up() -> None:
    cohort = new_cohort(70, mode="pairwise")
    check(cohort, 0, of=cohort.names[:-2])


def test_short_words_round_more() -> None:
    cohort = new_cohort(5, mode="blind", bits=32, max_samples=4096)
    total = cohort.summed(cohort.call())
    mean = cohort.members["h002"].open(total)
    error = (mean.tensors["weight"].double() - cohort.expected("weight")).abs().max()
    assert 0 < error <= 2.0**-14 / 100 + 2.0**-25
    assert len(total.words) < 0.6 * new_cohort(5).layout.size


def test_a_round_is_tried_again_without_a_member_that_went_after_its_upload() -> None:
    """h004 is not listed, and h003 goes before it reveals its pair seed with it."""
    cohort = new_cohort(6, mode="pairwise")
    call = cohort.call()
    server = cohort.server(call)
    for upload in cohort.uploads(call, of=[n for n in cohort.names if n != "h004"]).values():
        server.offer(upload)
    left = [name for name in server.listed if name != "h003"]
    assert [problem.partition(":")[0] for problem in server.missing]
    again = cohort.call(attempt=1, cohort=left)
    total = cohort.summed(again)
    assert list(total.listed) == left
    for name in cohort.names:
        cohort.members[name].open(total)


def test_a_sum_that_a_false_share_stopped_is_opened_with_the_right_one():
    cohort = new_cohort(4, mode="pairwise")
    server = cohort.server(cohort.call())
    for upload in cohort.uploads(cohort.call()).values():
        server.offer(upload)
    reveals = {name: cohort.members[name].reveal(server.list_for(name)) for name in cohort.names}
    for reveal in reveals.values():
        server.offer_reveal(reveal)
    right = reveals["h000"]
    server.offer_reveal(replace(right, shares={**right.shares, "h001": bytes(32)}))
    with pytest.raises(MaskingError, match="a share of h001's seed is false"):
        server.sealed()
    server.offer_reveal(right)
    assert cohort.members["h002"].open(server.sealed()).samples == 100 + 101 + 102 + 103
    with pytest.raises(MaskingError, match="given once"):
        server.sealed()


FALSE = {"zero": bytes(32), "no number of the field": b"\xff" * 32, "another member's": None}


@pytest.mark.parametrize("false", FALSE)
@pytest.mark.parametrize("liars", [["h001"], ["h000", "h006"], ["h002", "h003", "h007"]], ids=len)
def test_false_shares_are_found_and_left_out(false: str, liars: list[str]) -> None:
    """Ten members, of whom seven are needed: the seed's commitment tells the right ones, and so the liars."""
    cohort = new_cohort(10, mode="both")
    server = all_uploaded(cohort)
    for name in cohort.names:
        reveal = cohort.members[name].reveal(server.list_for(name))
        lie = {"h004": FALSE[false] or reveal.shares["h005"]}
        server.offer_reveal(replace(reveal, shares={**reveal.shares, **lie}) if name in liars else reveal)
    mean = cohort.members["h002"].open(server.sealed())
    assert float((mean.tensors["weight"].double() - cohort.expected("weight")).abs().max()) < 1e-6
    assert server.false_shares == {holder: ["h004"] for holder in liars}


def all_uploaded(cohort: Cohort) -> MaskedSum:
    """An attempt with the uploads of all."""
    server = cohort.server(cohort.call())
    for upload in cohort.uploads(cohort.call()).values():
        server.offer(upload)
    return server


def test_more_false_shares_than_right_ones_can_spare_lose_the_round() -> None:
    cohort = new_cohort(10, mode="pairwise")
    server = all_uploaded(cohort)
    for name in cohort.names:
        reveal = cohort.members[name].reveal(server.list_for(name))
        lie = {**reveal.shares, "h004": bytes(32)}
        server.offer_reveal(replace(reveal, shares=lie) if name > "h005" else reveal)
    with pytest.raises(MaskingError, match=r"h004's seed is false; .* 10 came, 7 right ones are needed"):
        server.sealed()
    assert not server.false_shares


def test_looking_for_false_shares_has_an_end() -> None:
    """Every choice of 40 of 60 would take longer than anybody waits."""
    holders = [f"h{place:03}" for place in range(60)]
    found = list(islice(_choices(holders, 40), 20_000))
    assert len(found) == 1 + 41 + 42 * 41 // 2 + 43 * 42 * 41 // 6
    assert {len(choice) for choice in found} == {40}
    assert list(_choices(holders[:40], 40)) == [holders[:40]]
    assert len(list(_choices(holders * 17, 667))) == 1


@pytest.mark.parametrize("taken", [0, 1])
def test_with_blind_masks_a_member_may_be_asked_again_and_takes_a_sum_with_either_upload(taken: int) -> None:
    cohort = new_cohort(3, mode="blind")
    call = cohort.call()
    twice = [cohort.uploads(call, of=["h000"])["h000"] for _ in range(2)]
    assert twice[0].nonce != twice[1].nonce
    server = cohort.server(call)
    for upload in (twice[taken], *cohort.uploads(call, of=["h001", "h002"]).values()):
        server.offer(upload)
    total = server.sealed()
    means = [member.open(total) for member in cohort.members.values()]
    assert all(torch.equal(mean.tensors["weight"], means[0].tensors["weight"]) for mean in means)


@pytest.mark.parametrize("mode", MODES)
def test_a_sum_can_be_read_without_being_taken(mode: str) -> None:
    cohort = new_cohort(3, mode=mode)
    total = cohort.summed(cohort.call())
    member = cohort.members["h001"]
    before = member.memory.to_json()
    read = member.read(total)
    assert member.memory.to_json() == before
    assert torch.equal(read.tensors["weight"], member.open(total).tensors["weight"])
    total.words[50] ^= 1
    with pytest.raises(MaskingError, match="its tag does not fit"):
        member.read(total)
