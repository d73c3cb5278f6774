"""What the figures say, in plain English. Every sentence is computed from the figures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from fedkl import wording
from fedkl.attacking import verdict
from fedkl.attacking.verdict import Verdict
from fedkl.config import TrainConfig
from fedkl.defenses import Arm
from fedkl.metrics import paper_psnr_to_true
from fedkl.paper.published import published
from fedkl.protocol import Knowledge
from fedkl.report.collect import AttackRun, Collected, TrainRun
from fedkl.report.names import plain_names, plain_trainings
from fedkl.training import ORACLE

FEW_POINTS = 0.05


class Finding(NamedTuple):
    """One line of the verdict table; `tone` is "good" (protects, costs nothing), "bad" or "open"."""

    question: str
    measured: str
    verdict: str
    tone: str


class Judgment(NamedTuple):
    """A verdict on the global model, and its tone."""

    text: str
    tone: str


_TONES: dict[str, str] = {"leaks": "bad", "at the floor": "good", "says nothing": "open", "control": "open"}
"""Of the kinds of verdict."""


def findings(collected: Collected) -> list[Finding]:
    """The verdict table."""
    cost = [f for run in _locked(collected) for f in _cost_findings(run, collected)]
    cost += [_masking_finding(run, other, collected) for run, other in _masked(collected)]
    arms = [_arm_finding(run, arm, collected) for run in collected.attacks for arm in run.arms.values()]
    worth = [_worth_finding(run, collected) for run in _locked(collected) if run.fill_ins]
    return cost + arms + worth


def costs(collected: Collected) -> str | None:
    """What protection costs in accuracy, in one sentence; None where no run is there to compare with."""
    pairs = [(run, each) for run in _locked(collected) for each, _ in controls_of(run, collected)[:1]]
    pairs += _masked(collected)
    runs = {run.name: run for run in (*(other for _, other in pairs), *(run for run, _ in pairs))}
    names = plain_trainings(collected.trains)
    said = [f"{wording.percent(run.summary['accuracy'])} {_with(names[name])}" for name, run in runs.items()]
    return f"accuracy is {', '.join(said)}." if said else None


def _with(name: str) -> str:
    return {"no protection": "without protection", "lock": "with the lock"}.get(name, f"with {name}")


def paragraph(collected: Collected) -> str:
    """The verdict in a few sentences."""
    accuracy = [_accuracy_sentence(run, collected) for run in _locked(collected)]
    if not accuracy:
        accuracy = [_unlocked_sentence(run) for run in collected.trains]
    accuracy += [_masking_sentence(run, other) for run, other in _masked(collected)]
    attacks = [_attack_sentences(run, collected) for run in collected.attacks]
    worth = [_worth_sentence(run) for run in _locked(collected) if run.fill_ins]
    sentences = " ".join(accuracy + attacks + worth)
    return sentences or "No run is finished yet, so there is nothing to say."


def _locked(collected: Collected) -> list[TrainRun]:
    return [run for run in collected.trains if run.config.defense.guesses()]


def _masked(collected: Collected) -> list[tuple[TrainRun, TrainRun]]:
    """Runs whose server cannot read single updates, each with one that is the same in the clear."""
    return [
        (run, other)
        for run in collected.trains
        for other in collected.trains
        if run.config.training.aggregation.server_learns != "updates"
        and other.config.training.aggregation.server_learns == "updates"
        and _in_the_clear(run, other) == other.config
    ]


def _in_the_clear(run: TrainRun, other: TrainRun) -> TrainConfig:
    training = replace(run.config.training, aggregation=other.config.training.aggregation)
    return run.config.model_copy(update={"training": training})


def controls_of(run: TrainRun, collected: Collected) -> list[tuple[TrainRun, str]]:
    """Runs that differ from a defended one in the defense only, the closest first; and what differs."""
    defense = run.config.defense
    same = [
        other
        for other in collected.trains
        if other.config.model_copy(update={"defense": defense}) == run.config
    ]
    return [
        (each, kind) for other, kind in defense.baselines() for each in same if each.config.defense == other
    ]


def noise(first: TrainRun, second: TrainRun) -> float | None:
    """Half-width of the 95 % interval of a difference of accuracies that sampling the test images leaves.

    As if each run had been tested on images of its own, which overstates it. None if the size is not known.
    """
    sizes = [run.summary.get("test_images") for run in (first, second)]
    shares = [run.summary["accuracy"] for run in (first, second)]
    if None in sizes:
        return None
    return 1.96 * math.sqrt(sum(p * (1 - p) / n for p, n in zip(shares, sizes, strict=True) if n))


def _compared(run: TrainRun, control: TrainRun) -> str:
    """How the locked run does against its control: the difference, and what sampling alone could do."""
    difference, spread = run.summary["accuracy"] - control.summary["accuracy"], noise(run, control)
    text = f"{wording.points(difference)}"
    if spread is None:
        return text
    size = "within" if abs(difference) <= spread else "beyond"
    images = run.summary["test_images"]
    return f"{text}, {size} the ±{100 * spread:.1f} that {images} test images leave to chance"


def _cost_findings(run: TrainRun, collected: Collected) -> list[Finding]:
    names, defense = plain_trainings(collected.trains), run.config.defense
    own = f"{names[run.name]}: {wording.percent(run.summary['accuracy'])}"
    question = f"What does {f'the {defense.plain}' if defense.plain else defense.type} cost in accuracy?"
    controls = controls_of(run, collected)
    if not controls:
        return [Finding(question, own, "open: no run without it and otherwise the same", "open")]
    rows = []
    for control, kind in controls:
        loss, spread = control.summary["accuracy"] - run.summary["accuracy"], noise(run, control) or 0.0
        measured = f"{own}; {names[control.name]} ({kind}): {wording.percent(control.summary['accuracy'])}"
        tone = "good" if loss <= 0 else "open" if loss <= spread else "bad"
        rows.append(Finding(question, measured, _compared(run, control), tone))
    return rows


def _masking_finding(run: TrainRun, control: TrainRun, collected: Collected) -> Finding:
    names = plain_trainings(collected.trains)
    loss = control.summary["accuracy"] - run.summary["accuracy"]
    own, clear = (wording.percent(each.summary["accuracy"]) for each in (run, control))
    measured = f"{names[run.name]}: {own}; {names[control.name]} (in the clear): {clear}"
    tone = "good" if loss <= 0 else "open" if loss <= (noise(run, control) or 0.0) else "bad"
    return Finding("What do masked updates cost in accuracy?", measured, _compared(run, control), tone)


def _masking_sentence(run: TrainRun, control: TrainRun) -> str:
    own, clear = (wording.percent(each.summary["accuracy"]) for each in (run, control))
    return (
        f"With masked updates ({run.name}) it is {own}, against {clear} for {control.name} in the clear "
        f"({_compared(run, control)})."
    )


def _accuracy_sentence(run: TrainRun, collected: Collected) -> str:
    rounds = _plural(run.summary["rounds"], "round")
    accuracy = wording.percent(run.summary["accuracy"])
    text = f"After {rounds}, models with {run.config.defense.type} ({run.name}) reach {accuracy}"
    parts = [
        f"{wording.percent(control.summary['accuracy'])} for {control.name} ({_compared(run, control)})"
        for control, _ in controls_of(run, collected)
    ]
    if not parts:
        return f"{text}; no run without it and otherwise the same settings is there to compare."
    return f"{text}, against {' and '.join(parts)}."


def _unlocked_sentence(run: TrainRun) -> str:
    rounds = _plural(run.summary["rounds"], "round")
    accuracy = wording.percent(run.summary["accuracy"])
    return f"After {rounds}, {run.name} reaches {accuracy}; no run with a defense is there to compare."


def judge(arm: dict[str, Any], run: AttackRun) -> Verdict:
    """The verdict on one arm; see `fedkl.attacking.verdict`."""
    known = run.chosen[arm["name"]]
    return verdict.judge(
        arm,
        floor=run.summary.get("floor"),
        control=run.arms.get(known.control or ""),
        chance=run.config.batch_size / arm["candidates"],
        open=known.open,
    )


def _arm_finding(run: AttackRun, arm: dict[str, Any], collected: Collected) -> Finding:
    name = attack_name(run)
    same = [each for each in collected.attacks if attack_name(each) == name]
    where = f" ({run.name})" if len(same) > 1 else ""
    against = plain_names(run.chosen)[arm["name"]]
    question = f"{name[0].upper()}{name[1:]}{where} against {against}: {arm['description']}"
    median = _decibels(arm)
    recovered, identified = wording.count(arm["success"]), wording.count(arm["identified"])
    measured = f"median {median}, {recovered} recovered, {identified} identified"
    found = judge(arm, run)
    return Finding(question, measured, found.text, _TONES[found.kind])


def attack_name(run: AttackRun) -> str:
    """The attack's name as in the literature."""
    return run.config.attack.title or run.config.attack.type


