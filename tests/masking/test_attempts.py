"""What a server does next: reveals are asked for only where they open the sum, and for the same members."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest

from fedkl.errors import MaskingError
from fedkl.masking import Call, MaskedSum
from fedkl.masking.attempts import RevealSets, further_attempt
from tests.masking.cohorts import Cohort, drawn, new_cohort


def uploaded(cohort: Cohort, call: Call, *, of: Sequence[str]) -> MaskedSum:
    """An attempt with uploads of these members."""
    server = cohort.server(call)
    for upload in cohort.uploads(call, of=of).values():
        server.offer(upload)
    return server


def asked(cohort: Cohort, server: MaskedSum, *, sets: RevealSets, of: Sequence[str]) -> None:
    """Notes who is listed, and takes what these members reveal."""
    sets.add(server.model, server.listed)
    for name in of:
        server.offer_reveal(cohort.members[name].reveal(server.list_for(name)))


def revealed_in_vain(cohort: Cohort) -> RevealSets:
    """Of five the last one was away, and the last but one went before it revealed."""
    sets, names = RevealSets(), cohort.names
    server = uploaded(cohort, cohort.call(), of=names[:4])
    assert further_attempt(server, here=names[:4], sets=sets) is None
    asked(cohort, server, sets=sets, of=names[:3])
    assert server.missing
    return sets


@pytest.mark.parametrize(("members", "left"), [(4, 3), (5, 3), (10, 5)])
def test_too_few_for_a_list_are_enough_for_a_cohort_of_their_own(members: int, left: int) -> None:
    cohort = new_cohort(members, mode="both", minimum=3)
    names, sets = cohort.names[:left], RevealSets()
    server = uploaded(cohort, cohort.call(), of=names)
    assert left < server.needed
    assert further_attempt(server, here=names, sets=sets) == names
    again = uploaded(cohort, cohort.call(attempt=1, cohort=names), of=names)
    assert further_attempt(again, here=names, sets=sets) is None
    asked(cohort, again, sets=sets, of=names)
    assert cohort.members[names[0]].open(again.sealed()).samples == sum(
        cohort.updates[name].samples for name in names
    )
    fewer = uploaded(new_cohort(members, mode="both"), cohort.call(), of=names[:2])
    with pytest.raises(MaskingError, match="nobody was asked to reveal"):
        further_attempt(fewer, here=names[:2], sets=RevealSets())


def test_after_reveals_in_vain_the_same_members_make_the_sum() -> None:
    cohort = new_cohort(5, mode="pairwise")
    sets, names = revealed_in_vain(cohort), cohort.names
    server = uploaded(cohort, cohort.call(round=1), of=names)
    assert further_attempt(server, here=names, sets=sets) == names[:4]
    again = uploaded(cohort, cohort.call(round=1, attempt=1, cohort=names[:4]), of=names[:4])
    assert further_attempt(again, here=names[:4], sets=sets) is None
    asked(cohort, again, sets=sets, of=names[:4])
    total = again.sealed()
    for member in cohort.members.values():
        mean = member.open(total)
        expected = cohort.expected("weight", of=names[:4])
        assert float((mean.tensors["weight"].double() - expected).abs().max()) < 1e-6
    after = uploaded(cohort, cohort.call(round=2), of=names)
    assert further_attempt(after, here=names, sets=sets) is None  # another model


def test_the_same_members_alone_need_no_further_attempt() -> None:
    cohort = new_cohort(5, mode="both")
    sets, names = revealed_in_vain(cohort), cohort.names
    server = uploaded(cohort, cohort.call(round=1), of=names[:4])
    assert further_attempt(server, here=names[:4], sets=sets) is None
    asked(cohort, server, sets=sets, of=names[:4])
    assert not server.missing


def test_while_one_of_them_is_away_nobody_reveals() -> None:
    """With others in its place no list finds enough members ever again."""
    cohort = new_cohort(5, mode="both")
    sets, names = revealed_in_vain(cohort), cohort.names
    left = [name for name in names if name != "h003"]
    server = uploaded(cohort, cohort.call(round=1), of=left)
    with pytest.raises(MaskingError, match=r"nobody was asked to reveal.\n  - asked .*: 4; not here: h003\n"):
        further_attempt(server, here=left, sets=sets)
    assert not cohort.members["h004"].memory.sets
    server = uploaded(cohort, cohort.call(round=2), of=names)  # it comes back, and goes after its upload
    with pytest.raises(MaskingError, match="not here: h003"):
        further_attempt(server, here=left, sets=sets)


def test_members_who_were_not_asked_make_a_sum_if_they_are_enough_without_the_others() -> None:
    cohort = new_cohort(10, mode="pairwise", sampled=True)
    names, sets = cohort.names, RevealSets()
    first = uploaded(cohort, cohort.call(cohort=names[:4]), of=names[:4])
    asked(cohort, first, sets=sets, of=names[:2])
    call = cohort.call(round=1, cohort=names[2:])  # two of those who were asked are in it
    server = uploaded(cohort, call, of=names[2:])
    assert further_attempt(server, here=names[2:], sets=sets) == names[4:]
    again = uploaded(cohort, cohort.call(round=1, attempt=1, cohort=names[4:]), of=names[4:])
    assert further_attempt(again, here=names[4:], sets=sets) is None
    asked(cohort, again, sets=sets, of=names[4:])
    assert not again.missing
    third = cohort.call(round=2, cohort=names[1:9])  # of the eight five were not asked in the first round
    fewer = RevealSets()
    fewer.add(first.model, names[:4])
    server = uploaded(new_cohort(10, mode="pairwise", sampled=True), third, of=names[1:9])
    with pytest.raises(MaskingError, match="nobody was asked to reveal"):
        further_attempt(server, here=names[1:9], sets=fewer)


def test_reveals_are_not_asked_for_where_they_cannot_open_the_sum() -> None:
    """h004 is not listed, two go after their uploads, and two cannot make a sum."""
    cohort = new_cohort(5, mode="pairwise")
    server = uploaded(cohort, cohort.call(), of=cohort.names[:4])
    with pytest.raises(MaskingError, match=r"nobody was asked to reveal.\n  - h000: 2 shares of 4\n"):
        further_attempt(server, here=cohort.names[:2], sets=RevealSets())
    everybody = uploaded(cohort, cohort.call(round=1), of=cohort.names)
    with pytest.raises(MaskingError, match="2 shares of 4"):
        further_attempt(everybody, here=cohort.names[:2], sets=RevealSets())
    assert further_attempt(everybody, here=cohort.names[:4], sets=RevealSets()) is None
    assert further_attempt(everybody, here=cohort.names[1:4], sets=RevealSets()) == cohort.names[1:4]


@pytest.mark.parametrize("listed", [7, 8, 10])
@pytest.mark.parametrize("here", [6, 7, 8, 10])
def test_what_will_be_missing_is_known_before_anybody_reveals(listed: int, here: int) -> None:
    cohort = new_cohort(10, mode="pairwise")
    server = uploaded(cohort, cohort.call(), of=cohort.names[:listed])
    left = cohort.names[: min(here, listed)]
    expected = server.missing_if(left)
    for name in left:
        server.offer_reveal(cohort.members[name].reveal(server.list_for(name)))
    assert server.missing == expected
    assert bool(expected) == (here < 7 or here < listed < 10)


def test_whom_members_were_asked_to_reveal_for_is_kept_as_text() -> None:
    kept = []
    sets = RevealSets(keep=lambda sets: kept.append(sets.to_json()))
    sets.add(bytes(32), ["h000", "h001"])
    sets.add(bytes(32), ["h000", "h001"])
    sets.add(bytes(32), ["h002", "h003"])
    assert [len(each) for each in kept] == [1, 2]
    again = RevealSets.from_json(kept[-1])
    assert again.on(bytes(32)) == [("h000", "h001"), ("h002", "h003")]
    assert not again.on(bytes([1] * 32))
    for number in range(40):  # those of models long ago are forgotten
        again.add(bytes([number] * 32), ["h000"])
    assert len(again.to_json()) == 16
    assert again.on(bytes([39] * 32)) == [("h000",)]


@pytest.mark.parametrize(
    "values",
    [3, {"a": 1}, [3], [{"model": "00"}], [{"model": "x", "names": []}], [{"model": "", "names": [1]}]],
)
def test_a_damaged_text_of_them_is_refused(values: object) -> None:
    with pytest.raises(ValueError, match="no sets of names"):
        RevealSets.from_json(values)


def test_members_refuse_what_the_server_does_not_ask_for() -> None:
    """The control: without these sets a server would ask for other names, and lose the round."""
    cohort = new_cohort(5, mode="both")
    revealed_in_vain(cohort)
    server = uploaded(cohort, cohort.call(round=1), of=cohort.names)
    assert further_attempt(server, here=cohort.names, sets=RevealSets()) is None
    with pytest.raises(MaskingError, match="has revealed for other members already"):
        cohort.members["h000"].reveal(server.list_for("h000"))


def test_a_new_run_without_one_of_the_members_needs_other_initial_weights() -> None:
    """Members know models across runs: a new run on the same ones has to wait, too."""
    cohort = new_cohort(5, mode="both")
    left = cohort.names[:4]
    assert cohort.summed(cohort.call()).listed
    for number, seed in ((1, 1000), (2, 1001)):
        run = bytes([number] * 16)
        for name in left:
            cohort.members[name].accept_model(run, drawn(seed))
        server = uploaded(cohort, replace(cohort.call(), run=run), of=left)
        if seed == 1000:
            with pytest.raises(MaskingError, match="needs a new run with other initial weights"):
                cohort.members["h000"].reveal(server.list_for("h000"))
        else:
            asked(cohort, server, sets=RevealSets(), of=left)
            assert len(server.sealed().listed) == 4
