"""What is said of a share of a client's images, by what the same attack gets where nothing is hidden."""

from __future__ import annotations

import pytest

from fedkl.attacking.verdict import Areas, judge, judge_presence, judge_share
from fedkl.metrics import wilson_interval


def share(rate, low, high, n=256):
    return {"rate": rate, "low": low, "high": high, "n": n}


FLOOR = share(0.01, 0.0, 0.05, n=99)
CONTROL = share(0.48, 0.37, 0.59)
NOTHING = share(0.0, 0.0, 0.03)
CHANCE = Areas(0.46, 0.54, 0.93)


def kind(found=NOTHING, floor=FLOOR, control=CONTROL, areas=CHANCE):
    return judge_presence(found, at_threshold=found, floor=floor, control=control, areas=areas).kind


def test_a_control_that_leaks_is_enough():
    """An attack that recognizes half of the images in the open is no weak one: 90 % are not asked of it."""
    assert kind() == "at the floor"


def test_more_than_the_floor_leaks_whatever_the_control():
    for control, areas in ((CONTROL, CHANCE), (None, None)):
        assert kind(share(0.2, 0.06, 0.3), control=control, areas=areas) == "leaks"


@pytest.mark.parametrize(
    "changes",
    [
        {"control": None, "areas": None},
        {"control": share(0.06, 0.04, 0.1)},  # where nothing is hidden it finds no more than the floor
        {"found": share(0.0, 0.0, 0.03, n=99)},
        {
            "found": share(0.0, 0.0, 0.19),
            "areas": Areas(0.4, 0.72, 0.93),
        },  # as many as half of it may be there
        {"areas": Areas(0.51, 0.54, 0.93)},  # some is recognized, at more false alarms
    ],
    ids=["no control", "a control that does not leak", "few images", "few clients", "more than by chance"],
)
def test_otherwise_it_says_nothing(changes):
    assert kind(**changes) == "says nothing"


def test_a_leak_is_held_against_the_floor_at_one_threshold():
    """Where the threshold truly is moves both."""
    wide, narrow = share(0.2, 0.03, 0.4), share(0.2, 0.15, 0.25)
    verdict = judge_presence(wide, at_threshold=narrow, floor=FLOOR, control=CONTROL, areas=CHANCE)
    assert verdict.kind == "leaks"


def test_more_recognized_than_the_floor_but_not_surely_is_not_at_it():
    few = share(0.063, 0.038, 0.101, n=240)
    verdict = judge_presence(
        few, at_threshold=few, floor=share(0.015, 0.005, 0.043), control=CONTROL, areas=CHANCE
    )
    assert verdict.kind == "says nothing"
    assert "but not surely" in verdict.reason


def test_either_measure_tells():
    assert kind(share(0.0, 0.0, 0.32)) == "at the floor"  # few clients: the area tells
    assert kind(areas=Areas(0.4, 0.8, 0.93)) == "at the floor"


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("hits", [0, 1, 6])
def test_one_image_that_is_rebuilt_is_a_leak_where_a_guess_rebuilds_none(hits, n):
    """By both rules: a guess seldom reaches 30 dB. To be nearest among 100 happens by chance."""
    found, floor, control = (share(k / n, *wilson_interval(k, n), n=n) for k in (hits, 0, n))
    rebuilt = judge_share(found, floor=floor, control=control, what="rebuilt").kind
    names = ("success", "identified")
    both = [dict.fromkeys(names, each) for each in (found, floor, control)]
    both[0] = {"success": found, "identified": floor}
    assert rebuilt == judge(both[0], floor=both[1], control=both[2]).kind
    assert rebuilt == ("leaks" if hits else "at the floor" if n == 100 else "says nothing")
    identified = judge_share(found, floor=floor, control=control, what="identified").kind
    assert identified != "leaks" or found["low"] > floor["high"]


def test_a_guess_that_rebuilds_some_is_what_counts():
    some, more = (share(k / 100, *wilson_interval(k, 100), n=100) for k in (3, 6))
    assert judge_share(more, floor=some, control=share(1, 0.96, 1), what="rebuilt").kind == "at the floor"


def both(hits, n, **about):
    figure = share(hits / n, *wilson_interval(hits, n), n=n)
    return {"success": share(0.0, *wilson_interval(0, n), n=n), "identified": figure} | about


def said(found, floor, control):
    """By both rules, which agree."""
    one = judge(found, floor=floor, control=control).kind
    names = [each["identified"] for each in (found, floor, control)]
    assert judge_share(names[0], floor=names[1], control=names[2], what="identified").kind == one
    return one


@pytest.mark.parametrize(("hits", "kind"), [(2, "says nothing"), (3, "says nothing"), (4, "at the floor")])
def test_an_attack_that_works_half_the_time_finds_a_control_of_two(hits, kind):
    assert said(both(1, 100), both(1, 100), both(hits, hits)) == kind
    control = judge(both(hits, hits), floor=both(0, hits), control=None, open=True)
    assert control.reason == "attack succeeds"  # on all that it was given


@pytest.mark.parametrize(("found", "floor"), [(9, 1), (14, 4), (20, 8)])
def test_more_than_the_floor_but_not_surely_is_not_at_it(found, floor):
    assert said(both(found, 100), both(floor, 100), both(100, 100)) == "says nothing"
    assert said(both(floor + 2, 100), both(floor, 100), both(100, 100)) == "at the floor"


def test_what_an_attack_broke_on_says_nothing():
    assert judge(both(0, 100, broke=35), floor=both(0, 100), control=both(100, 100)).kind == "says nothing"


def test_a_hundred_images_of_one_update_are_one_trial():
    found, floor, control = both(40, 100), both(40, 100), both(100, 100)
    assert judge(found | {"updates": 1}, floor=floor, control=control).kind == "says nothing"
    assert judge(found | {"updates": 6}, floor=floor, control=control).kind == "at the floor"
    verdict = judge(found | {"updates": 5}, floor=floor, control=control)
    assert (verdict.kind, verdict.reason) == ("says nothing", "100 images of 5 updates only")
