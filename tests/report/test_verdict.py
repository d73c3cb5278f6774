"""The verdict follows the numbers."""

from __future__ import annotations

import pytest

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
    assert "says nothing yet" in text(tmp_path)


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
    assert "no run without the lock" in text(tmp_path)


def test_the_norm_matched_control_comes_first_and_must_match(tmp_path, train_run):
    train_run("fedavg", accuracy=0.95)
    train_run("matched", accuracy=0.93, defense=PublicNorm())
    train_run("other", accuracy=0.5, defense=PublicNorm(like=KeyLock(layers="all")))
    train_run("fedkl", accuracy=0.92, defense=KeyLock())
    collected = collect(tmp_path)
    locked = next(run for run in collected.trains if run.name == "fedkl")
    assert [run.name for run in verdict.controls_of(locked, collected)] == ["matched", "fedavg"]


@pytest.mark.parametrize(
    ("control", "expected"),
    [
        ([35.0] * 10, "resists this attack"),
        ([35.0] * 9 + [20.0], "resists this attack"),
        ([35.0] * 8 + [None, 20.0], "says nothing: attack finds only 8 of 10 of its control"),
    ],
)
def test_a_locked_arm_counts_only_where_its_control_falls(tmp_path, attack_run, control, expected):
    attack_run({"public-norm": control, "lock": [6.0] * 10})
    assert verdicts(tmp_path)["DLG on lock"].verdict == expected


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
    finding = verdicts(tmp_path)[f"DLG on {arm}"]
    assert (finding.verdict, finding.tone) == (expected, "open")


def test_missing_control(tmp_path, attack_run):
    attack_run({"no-norm": [40.0], "lock": [6.0]})
    assert verdicts(tmp_path)["DLG on lock"].verdict == "says nothing: control public-norm missing"
    assert "Without the control public-norm" in text(tmp_path)


@pytest.mark.parametrize(
    ("lock", "identified", "expected"),
    [
        ([6.0, 31.0], (), "leaks: 1 of 2 images recovered"),
        ([6.0, 6.0], ("lock",), "leaks: 2 of 2 images identified"),
    ],
)
def test_a_leak_counts_whatever_the_control(tmp_path, attack_run, lock, identified, expected):
    attack_run({"public-norm": [10.0, 10.0], "lock": lock}, identified=identified)
    finding = verdicts(tmp_path)["DLG on lock"]
    assert (finding.verdict, finding.tone) == (expected, "bad")


def test_identification_no_better_than_chance_is_no_leak(tmp_path, attack_run):
    attack_run({"public-norm": [35.0], "lock": [6.0]})
    arm = collect(tmp_path).attacks[0].arms["lock"]
    arm["identified"] = {"rate": 0.01, "low": 0.009, "high": 0.2, "n": 100}
    assert not verdict.identifies(arm, 1)
    arm["identified"]["low"] = 0.02
    assert verdict.identifies(arm, 1)
    assert not verdict.identifies(arm, 2)


def test_attack_sentences_carry_the_numbers(tmp_path, attack_run):
    attack_run({"no-norm": [40.0, 42.0], "public-norm": [35.0, 36.0], "lock": [None, 6.0]})
    said = text(tmp_path)
    assert "2 of 2 images from the plain network (median 41.0 dB)" in said
    assert "With the lock it recovers 0 of 2 (median 6.0 dB), and identifies 0 of 2 among 100" in said
    assert "1 failure" in said
    assert "says nothing" not in said


def test_an_arm_of_failures_only_has_no_median(tmp_path, attack_run):
    attack_run({"public-norm": [35.0], "lock": [None]})
    assert "With the lock it recovers 0 of 1 (median no picture)" in text(tmp_path)
