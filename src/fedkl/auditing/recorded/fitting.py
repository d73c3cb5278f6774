"""Whether a recorded update fits a subject: everything that is wrong with it, before any attack."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from fedkl import rng
from fedkl.auditing.recorded.explaining import Remark, comparison_findings, statistics_findings
from fedkl.auditing.recorded.likeness import CLIENTS
from fedkl.auditing.recorded.naming import Naming, naming
from fedkl.auditing.recorded.playing import Explanation, explained
from fedkl.auditing.recorded.update import RecordedUpdate
from fedkl.auditing.subject import Subject
from fedkl.errors import ConfigError, shown
from fedkl.protocol import Procedure, trained_parameters

_NAMED = 5  # tensors that one sentence names
_LEAST_CLIENTS = 40
_ALIGNED = 0.7  # the cosine with the base weights from which numbers are weights
_SMALL = 0.1  # of the base weights' norm: what is smaller is no weights

_Play = Callable[[Mapping[str, Tensor]], Explanation]
_About = Literal["names", "shapes", "values", "kind", "procedure", "base weights"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Fit:
    """Whether an update fits a subject, and why not.

    Attributes:
        problems: What is wrong. While there are any, a failed attack says nothing of the client.
        findings: What the update gives away, and what was taken for granted.
        untold: What cannot be told from one update.
        names: The network's name of each tensor of the file.
        update: What attacks take, by the network's names: the gradient, or (before − after) / lr; of a
            function that trains before − after. None, if the file does not hold it.
    """

    problems: tuple[Remark, ...]
    findings: tuple[Remark, ...]
    untold: tuple[str, ...]
    names: Mapping[str, str] = field(repr=False)
    update: Mapping[str, Tensor] | None = field(repr=False)

    @property
    def fits(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def __str__(self) -> str:
        lines = ["The update does not fit." if self.problems else "The update fits."]
        lines += [f"  - {finding}" for finding in (*self.problems, *self.findings)]
        lines += [f"  - cannot be told from one update: {what}" for what in self.untold]
        renamed = {theirs: own for theirs, own in self.names.items() if theirs != own}
        lines += [f"    {shown(theirs)} is {shown(own)}" for theirs, own in renamed.items()]
        return "\n".join(lines)


def fits(
    subject: Subject,
    recorded: RecordedUpdate,
    *,
    clients: int = CLIENTS,
    generator: torch.Generator | None = None,
) -> Fit:
    """Tells what is wrong with a recorded update, or with what the subject says of its client.

    First what is certain: names, shapes, values, what the numbers are. Where that holds, `clients` clients
    of the subject are played on its images, and the update is held beside theirs.

    Args:
        subject: The model with the weights that the client received, and what the client did with them.
        recorded: What it sent.
        clients: How many clients are played each time; at least 40.
        generator: Draws their images; one that is always the same if None.

    Raises:
        ConfigError: The subject's network cannot be built, or `clients` is too small.
        DataError: The network cannot be called with the subject's images, or clients cannot be played.

    >>> images, labels = torch.rand(50, 1, 8, 8), torch.arange(50) % 10
    >>> subject = Subject(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), images=images,
    ...                   labels=labels)
    >>> print(fits(subject, RecordedUpdate(tensors={"1.weight": torch.ones(10, 64)})))
    The update does not fit.
      - names: '1.bias' is missing. Save the tensors of all parameters.
    """
    if clients < _LEAST_CLIENTS:
        raise ConfigError(f"fits: expected at least {_LEAST_CLIENTS} clients to be played, got {clients}.")
    subject.check()
    network = subject.build()
    found = naming(network, recorded.tensors)
    tensors = found.renamed(recorded.tensors)
    problems = [*_naming_problems(found), *_value_problems(recorded.tensors)]
    findings = _naming_findings(found, recorded.kind)
    if not problems:
        problems += _setting_problems(subject, recorded)
        problems += _base_problems(network, found, recorded)
        problems += _kind_problems(network, tensors, recorded)
    if problems:
        is_there = not {each.about for each in problems} - {"procedure", "base weights"}
        update = _descent(subject, network, tensors, kind=recorded.kind) if is_there else None
        return _fit(problems, findings, [], found, update)
    chance = generator or rng.generator(0, "recorded-update")
    play = partial(explained, subject, clients=clients, generator=chance)
    foreign = _foreign_problem(network, tensors, play) if recorded.kind == "weights" else None
    if foreign:
        return _fit([foreign], findings, [], found, None)
    update = _descent(subject, network, tensors, kind=recorded.kind)
    compared, untold = comparison_findings(subject, play(update), base_known=recorded.received is not None)
    compared += statistics_findings(subject, network, tensors, kind=recorded.kind)
    problems += [finding for finding in compared if finding.is_problem]
    findings += [finding for finding in compared if not finding.is_problem]
    return _fit(problems, findings, untold, found, update)


def _fit(
    problems: Sequence[Remark],
    findings: Sequence[Remark],
    untold: Sequence[str],
    found: Naming,
    update: Mapping[str, Tensor] | None,
) -> Fit:
    return Fit(
        problems=tuple(problems),
        findings=tuple(findings),
        untold=tuple(untold),
        names=found.names,
        update=update,
    )


def _problem(about: _About, says: str, remedy: str) -> Remark:
    return Remark(about=about, says=says, remedy=remedy, is_problem=True)


def _naming_problems(found: Naming) -> list[Remark]:
    problems = []
    if found.missing:
        problems.append(
            _problem("names", f"{_listed(found.missing)} missing.", "Save the tensors of all parameters.")
        )
    if found.unexpected:
        remedy = "Rename the tensors as the network's state_dict() does, or give that network."
        problems.append(_problem("names", f"{_listed(found.unexpected)} not of the network.", remedy))
    for shape in found.shapes:
        remedy = "Give the subject the client's own architecture, or save tensors without transposing them."
        problems.append(_problem("shapes", f"{shape}.", remedy))
    return problems


def _naming_findings(found: Naming, kind: str) -> list[Remark]:
    findings = [Remark(about="names", says=f"The file has {found.how}.")] if found.how else []
    if found.missing_buffers and kind == "weights":
        says = f"{_listed(found.missing_buffers)} not in the file, and nothing is said of them."
        findings.append(Remark(about="statistics", says=says))
    return findings


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    text = ", ".join(map(shown, names[:_NAMED])) + (f" and {more} more" if more > 0 else "")
    return f"{text} {'is' if len(names) == 1 else 'are'}"


def _value_problems(tensors: Mapping[str, Tensor]) -> list[Remark]:
    bad = [name for name, tensor in tensors.items() if not tensor.isfinite().all()]
    problems = []
    if bad:
        remedy = "The training diverged, or the file is damaged: record another round."
        problems.append(_problem("values", f"{_listed(bad)} not finite.", remedy))
    if tensors and not any(bool(tensor.any()) for tensor in tensors.values()):
        remedy = "Save the update before it is reset, e.g. before zero_grad()."
        problems.append(_problem("values", "All numbers are zero.", remedy))
    return problems


def _setting_problems(subject: Subject, recorded: RecordedUpdate) -> list[Remark]:
    """What the record says of the client, and the subject otherwise."""
    problems, how = [], subject.procedure
    sends_gradient = isinstance(how, Procedure) and how.algorithm == "fedsgd"
    if (recorded.kind == "gradient") != sends_gradient:
        says = "a gradient" if recorded.kind == "gradient" else "of local training"
        expected = "gradients" if sends_gradient else "weights after local training"
        remedy = "Correct the subject's procedure, or the kind of the recorded update."
        problems.append(
            _problem("procedure", f"The file is {says}, the subject's clients send {expected}.", remedy)
        )
    if recorded.images not in (None, subject.images_per_client):
        says = (
            f"The client trained on {recorded.images} images, the subject says {subject.images_per_client}."
        )
        problems.append(_problem("procedure", says, f"Subject(images_per_client={recorded.images})."))
    return problems


def _base_problems(network: nn.Module, found: Naming, recorded: RecordedUpdate) -> list[Remark]:
    """What the client received is what it started from: compared exactly."""
    if recorded.received is None:
        return []
    base, received = network.state_dict(), found.renamed(recorded.received)
    other = [name for name, tensor in received.items() if not _same(tensor, base[name])]
    if not other:
        return []
    says = (
        f"These base weights do not fit: {len(other)} of {len(received)} tensors are not those that the "
        f"client received, e.g. {shown(other[0])}."
    )
    return [_problem("base weights", says, "Give the subject the weights in `recorded.received`.")]


def _same(received: Tensor, base: Tensor) -> bool:
    if received.shape != base.shape:
        return False
    return bool(torch.allclose(received.double(), base.double(), rtol=1e-6, atol=1e-7))


def _kind_problems(
    network: nn.Module, tensors: Mapping[str, Tensor], recorded: RecordedUpdate
) -> list[Remark]:
    """Weights resemble weights, in direction or in the size of each tensor; updates do not."""
    parameters = _held(network, tensors)
    if recorded.kind == "weights" and all(_equal(tensors[name], base) for name, base in parameters.items()):
        remedy = "Save the weights after the training, and give the subject those before it."
        return [
            _problem("values", "The file holds the base weights themselves: nothing was trained.", remedy)
        ]
    buffers = [name for name in tensors if name not in parameters]
    if recorded.kind == "gradient" and buffers:
        says = f"{_listed(buffers)} no parameter, and only parameters have a gradient."
        return [_problem("kind", says, 'Say kind="weights" or kind="difference".')]
    if recorded.kind == "weights" or _alignment(tensors, parameters) < _ALIGNED:
        return []
    says = f"The file is called a {recorded.kind}, and its numbers are weights."
    return [_problem("kind", says, 'Say kind="weights".')]


def _equal(tensor: Tensor, base: Tensor) -> bool:
    return torch.equal(tensor.to(base.dtype), base)


def _alignment(tensors: Mapping[str, Tensor], base: Mapping[str, Tensor]) -> float:
    """The cosine with the base weights: near 1 for weights after some training, and not for updates."""
    mine = _joined({name: tensors[name] for name in base}).double()
    return float(torch.cosine_similarity(mine, _joined(base).double(), dim=0))


def _foreign_problem(network: nn.Module, tensors: Mapping[str, Tensor], play: _Play) -> Remark | None:
    """What are said to be weights, and are far from the base weights: an update, or another training's."""
    base = _held(network, tensors)
    if _alignment(tensors, base) >= _ALIGNED:
        return None
    update = {name: tensors[name].to(torch.float32) for name in base}
    sizes = [float(each.double().norm()) for each in (_joined(update), _joined(base))]
    if sizes[0] < _SMALL * sizes[1] or play(update).otherwise != "unknown":
        says = "The file is said to hold weights, and its numbers are a gradient or a difference of weights."
        return _problem("kind", says, 'Say kind="gradient" or kind="difference".')
    says = "These base weights do not fit: the file holds weights of another training."
    return _problem("base weights", says, "Give the weights that the client received in that round.")


def _held(network: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters that a file holds: all, or all that are not frozen."""
    return {name: tensor.detach() for name, tensor in network.named_parameters() if name in tensors}


def _joined(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors.values()])


def _descent(
    subject: Subject, network: nn.Module, tensors: Mapping[str, Tensor], *, kind: str
) -> dict[str, Tensor]:
    """The gradient, or (before − after) / lr."""
    lr = subject.procedure.lr if isinstance(subject.procedure, Procedure) else 1.0
    found = {}
    for name, parameter in trained_parameters(network).items():
        tensor, base = tensors[name].to(torch.float32), parameter.detach()
        found[name] = (
            tensor if kind == "gradient" else -tensor / lr if kind == "difference" else (base - tensor) / lr
        )
    return found
