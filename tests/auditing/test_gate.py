"""Limits on what an audit found: crossed, kept, undecided, without evidence; and earlier audits as limits."""

from __future__ import annotations

import re

import pytest

from fedkl.auditing.gate import Gate, judge
from fedkl.auditing.results import Measured
from fedkl.auditing.testing import assert_no_leak
from fedkl.errors import ConfigError
from fedkl.metrics import wilson_interval
from tests.auditing.audits import REAL, SUM, audit, finding, measured, not_run

LIMITED = {
    "recovered": "rebuilt",
    "identified": "identified",
    "presence_tpr": "presence",
    "labels": "labels",
}


def states(made, text):
    return [check.state for check in judge(made, Gate.parse(text)).checks]


@pytest.mark.parametrize(("quantity", "question"), LIMITED.items())
def test_the_whole_interval_decides(quantity, question):
    low, high = wilson_interval(30, 300)
    for limit, state, code in (
        (low - 1e-6, "crossed", 1),
        (low, "undecided", 3),  # above means above
        (high - 1e-6, "undecided", 3),
        (high, "passed", 0),
    ):
        made = audit(finding(question, 30, 300))
        result = judge(made, Gate({quantity: limit}))
        assert ([check.state for check in result.checks], result.exit_code) == ([state], code)
        assert (result.reasons == []) == (code == 0)


def test_no_more_than_of_images_that_nobody_has_is_no_leak_and_no_pass():
    """False alarms above the limit: a masked client would fail by chance."""
    found = finding(successes=30, floor=measured(24, 300), outcome="says nothing")
    (check,) = judge(audit(found), Gate.parse("presence_tpr=0.05")).checks
    assert check.state == "undecided"
    assert "no more than of images that the client does not have, 0.080 [0.05" in check.text
    assert states(audit(finding(successes=60, floor=measured(24, 300))), "presence_tpr=0.05") == ["crossed"]
    assert states(audit(found), "presence_tpr=0.2") == ["passed"]


def test_no_more_than_noise_identifies_is_no_leak_and_no_pass():
    """Pictures of a large batch are matched to its images: noise identifies some."""
    found = finding("identified", 41, 100, outcome="at the floor", floor=measured(43, 100))
    (check,) = judge(audit(found), Gate.parse("identified=0.1")).checks
    assert check.state == "undecided"
    assert "no more than without the update, 0.430 [0.3" in check.text
    assert states(audit(found), "identified=0.6") == ["passed"]


@pytest.mark.parametrize(("quantity", "question"), [("recovered", "rebuilt"), ("identified", "identified")])
def test_images_on_which_an_attack_broke_keep_no_limit(quantity, question):
    """None of 300 is rebuilt, and of 299 nobody knows."""
    found = finding(question, 0, 300, figures={"broke": 299.0})
    (check,) = judge(audit(found), Gate({quantity: 0.1})).checks
    assert check.state == "missing"
    assert "the attack broke on 299 of 300 images" in check.text
    crossed = finding(question, 200, 300, figures={"broke": 100.0})
    assert states(audit(crossed), f"{quantity}=0.1") == ["crossed"]


def test_identified_among_few_is_not_what_the_limit_is_of():
    found = finding("identified", 0, 300, figures={"candidates": 16.0})
    (check,) = judge(audit(found), Gate.parse("identified=0.1")).checks
    assert (check.state, "told from 16 images" in check.text) == ("missing", True)
    assert states(audit(finding("identified", 0, 300, figures={"candidates": 100.0})), "identified=0.1") == [
        "passed"
    ]


def test_images_that_a_guess_rebuilds_cross_no_limit():
    found = finding("rebuilt", 290, 300, outcome="at the floor", floor=measured(290, 300))
    (check,) = judge(audit(found), Gate.parse("recovered=0.1")).checks
    assert check.state == "undecided"
    assert "so alike that a guess rebuilds them" in check.text


@pytest.mark.parametrize(
    ("question", "changes", "text"),
    [
        ("rebuilt", {"successes": 3, "n": 10, "floor": measured(0, 10)}, "recovered=0.01"),
        (
            "presence",
            {
                "found": Measured(rate=0.6, low=0.15, high=0.8, n=240),
                "floor": Measured(rate=0.05, low=0.02, high=0.2, n=240),
                "figures": {"low_at_threshold": 0.5, "high_at_threshold": 0.7},
            },
            "presence_tpr=0.1",
        ),
    ],
)
def test_a_leak_is_one_whatever_the_floors_interval(question, changes, text):
    """Three of ten were rebuilt; it was called a guess, of which none of ten came true."""
    leak = finding(question, **changes)
    assert states(audit(leak), text) == ["crossed"]
    assert states(audit(leak.model_copy(update={"outcome": "says nothing"})), text) == ["undecided"]