def _decibels(arm: dict[str, Any]) -> str:
    median = arm["figures"]["psnr"]["median"]
    return "no picture" if median is None else f"{wording.number(median)} dB"


def _attack_sentences(run: AttackRun, collected: Collected) -> str:
    """One sentence for what hides nothing, and one for each defended arm that is no variant of another."""
    where = f"In {run.name}, " if len(collected.attacks) > 1 else ""
    known = run.chosen
    parts = [
        f"{wording.count(arm['success'])} images from {arm['name']} (median {_decibels(arm)})"
        for name, arm in run.arms.items()
        if known[name].control is None
    ]
    text = (
        f"{where}{attack_name(run)} recovers {' and '.join(parts)}."
        if parts
        else f"{where}no control was attacked."
    )
    defended = [arm for name, arm in run.arms.items() if _is_plainly_defended(known[name])]
    return " ".join([text, *(_defended_sentences(arm, run) for arm in defended)])


def _is_plainly_defended(arm: Arm) -> bool:
    """Whether a server knows nothing of it but the defense, and guesses in the plainest way."""
    granted = replace(arm.knowledge, labels=False, auxiliary=0) != Knowledge(labels=False)
    return not (arm.open or granted or arm.regress != "nothing" or arm.filled_in != "drawn")


def _defended_sentences(arm: dict[str, Any], run: AttackRun) -> str:
    found = judge(arm, run)
    failures = arm["figures"]["psnr"]["failures"]
    text = (
        f"From {arm['name']} it recovers {wording.count(arm['success'])} (median {_decibels(arm)}), and "
        f"identifies {wording.count(arm['identified'])} among {arm['candidates']} candidates"
    )
    text += f"; {_plural(failures, 'failure')} count as not recovered" if failures else ""
    return f"{text}: {found.text}."


