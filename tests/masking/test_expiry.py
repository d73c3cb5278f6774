"""What expires soon is announced: in the node's log once a day, and by the commands that show it."""

from __future__ import annotations

import sys
from datetime import timedelta

import pytest

from fedkl.masking import MemberKeys, Rules, new_roster
from fedkl.masking.expiry import FINISH_FIRST, card_notice, notices
from tests.masking.cohorts import TODAY


@pytest.fixture(scope="module")
def roster():
    keys = [MemberKeys.new(name, today=TODAY) for name in ("a", "b", "c")]
    cards = [each.card() for each in keys]
    return new_roster(name="study", cards=cards, rules=Rules(), signer=keys[0], today=TODAY).roster


@pytest.mark.parametrize(
    ("left", "told"), [(15, False), (14, True), (1, True), (0, True), (-1, False)], ids=lambda each: str(each)
)
def test_a_roster_from_14_days_before_its_last(roster, left, told):
    found = notices(roster, today=roster.expires - timedelta(days=left))
    assert bool(found) == told
    if told:
        (text,) = found
        assert str(roster.expires) in text
        assert "fedkl cohort change study.cohort" in text
        assert FINISH_FIRST in text


@pytest.mark.parametrize(("left", "told"), [(31, False), (30, True), (0, True), (-1, False)])
def test_a_card_from_30_days_before_its_last(roster, left, told):
    card = roster.cards[1]
    text = card_notice(card, today=card.expires - timedelta(days=left))
    assert bool(text) == told
    if text:
        assert f"in {left} days" in text or "today" in text
        assert "fedkl member new b" in text
        assert "--remove b --add b.member" in text
        assert FINISH_FIRST in text


def test_every_card_of_a_cohort_is_told_of(roster):
    found = notices(roster, today=roster.cards[0].expires - timedelta(days=20))
    assert [text[0] for text in found] == ["a", "b", "c"]  # the roster itself has expired, which is refused


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Flower needs Python 3.11")
def test_a_node_says_so_once_a_day(tmp_path, monkeypatch, caplog):
    from fedkl.flower import node_member
    from tests.flower.cohorts import PASSPHRASE, cohort

    folder = cohort(tmp_path / "members")
    monkeypatch.setenv("FEDKL_PASSPHRASE", PASSPHRASE)
    config = {"fedkl-member": str(folder / "client-0.secret")}

    def said(left):
        caplog.clear()
        with node_member.NodeMember.of_node(config) as node:
            day = node._membership.roster.expires - timedelta(days=left)
        monkeypatch.setattr(node_member, "today", lambda: day)
        for _ in range(3):
            with node_member.NodeMember.of_node(config):
                pass
        return [record.message for record in caplog.records if record.name == "flwr.fedkl"]

    assert said(15) == []
    assert len(said(14)) == 1
    (text,) = said(13)
    assert text.startswith("Cohort study expires in 13 days")
