"""The verdict follows the numbers."""

from __future__ import annotations

import pytest

from fedkl import report
from fedkl.aggregation import MaskedAggregation
from fedkl.attacks import ClosedForm
from fedkl.defenses import KeyLock, PublicNorm
from fedkl.report import verdict
from fedkl.report.collect import collect


def text(path):
    return " ".join(verdict.paragraph(collect(path)).split())


def verdicts(path):
    return {f.question.split(":")[0]: f for f in verdict.findings(collect(path))}


@pytest.mark.parametrize(
    ("fill_in", "said"),
    [
        (0.88, "is NOT useless without the lock"),
        (0.50, "is NOT useless without the lock"),
        (0.12, "without the lock, this global model is useless"),
    ],
)
def test_claim_b_follows_the_best_fill_in(tmp_path, train_run, fill_in, said):
    train_run("fedkl", accuracy=0.9, defense=KeyLock(), fill_ins={"neutral": 0.1, "refit": fill_in})
    assert said in text(tmp_path)


def test_the_oracle_does_not_count_as_a_fill_in(tmp_path, train_run):
    train_run("fedkl", accuracy=0.9, defense=KeyLock(), fill_ins={"neutral": 0.1, "mean-affine": 0.9})
    assert "this global model is useless" in text(tmp_path)


def test_claim_b_says_nothing_about_clients_that_guess(tmp_path, train_run):
    train_run("fedkl", accuracy=0.12, defense=KeyLock(), fill_ins={"neutral": 0.12})
    assert "leaves it undecided" in text(tmp_path)


@pytest.mark.parametrize(
    ("accuracy", "tone", "said"),
    [(0.93, "good", "within"), (0.91, "open", "within"), (0.7, "bad", "beyond")],
)
def test_cost_of_the_lock(tmp_path, train_run, accuracy, tone, said):
    train_run("fedavg", accuracy=0.92)
    train_run("fedkl", accuracy=accuracy, defense=KeyLock())
    finding = verdicts(tmp_path)["What does the lock cost in accuracy?"]
    assert finding.tone == tone
    assert said in finding.verdict


def test_only_runs_that_differ_in_the_defense_alone_are_compared(tmp_path, train_run):
    train_run("fedavg", rounds=4, done=4)
    train_run("fedkl", defense=KeyLock())
    assert "no run without it" in text(tmp_path)


def test_the_norm_matched_control_comes_first_and_must_match(tmp_path, train_run):
    train_run("fedavg", accuracy=0.95)
    train_run("matched", accuracy=0.93, defense=PublicNorm())
    train_run("other", accuracy=0.5, defense=PublicNorm(like=KeyLock(layers="all")))
    train_run("fedkl", accuracy=0.92, defense=KeyLock())
    collected = collect(tmp_path)
    locked = next(run for run in collected.trains if run.name == "fedkl")
    assert [run.name for run, _ in verdict.controls_of(locked, collected)] == ["matched", "fedavg"]


@pytest.mark.parametrize(
    ("accuracy", "tone", "said"),
    [(0.92, "good", "+0.0 points, within"), (0.91, "open", "within"), (0.7, "bad", "beyond")],
)
def test_masked_updates_are_compared_with_the_same_in_the_clear(tmp_path, train_run, accuracy, tone, said):
    train_run("plain", accuracy=0.92)
    train_run("other", accuracy=0.5, rounds=4, done=4)
    train_run("masked", accuracy=accuracy, aggregation=MaskedAggregation())
    finding = verdicts(tmp_path)["What do masked updates cost in accuracy?"]
    assert finding.tone == tone
    assert said in finding.verdict
    assert "plain (in the clear): 92.0 %" in finding.measured
    assert "With masked updates (masked) it is" in text(tmp_path)
    page = (report.build(tmp_path).html).read_text(encoding="utf-8")
    assert "The server reads" in page
    assert "<td>nothing</td>" in page


def test_what_the_server_reads_has_no_column_where_it_reads_every_update(tmp_path, train_run):
    train_run("plain")
    assert "The server reads" not in report.build(tmp_path).html.read_text(encoding="utf-8")


def shared(rate, n=100):
    spread = 1.96 * (rate * (1 - rate) / n) ** 0.5 + 0.01
    return {"rate": rate, "low": max(0.0, rate - spread), "high": min(1.0, rate + spread), "n": n}


FLOOR = {"success": shared(0.0), "identified": shared(0.03)}


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ([35.0] * 100, "at the floor: resists this attack"),
        ([35.0] * 90 + [20.0] * 10, "at the floor: resists this attack"),
        ([35.0] * 80 + [None] * 20, "undecided: the attack finds only 80 of 100 of its control"),
    ],
)
def test_a_defended_arm_counts_only_where_its_control_falls(tmp_path, attack_run, control, expected):
    attack_run({"public-norm": control, "lock": [6.0] * 100}, floor=FLOOR, pictures=False)
    assert verdicts(tmp_path)["DLG against lock"].verdict == expected


