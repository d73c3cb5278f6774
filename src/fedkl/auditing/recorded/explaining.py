"""In sentences: what a recorded update says of the client that sent it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fedkl.auditing.recorded.playing import Explanation
from fedkl.auditing.recorded.running import running_statistics
from fedkl.auditing.subject import Subject
from fedkl.protocol import Procedure


@dataclass(frozen=True, kw_only=True)
class Remark:
    """One thing about a recorded update.

    Attributes:
        about: Which: ``"names"``, ``"shapes"``, ``"values"``, ``"kind"``, ``"procedure"``,
            ``"base weights"``, ``"sign"``, ``"scale"``, ``"steps"``, ``"norm mode"`` or ``"statistics"``.
        says: A sentence.
        remedy: What to do about it.
        is_problem: Whether attacks on this update would fail, or mislead.
    """

    about: str
    says: str
    remedy: str = ""
    is_problem: bool = False

    def __str__(self) -> str:
        return f"{self.about}: {self.says}" + (f" {self.remedy}" if self.remedy else "")


def comparison_findings(
    subject: Subject, found: Explanation, *, base_known: bool
) -> tuple[list[Remark], list[str]]:
    """What the comparison with played clients says, and what it cannot say."""
    if found.otherwise == "unknown":
        return [_stranger(subject, base_known=base_known)], []
    findings, untold = [], []
    if found.otherwise == "norm mode":
        findings.append(_other_mode(subject))
    if found.reversed:
        findings.append(
            Remark(
                about="sign",
                says="The sign is reversed: the negative of the update looks like those of played clients.",
                remedy='A kind="difference" is the weights after minus those before; negate the tensors.',
                is_problem=True,
            )
        )
    elif found.comparison.sign != "right":
        untold.append("whether its sign is right.")
    if found.comparison.odd_size:
        findings.append(_odd_size(subject, found))
    else:
        findings += _size(subject, found)
    untold += _untold(subject, found, base_known=base_known)
    return findings, untold


def _stranger(subject: Subject, *, base_known: bool) -> Remark:
    trained = not isinstance(subject.procedure, Procedure) or subject.procedure.algorithm == "fedavg"
    otherwise = "its optimizer, its augmentation or its loss" if trained else "its loss or its augmentation"
    if base_known:
        says = f"The procedure does not fit: no played client's update looks like this one, by {otherwise}."
        return Remark(
            about="procedure", says=says, remedy="Correct the subject's procedure.", is_problem=True
        )
    return Remark(
        about="base weights",
        says="These base weights do not fit: at them, no played client's update looks like this one.",
        remedy=(
            "Give the weights that the client received in that round. If they are these, the client did "
            f"something else than the subject says: {otherwise}, or the normalization of its images."
        ),
        is_problem=True,
    )


def _other_mode(subject: Subject) -> Remark:
    other = "eval" if subject.norm_mode == "train" else "train"
    return Remark(
        about="norm mode",
        says=f"The norm mode does not fit: the client's norms were in {other} mode.",
        remedy=f'Subject(norm_mode="{other}").',
        is_problem=True,
    )


def _odd_size(subject: Subject, found: Explanation) -> Remark:
    factor, how = found.comparison.factor, subject.procedure
    if isinstance(how, Procedure) and how.algorithm == "fedavg":
        stated = how.lr * how.step_count(subject.images_per_client)
        return Remark(
            about="scale",
            says=(
                "The step size or the number of steps does not fit: lr · steps is about "
                f"{factor * stated:.2g}, the subject says {stated:.2g}."
            ),
            remedy="Correct the subject's lr, epochs, batch_size or images_per_client.",
            is_problem=True,
        )
    return Remark(
        about="scale",
        says=(
            f"The scale does not fit: the update is about {factor:.2g} times as large as those of played "
            "clients."
        ),
        remedy="Divide by it: a sum in place of a mean, a step size or a clipping bound may be left in it.",
        is_problem=True,
    )


def _size(subject: Subject, found: Explanation) -> list[Remark]:
    how = subject.procedure
    if not isinstance(how, Procedure) or how.algorithm != "fedavg":
        return []
    stated = how.lr * how.step_count(subject.images_per_client)
    low, high = (found.comparison.factor / factor for factor in reversed(found.factors))
    says = (
        f"lr · steps is about {found.comparison.factor * stated:.2g}, between {low * stated:.2g} and "
        f"{high * stated:.2g}; the subject says {stated:.2g}."
    )
    return [Remark(about="scale", says=says)]


def _untold(subject: Subject, found: Explanation, *, base_known: bool) -> list[str]:
    untold = []
    low, high = found.factors
    if not found.comparison.odd_size:
        untold.append(f"a constant factor between {low:.2g} and {high:.2g}.")
    how = subject.procedure
    if isinstance(how, Procedure) and how.step_count(subject.images_per_client) > 1:
        untold.append("step size and number of steps apart: only their product shows.")
    if not base_known:
        untold.append("base weights of a neighboring round of the same training.")
    return untold


def statistics_findings(
    subject: Subject, network: nn.Module, tensors: Mapping[str, Tensor], *, kind: str
) -> list[Remark]:
    """What running statistics say, where they were sent: for sure, if the base weights are right."""
    seen = running_statistics(network, tensors, is_difference=kind == "difference")
    if seen is None:
        return []
    if not seen.moved:
        if subject.norm_mode == "eval" or seen.frozen:
            return []
        says = "The norm mode does not fit: running statistics did not move, so norms were in eval mode."
        remedy = 'Subject(norm_mode="eval"), unless the client sends statistics that it does not keep.'
        return [Remark(about="norm mode", says=says, remedy=remedy, is_problem=True)]
    if subject.norm_mode == "eval":
        says = "The norm mode does not fit: running statistics moved, so norms were in train mode."
        return [Remark(about="norm mode", says=says, remedy='Subject(norm_mode="train").', is_problem=True)]
    return [_moved(), *_counted(subject, seen.batches)]


def _moved() -> Remark:
    says = "Running statistics moved: norms were in train mode, and the mean of the client's batches shows."
    return Remark(about="statistics", says=says)


def _counted(subject: Subject, batches: int | None) -> list[Remark]:
    how = subject.procedure
    if batches is None or not isinstance(how, Procedure):
        return []
    stated = how.step_count(subject.images_per_client)
    if batches == stated:
        return [Remark(about="steps", says=f"{batches} batches were counted, as the subject says.")]
    return [
        Remark(
            about="steps",
            says=(
                f"The number of steps does not fit: norms counted {batches} batches since the base weights, "
                f"the subject says {stated}."
            ),
            remedy=(
                "Correct the subject's epochs, batch_size or images_per_client; or its weights, if they are "
                "of another round."
            ),
            is_problem=True,
        )
    ]