@pytest.mark.parametrize("quantity", ["presence_tpr", "presence_auc"])
@pytest.mark.parametrize(
    ("kind", "said"),
    [("broke", "broken off"), ("does not apply", "not applicable"), ("no time left", "without time")],
)
def test_presence_has_to_be_measured_on_all_that_clients_send(quantity, kind, said):
    """Too few images for sums of three clients, and the sum leaks all: a limit was kept."""
    auc = {"auc": 0.5, "auc_low": 0.45, "auc_high": 0.55}
    quiet = finding(successes=3, attacker="presence", outcome="at the floor", figures=auc)
    missing = not_run("presence", exposure="sum-of-3", kind=kind, reason="Give more images.")
    gate, sums = Gate({quantity: 0.7}), {"exposures": (REAL, SUM), "masking": "pairwise"}
    result = judge(audit(quiet, missing, **sums), gate)
    assert (result.exit_code, len(result.reasons)) == (3, 1)
    assert (
        f"nothing was measured on sum-of-3 ({said}). Give more images. Correct this, or" in result.reasons[0]
    )
    of_sums = quiet.model_copy(update={"exposure": "sum-of-3"})
    assert judge(audit(quiet, of_sums, **sums), gate).exit_code == 0
    leaking = finding(
        exposure="sum-of-3", figures={"auc": 1.0, "auc_low": 0.99, "auc_high": 1.0}, successes=290
    )
    assert judge(audit(quiet, leaking, **sums), gate).exit_code == 1
    same = audit(quiet, missing, **sums)
    assert "nothing was measured on sum-of-3" in judge(same, Gate(), baseline=same).reasons[0]


@pytest.mark.parametrize(("quantity", "question"), [("recovered", "rebuilt"), ("identified", "identified")])
def test_attackers_of_pictures_that_came_to_no_end_are_missing(quantity, question):
    """Less time must not make a gate greener."""
    found, gate = finding(question, 0, 300), Gate({quantity: 0.1})
    for kind, said in (("broke", "1 broken off"), ("no time left", "1 without time")):
        result = judge(audit(found, not_run("ig", kind=kind)), gate)
        assert (result.exit_code, len(result.reasons)) == (3, 1)
        assert said in result.reasons[0]
    for other in (
        not_run("ig", kind="does not apply"),
        not_run("ig", kind="too large"),
        not_run("ig", exposure="single"),
        not_run("presence"),
    ):
        assert judge(audit(found, other), gate).exit_code == 0
    assert judge(audit(finding(), not_run("ig")), Gate.parse("presence_tpr=0.8")).exit_code == 0
    crossed = finding(question, 200, 300)
    assert judge(audit(crossed, not_run("ig")), gate).exit_code == 1


def test_what_an_attacker_missed_that_never_found_anything_is_said():
    found = finding("identified", 0, 96, outcome="says nothing", reason="its control was not attacked")
    (check,) = judge(audit(found), Gate.parse("identified=0.1")).checks
    assert check.state == "passed"
    assert check.text.endswith("by an attacker of whom nothing else is known: its control was not attacked.")


def test_the_area_under_the_curve_has_an_interval_of_its_own():
    figures = {"auc": 0.87, "auc_low": 0.84, "auc_high": 0.9}
    made = audit(finding(figures=figures))
    assert states(made, "presence_auc=0.8") == ["crossed"]
    assert states(made, "presence_auc=0.9") == ["passed"]
    assert states(made, "presence_auc=0.87") == ["undecided"]
    assert states(audit(finding()), "presence_auc=0.9") == ["missing"]  # no figure is no evidence


