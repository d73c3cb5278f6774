"""The report's tables of attacks, from the summaries that the runs left."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedkl import wording
from fedkl.attacking.verdict import CONTROL_SHARE, SAFE_FROM, Verdict
from fedkl.attacking.views import chosen_arms
from fedkl.attacks import IDLG
from fedkl.metrics import SSIM_SUCCESS, SUCCESS_DB
from fedkl.report import verdict
from fedkl.report.collect import AttackRun
from fedkl.report.names import plain_names
from fedkl.report.page import Table

_SCALING = {"clip": "clipped to [0, 1]", "prior": "stretched to [0, 1]"}


def verdict_table(findings: Sequence[verdict.Finding]) -> Table:
    """Question, measurement, verdict."""
    return Table(
        title="Question by question",
        header=["Question", "Measured", "Verdict"],
        rows=[[finding.question, finding.measured, finding.verdict] for finding in findings],
        tones=[finding.tone for finding in findings],
        notes=[
            f"An image is recovered from {SUCCESS_DB:.0f} dB on, and identified if of all candidates it "
            "correlates best with the picture. A leak is what lies above the floor: above what the mean of "
            "other images with the same label gives. A leak that is seen counts in any case.",
            "Controls hide nothing from the server: they test the attack. An arm is at the floor only where "
            f"the same attack finds at least {CONTROL_SHARE:.0%} of its control's images, with at least "
            f"{SAFE_FROM} images. Otherwise it is undecided.",
        ],
    )


def attack_table(run: AttackRun, *, titled: bool) -> Table:
    """Everything measured about the arms of an attack run."""
    judgments = [verdict.judge(arm, run) for arm in run.arms.values()]
    name, size = verdict.attack_name(run), run.config.batch_size
    where = f" ({run.name})" if titled else ""
    return Table(
        title=f"{name}{where}: {run.config.trials} trials, batch size {size}, {_networks(run)}",
        header=[
            "Arm",
            "In plain words",
            "The server knows",
            "Scale fixed by",
            "n (images)",
            "Failures",
            "PSNR in dB, median [95 %]",
            "PSNR in dB, mean ± std",
            "SSIM, median",
            "PSNR in dB after the best affine fit, median (diagnostic: uses the truth)",
            f"Recovered, ≥ {SUCCESS_DB:.0f} dB [95 %]",
            f"Attack success rate, SSIM ≥ {SSIM_SUCCESS} [95 %]",
            "Identified [95 %]",
            "Candidates",
            "Identified by chance",
            "Label found",
            "Evaluations, median",
            "Attacker's loss, median",
            "Verdict",
        ],
        rows=[_attack_row(arm, run, j) for arm, j in zip(run.arms.values(), judgments, strict=True)],
        narrow=(0, 6, 10, 12),
        turned=True,
        notes=_attack_notes(run),
    )


def _networks(run: AttackRun) -> str:
    if run.config.model.weights is not None:
        return "a trained network"
    return f"untrained networks ({run.summary['initialization']} initialization)"


def _attack_notes(run: AttackRun) -> list[str]:
    batch_size = run.config.batch_size
    notes = [
        "Failures (no finite picture) count in n as not recovered and not identified; medians and means are "
        "over the others. Intervals: of the median by order statistics (a dash: too few trials), of shares "
        "after Wilson.",
        "Behind a norm the gradient leaves the picture's scale open; the attacker then stretches it to fill "
        "[0, 1]. Identified: of all candidates the true image correlates best, which no scale can change.",
    ]
    if run.summary.get("floor"):
        guess = run.summary["floor"]["identified"]
        notes.append(f"The floor, a guess from the labels alone: {wording.count_interval(guess)} identified.")
    for each in run.summary.get("not_run", []):
        trials = f", {each['trials']} of {run.config.trials} trials" if each["kind"] == "broke" else ""
        notes.append(f"Not attacked: {each['arm']}{trials}: {each['kind']}. {each['reason']}")
    if batch_size > 1:
        notes.append(
            "In a batch, pictures are matched to the true images first. By chance alone, at most "
            f"{batch_size} in as many as there are candidates are then identified."
        )
    return notes


def _attack_row(arm: dict[str, Any], run: AttackRun, judgment: Verdict) -> list[str]:
    figures = arm["figures"]
    given = run.config.labels_known and not isinstance(run.config.attack, IDLG)
    return [
        arm["name"],
        plain_names(run.chosen)[arm["name"]],
        _knows(arm, run),
        _SCALING[arm["scaling"]],
        str(figures["psnr"]["n"]),
        str(figures["psnr"]["failures"]),
        wording.median_interval(figures["psnr"]),
        wording.mean_spread(figures["psnr"]),
        wording.number(figures["ssim"]["median"], digits=2),
        wording.number(figures["psnr_affine"]["median"]),
        wording.count_interval(arm["success"]),
        _similar(arm),
        wording.count_interval(arm["identified"]),
        str(arm["candidates"]),
        chance(arm, run),
        "given" if given else wording.count(arm["label_correct"]),
        wording.number(arm["evaluations"]["median"], digits=0),
        wording.small(arm["loss"]["median"]),
        judgment.text,
    ]


def chance(arm: dict[str, Any], run: AttackRun) -> str:
    """How often a picture that holds nothing is identified; in a batch the matching can lift it so far."""
    most = "" if run.config.batch_size == 1 else "at most "
    return f"{most}{run.config.batch_size} of {arm['candidates']}"


def _similar(arm: dict[str, Any]) -> str:
    """Summaries of older runs have no rate of similar images."""
    rate = arm.get("ssim_success")
    return wording.NONE if rate is None else wording.count_interval(rate)


def _knows(arm: dict[str, Any], run: AttackRun) -> str:
    """What the server was granted and the attack uses: iDLG infers the label, granted or not."""
    if not isinstance(run.config.attack, IDLG):
        return str(arm["knows"])
    unlabeled = run.config.model_copy(update={"labels_known": False})
    knowledge = {other.name: other.knowledge for other in chosen_arms(unlabeled)}[arm["name"]]
    return f"{knowledge.describe()}; label inferred"