@pytest.mark.parametrize("arm", ["no-norm", "public-norm", "lock-known-both"])
@pytest.mark.parametrize(
    ("psnr", "identified", "expected"),
    [
        (35.0, False, "control: attack succeeds"),
        (6.0, True, "control: attack succeeds"),
        (6.0, False, "control: attack too weak"),
    ],
)
def test_an_arm_without_secrets_is_a_control_and_no_leak(
    tmp_path, attack_run, arm, psnr, identified, expected
):
    attack_run({arm: [psnr] * 10}, identified=(arm,) if identified else ())
    (finding,) = verdicts(tmp_path).values()
    assert (finding.verdict, finding.tone) == (expected, "open")


def test_missing_control(tmp_path, attack_run):
    attack_run({"no-norm": [40.0], "lock": [6.0]}, floor=FLOOR)
    assert verdicts(tmp_path)["DLG against lock"].verdict == "undecided: its control was not attacked"


def test_few_images_do_not_clear_a_defense_in_the_table_nor_in_the_text(tmp_path, attack_run):
    attack_run({"public-norm": [40.0] * 4, "lock": [6.0] * 4}, floor=FLOOR)
    said = "undecided: too few images, 4 of 100"
    assert verdicts(tmp_path)["DLG against lock"].verdict == said
    assert said in text(tmp_path)
    assert "resists" not in text(tmp_path)


def test_the_plain_network_is_the_control_of_private_layers(tmp_path, attack_run):
    attack_run({"no-norm": [35.0] * 100, "private-stem": [6.0] * 100}, floor=FLOOR, pictures=False)
    assert verdicts(tmp_path)["DLG against private-layers"].tone == "good"


@pytest.mark.parametrize(
    ("lock", "identified", "expected"),
    [
        ([6.0, 31.0], (), "leaks: 1 of 2 images recovered"),
        ([6.0, 6.0], ("lock",), "leaks: 2 of 2 images identified"),
    ],
)
def test_a_leak_counts_whatever_the_control(tmp_path, attack_run, lock, identified, expected):
    attack_run({"public-norm": [10.0, 10.0], "lock": lock}, identified=identified, floor=FLOOR)
    finding = verdicts(tmp_path)["DLG against lock"]
    assert (finding.verdict, finding.tone) == (expected, "bad")


def test_what_the_labels_give_away_is_no_leak(tmp_path, attack_run):
    attack_run({"lock": [6.0] * 300}, floor=FLOOR, pictures=False)
    collected = collect(tmp_path)
    (run,) = collected.attacks
    arm = run.arms["lock"]
    arm["identified"] = shared(0.05, 300)  # above chance, one in a hundred; not above the floor
    assert arm["identified"]["low"] > 0.01
    assert verdict.judge(arm, run).kind == "says nothing"
    arm["identified"] = shared(0.2, 300)
    assert verdict.judge(arm, run).kind == "leaks"


def test_a_run_without_a_floor_is_held_against_chance(tmp_path, attack_run):
    """As older runs have none: a leak is still seen, nothing else is said."""
    attack_run({"public-norm": [35.0] * 100, "lock": [6.0] * 100}, pictures=False)
    (run,) = collect(tmp_path).attacks
    arm = run.arms["lock"]
    assert verdict.judge(arm, run).reason == "what the labels alone give away is not known"
    arm["identified"] = {"rate": 0.05, "low": 0.02, "high": 0.2, "n": 100}
    assert verdict.judge(arm, run).kind == "leaks"


def test_attack_sentences_carry_the_numbers(tmp_path, attack_run):
    attack_run({"no-norm": [40.0, 42.0], "public-norm": [35.0, 36.0], "lock": [None, 6.0]}, floor=FLOOR)
    said = text(tmp_path)
    assert "2 of 2 images from no-norm (median 41.0 dB)" in said
    assert "From lock it recovers 0 of 2 (median 6.0 dB), and identifies 0 of 2 among 100" in said
    assert "1 failure" in said


def test_an_arm_of_failures_only_has_no_median(tmp_path, attack_run):
    attack_run({"public-norm": [35.0], "lock": [None]})
    assert "From lock it recovers 0 of 1 (median no picture)" in text(tmp_path)


def test_the_note_is_about_attacks_and_names_none(tmp_path, attack_run, train_run):
    train_run("fedavg")
    assert "no proof of safety" not in report_of(tmp_path)
    attack_run({"lock": [6.0]}, attack=ClosedForm())
    assert "no proof of safety" in report_of(tmp_path)
    assert "Not part of this run" not in report_of(tmp_path)


def report_of(path):
    report.build(path)
    return (path / "report.md").read_text()


def test_what_was_not_attacked_is_said_with_the_reason(tmp_path, attack_run):
    left_out = [{"arm": "private-stem", "kind": "does not apply", "reason": "It is closed.", "trials": 2}]
    attack_run({"no-norm": [40.0, 41.0]}, not_run=left_out)
    assert "Not attacked: private-stem: does not apply. It is closed." in report_of(tmp_path)