def test_so_many_trials_as_are_said_do_decide():
    made = audit(finding("identified", 20, 300))
    (check,) = judge(made, Gate.parse("identified=0.08")).checks
    assert check.state == "undecided"
    assert "300 were run" in check.text
    needed = int(re.search(r"about (\d+) trials", check.text)[1])
    decided = [n for n in range(300, 10**5, 300) if wilson_interval(n // 15, n)[1] <= 0.08]
    assert 0.7 * decided[0] < needed < 1.4 * decided[0]


def test_what_decides_is_time_where_there_was_too_little():
    for cut_short, remedy in ((False, "give more images."), (True, "give more minutes.")):
        made = audit(finding("identified", 20, 300, cut_short=cut_short))
        (check,) = judge(made, Gate.parse("identified=0.08")).checks
        assert check.text.endswith(remedy)


def test_a_value_that_is_the_limit_is_never_decided():
    (check,) = judge(audit(finding("identified", 30, 300)), Gate.parse("identified=0.1")).checks
    assert check.state == "undecided"
    assert "no number of trials" in check.text


def test_upper_bounds_are_not_held_against_a_client():
    bound = finding("rebuilt", 30, 30, exposure="single")
    result = judge(audit(bound, finding("rebuilt", 0, 300)), Gate.parse("recovered=0.1"))
    assert result.exit_code == 0
    assert judge(audit(bound), Gate.parse("recovered=0.1")).exit_code == 3


def test_one_of_several_attackers_suffices_and_crossed_beats_incomplete():
    made = audit(
        finding("identified", 0, 300), finding("identified", 250, 300, attacker="ig"), finished=False
    )
    result = judge(made, Gate.parse("identified=0.1,labels=0.5"))
    assert sorted(check.state for check in result.checks) == ["crossed", "missing", "missing", "passed"]
    assert result.exit_code == 1
    assert "ig" in result.reasons[0]
    assert len(result.reasons) == 3


@pytest.mark.parametrize("text", ["", "identified=0.9"])
def test_an_interrupted_audit_is_incomplete(text):
    gate = Gate.parse(text) if text else Gate()
    result = judge(audit(finding("identified", 0, 300), finished=False), gate)
    assert result.exit_code == 3
    assert "interrupted" in result.reasons[0]


def test_attackers_that_all_came_to_nothing_are_no_evidence():
    made = audit(not_run(), not_run("ig", kind="broke"), not_run("dlg", kind="broke"))
    result = judge(made, Gate())
    assert result.exit_code == 3
    assert "2 broke" in result.reasons[0]
    assert "1 without time" in result.reasons[0]


def test_without_limits_evidence_is_enough():
    assert judge(audit(finding()), Gate()).exit_code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic=0.1", "'magic': no such quantity; expected one of recovered, identified"),
        ("identified", "expected a name and a number"),
        ("identified=much", "expected a name and a number"),
        ("", "expected a name and a number"),
        ("identified=1.5", "from 0 to 1, got 1.5"),
        ("identified=nan", "from 0 to 1, got nan"),
        ("identified=0.1,identified=0.2", "named twice"),
    ],
)
def test_limits_that_cannot_be_used(text, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        Gate.parse(text)


def test_worse_than_before_fails_and_as_before_does_not():
    then = audit(finding(successes=100, figures={"auc": 0.6, "auc_low": 0.58, "auc_high": 0.62}))
    same = finding(successes=110, figures={"auc": 0.61, "auc_low": 0.59, "auc_high": 0.63})
    assert judge(audit(same, seed=3), Gate(), baseline=then).exit_code == 0
    overlapping = same.model_copy(update={"found": measured(120, 300)})  # 40 % [35–46 %], before up to 39 %
    assert judge(audit(overlapping), Gate(), baseline=then).exit_code == 0
    worse = judge(audit(same.model_copy(update={"found": measured(150, 300)})), Gate(), baseline=then)
    assert worse.exit_code == 1
    assert worse.reasons[0].startswith("presence_tpr, span on real: 0.500")
    area = {"auc": 0.7, "auc_low": 0.68, "auc_high": 0.72}
    assert judge(audit(same.model_copy(update={"figures": area})), Gate(), baseline=then).exit_code == 1


def test_what_cannot_be_compared_with_before_is_missing_evidence():
    made = audit(finding(), finding("identified", 0, 300))
    for now, then, which in (
        (made, audit(finding()), "the baseline"),
        (audit(finding()), made, "this audit"),
    ):
        result = judge(now, Gate(), baseline=then)
        assert result.exit_code == 3
        assert f"identified, span on real: {which} has no such figure" in result.reasons[0]


@pytest.mark.parametrize("question", ["rebuilt", "identified"])
def test_an_attack_that_broke_is_not_better_than_before(question):
    then = audit(finding(question, 100, 100, outcome="leaks"))
    broken = audit(finding(question, 0, 100, outcome="says nothing", figures={"broke": 99.0}))
    result = judge(broken, Gate(), baseline=then)
    assert (result.exit_code, len(result.reasons)) == (3, 1)
    assert result.reasons[0].endswith("but the attack broke on 99 of 100 images.")
    assert judge(audit(finding(question, 0, 100)), Gate(), baseline=then).exit_code == 0
    worse = audit(finding(question, 90, 100, figures={"broke": 10.0}))
    assert judge(worse, Gate(), baseline=audit(finding(question, 0, 100))).exit_code == 1


def test_fewer_images_than_before_do_not_say_that_nothing_grew():
    """Less time must not make a gate greener: none of two may be two thirds of all."""
    then = audit(finding("rebuilt", 0, 100, outcome="at the floor"))
    (reason,) = judge(audit(finding("rebuilt", 0, 2)), Gate(), baseline=then).reasons
    assert reason.endswith("but 2 images say so, 100 then. Give more minutes.")
    for now, code in (
        (finding("rebuilt", 0, 2), 3),
        (finding("rebuilt", 2, 2), 1),
        (finding("rebuilt", 0, 100), 0),
    ):
        assert judge(audit(now), Gate(), baseline=then).exit_code == code
    leaky = audit(finding("rebuilt", 90, 100))  # up to 94 %
    assert judge(audit(finding("rebuilt", 1, 10)), Gate(), baseline=leaky).exit_code == 0
    assert judge(audit(finding("rebuilt", 9, 10)), Gate(), baseline=leaky).exit_code == 3


@pytest.mark.parametrize("kind", ["broke", "no time left"])
def test_attackers_of_pictures_that_came_to_no_end_in_both_audits_are_missing(kind):
    made = audit(finding(), not_run("linear-rows", kind=kind))
    (reason,) = judge(made, Gate(), baseline=made).reasons
    assert reason.startswith("Not all attackers of pictures came to an end on what clients really send (1 ")
    assert judge(made, Gate(), baseline=made).exit_code == 3
    other = audit(finding(), not_run("linear-rows", kind="does not apply"))
    assert judge(other, Gate(), baseline=other).exit_code == 0


@pytest.mark.parametrize(
    ("name", "said"),
    [("images_fingerprint", "images and labels"), ("training_fingerprint", "network and procedure")],
)
def test_a_baseline_is_of_the_same_images_and_training_and_weights_may_differ(name, said):
    """Networks are trained further; older files do not say of what they are."""
    then = audit(finding(), fingerprint="a", **{name: "aa"})
    assert judge(audit(finding(), fingerprint="b", **{name: "aa"}), Gate(), baseline=then).exit_code == 0
    assert judge(audit(finding(), fingerprint="b"), Gate(), baseline=then).exit_code == 0
    assert judge(audit(finding(), **{name: "bb"}), Gate(), baseline=audit(finding())).exit_code == 0
    with pytest.raises(ConfigError, match=f"- {said}: not those of then"):
        judge(audit(finding(), fingerprint="a", **{name: "bb"}), Gate(), baseline=then)


@pytest.mark.parametrize(
    "changes",
    [
        {"subject": "another"},
        {"images": 401},
        {"defense": "keylock"},
        {"masking": "blind"},
        {"fedkl": "0.2.0"},
        {"environment": {"torch": "2.7.0"}},
        {"exposures": (REAL,)},
        {"exposures": (REAL.model_copy(update={"images": 30}),)},
    ],
    ids=str,
)
def test_a_baseline_of_something_else_is_refused(changes):
    with pytest.raises(ConfigError, match="of something else") as caught:
        judge(audit(finding()), Gate(), baseline=audit(finding(), **changes))
    what = "exposure" if "exposures" in changes else next(iter(changes))
    assert ("torch: 2.6.0 now, 2.7.0 then" if what == "environment" else f"- {what}") in str(caught.value)


def test_as_an_assertion():
    assert_no_leak(audit(finding("identified", 0, 300)), fail_above="identified=0.1")
    with pytest.raises(AssertionError, match="A limit is crossed") as caught:
        assert_no_leak(audit(finding()), fail_above="presence_tpr=0.05,labels=0.9")
    assert "labels: nothing was measured" in str(caught.value)
    with pytest.raises(AssertionError, match="The evidence is incomplete"):
        assert_no_leak(audit(finding("identified", 0, 20)), fail_above="identified=0.1")
    then = audit(finding(successes=10))
    with pytest.raises(AssertionError, match="worse than before"):
        assert_no_leak(audit(finding()), fail_above="presence_tpr=1", baseline=then)
