"""Cards and rosters that expire soon: said before it ends a training."""

from __future__ import annotations

from datetime import date

from fedkl.masking.cards import MemberCard
from fedkl.masking.roster import Roster

CARD_NOTICE_DAYS, ROSTER_NOTICE_DAYS = 30, 14
"""From so many days before its last one."""

FINISH_FIRST = (
    "Finish a running training first, and export its model with `fedkl export`: who has joined a changed "
    "cohort cannot open the sums of the one before."
)
"""What a change in the middle of a training costs."""


def card_notice(card: MemberCard, *, today: date) -> str | None:
    """What to say of a card that expires soon; None: it does not, or has expired, which is refused anyway.

    Args:
        card: The card.
        today: The date.
    """
    days = (card.expires - today).days
    if not 0 <= days <= CARD_NOTICE_DAYS:
        return None
    return (
        f"{card.name}'s card expires {_in(days)}, on {card.expires}. {card.name}: run `fedkl member new "
        f"{card.name}` in a new folder, and send the new card to a member of each cohort. That member runs "
        f"`fedkl cohort change NAME.cohort --remove {card.name} --add {card.name}.member`. {FINISH_FIRST}"
    )


def notices(roster: Roster, *, today: date) -> list[str]:
    """What to say of a roster, and of the cards on it, that expire soon.

    Args:
        roster: The roster.
        today: The date.
    """
    days = (roster.expires - today).days
    found = [card_notice(card, today=today) for card in roster.cards]
    if 0 <= days <= ROSTER_NOTICE_DAYS:
        found.append(
            f"Cohort {roster.name} expires {_in(days)}, on {roster.expires}. One member: run `fedkl cohort "
            f"change {roster.name}.cohort`, and send the file to all; each joins it with `fedkl cohort "
            f"join`. {FINISH_FIRST}"
        )
    return [notice for notice in found if notice]


def _in(days: int) -> str:
    return {0: "today", 1: "tomorrow"}.get(days, f"in {days} days")