def paper_comparison(run: AttackRun) -> str | None:
    """The published figures as true PSNR; None where the run is another experiment."""
    config = run.config
    if (
        config.attack.type != "dlg"
        or config.model.name != "lenet"
        or not config.data.name.startswith("mnist")
    ):
        return None
    printed = published("table6")["dlg/lenet/mnist"]["printed"]["psnr"]
    without, locked = (wording.number(paper_psnr_to_true(figure)) for figure in printed)
    return (
        f"Paper (arXiv 2305.04095, Table 6; DLG, LeNet, MNIST, 20 trials): {without} dB without and "
        f"{locked} dB with the lock. It prints {printed[0]} and {printed[1]}, which are "
        f"10·log10(255² / RMSE); these are the true values. Its {without} dB are low because its images were "
        "saved without clamping, so that pixels wrapped around in 8 bits: a clean run exceeds 40 dB."
    )


def best_fill_in(fill_ins: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The server's best completion that is open to it; the oracle does not count.

    Which one is best is known by the test images, so that its accuracy is a little high.
    """
    return max((f for f in fill_ins if f["arm"] != ORACLE), key=lambda f: float(f["accuracy"]))


def judge_worth(run: TrainRun) -> Judgment:
    """Claim (b): is the global model useless without the lock?"""
    own, best = run.summary["accuracy"], best_fill_in(run.fill_ins)["accuracy"]
    classes = run.summary.get("classes")
    guess = 1 / classes if classes else 0.0
    if own <= guess + FEW_POINTS:
        return Judgment("undecided: the clients' models hardly beat guessing", "open")
    if own - best <= FEW_POINTS:
        return Judgment("not useless: as good as the clients' within a few points", "bad")
    if best <= guess + FEW_POINTS:
        return Judgment("useless: no better than guessing", "good")
    return Judgment(f"not useless, but {wording.points(best - own)}", "bad")


def _worth_finding(run: TrainRun, collected: Collected) -> Finding:
    name = plain_trainings(collected.trains)[run.name]
    best = best_fill_in(run.fill_ins)
    measured = (
        f"{name}: best fill-in ({best['arm']}) {wording.percent(best['accuracy'])}, clients "
        f"{wording.percent(run.summary['accuracy'])}"
    )
    return Finding("Is the global model useless without the lock?", measured, *judge_worth(run))


def _worth_sentence(run: TrainRun) -> str:
    best, judgment = best_fill_in(run.fill_ins), judge_worth(run)
    aux = f" and {best['auxiliary']} auxiliary images" if best["auxiliary"] else ""
    text = (
        f"A server that fills in the private part of {run.name} itself ({best['arm']}{aux}) reaches "
        f"{wording.percent(best['accuracy'])} where the clients have "
        f"{wording.percent(run.summary['accuracy'])}"
    )
    if judgment.text.startswith("undecided"):
        return f"{text}, which leaves it undecided: the clients' models themselves hardly beat guessing."
    if judgment.text.startswith("not useless"):
        return f"{text}: the global model is NOT useless without the lock."
    return f"{text}: without the lock, this global model is useless to it."


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
