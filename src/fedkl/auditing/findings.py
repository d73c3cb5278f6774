"""From figures to findings: one rule, and a control for each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, cast

from fedkl.attacking.verdict import Areas, judge_presence, judge_share
from fedkl.auditing.plan import CONTROL, Planned
from fedkl.auditing.rebuilding import Rebuilt, knew
from fedkl.auditing.recognition import Pools, Recognized
from fedkl.auditing.results import Finding, Measured, Outcome, Question

_SHARES: dict[Question, str] = {"rebuilt": "success", "identified": "identified"}


def of_pictures(
    entry: Planned,
    rebuilt: Rebuilt,
    *,
    pools: Pools,
    earlier: Sequence[Finding],
    pictures: str,
    seconds: float,
) -> list[Finding]:
    """What an attacker rebuilt, and what of it is identified.

    Args:
        entry: Who attacked what.
        rebuilt: What came out.
        pools: Whose images were whose.
        earlier: Findings so far, for controls.
        pictures: Where they are kept, below the audit's folder.
        seconds: Of one core.
    """
    if entry.attacker is None:
        raise ValueError("the presence test rebuilds no pictures")
    figures = {"psnr": rebuilt.psnr, "ssim": rebuilt.ssim, "candidates": float(rebuilt.candidates)}
    if broke := rebuilt.found["broke"]:
        figures["broke"] = float(broke)
    found = []
    for question, name in _SHARES.items():
        share, floor = Measured(**rebuilt.found[name]), Measured(**rebuilt.floor[name])
        control = Measured(**rebuilt.control[name]) if rebuilt.control else None
        if control is None:
            control = _simplest(entry, question, earlier).share
        outcome, reason = _verdict(share, floor, control, what=question, of=rebuilt.found)
        found.append(
            Finding(
                question=question,
                attacker=entry.name,
                exposure=entry.exposure.name,
                threat_model=entry.attacker.threat_model,
                knew=knew(entry.attacker, entry.clients, pools),
                found=share,
                floor=floor,
                control=control,
                outcome=outcome,
                reason=reason,
                figures={name: value for name, value in figures.items() if value is not None},
                pictures=pictures,
                seconds=seconds,
                cut_short=rebuilt.cut_short,
            )
        )
    return found


def of_presence(
    entry: Planned,
    found: Recognized,
    open: Recognized | None,
    *,
    pools: Pools,
    earlier: Sequence[Finding],
    seconds: float,
) -> Finding:
    """How many images are recognized.

    Args:
        entry: What was looked at.
        found: Of the clients as they are.
        open: Of the same with nothing hidden; None where nothing is.
        pools: Whose images were whose.
        earlier: Findings so far, for controls.
        seconds: Of one core.
    """
    alarms = max(found.false_alarms, found.swapped or found.false_alarms, key=lambda rate: rate.high)
    share, floor = Measured(**found.share._asdict()), Measured(**alarms._asdict())
    control, least = _control_of_presence(entry, open, earlier)
    kind, reason = judge_presence(
        share.model_dump(),
        at_threshold=found.at_threshold._asdict(),
        floor=floor.model_dump(),
        control=None if control is None else control.model_dump(),
        areas=None if least is None else Areas(found.auc_surely, found.auc_high, least),
    )
    if found.clients == 1:
        reason += "; one client, so the intervals are by image and say nothing of others"
    checked = {
        "swapped_auc": found.swapped_auc,
        "control_auc_low": least,
        "low_at_threshold": found.at_threshold.low,
        "high_at_threshold": found.at_threshold.high,
    }
    own = pools.server_images
    return Finding(
        question="presence",
        attacker=entry.name,
        exposure=entry.exposure.name,
        threat_model="D",
        knew=f"{own} labeled images of the same kind, how clients train, and the images that it looks for",
        found=share,
        floor=floor,
        control=control,
        outcome=cast(Outcome, kind),
        reason=reason,
        figures={
            "auc": found.auc,
            "auc_low": found.auc_low,
            "auc_high": found.auc_high,
            "auc_surely": found.auc_surely,
            "false_alarms": found.false_alarms.rate,
            "clients": float(found.clients),
            **{name: value for name, value in checked.items() if value is not None},
        },
        seconds=seconds,
    )


def _control_of_presence(entry: Planned, open: Recognized | None, earlier: Sequence[Finding]) -> _Control:
    """What is recognized where nothing is hidden."""
    if open is not None:
        return _Control(Measured(**open.share._asdict()), open.auc_low)
    return _simplest(entry, "presence", earlier)


class _Control(NamedTuple):
    """What is found where nothing is hidden, and of presence the lower end of the area's interval."""

    share: Measured | None
    auc_low: float | None


def _simplest(entry: Planned, question: Question, earlier: Sequence[Finding]) -> _Control:
    """Where nothing is hidden, an attacker is held against the simplest update: one gradient of one image.

    Of a sum in the open, beside single updates behind masks, that is the one without masks.
    """
    if entry.clients.hides or entry.exposure.name == CONTROL:
        return _Control(None, None)
    for each in earlier:
        if (each.attacker, each.exposure, each.question) == (entry.name, CONTROL, question):
            if entry.control_hides:
                return _Control(each.control, each.figures.get("control_auc_low"))
            return _Control(each.found, each.figures.get("auc_low", 0.0))
    return _Control(None, None)


def _verdict(
    share: Measured, floor: Measured, control: Measured | None, *, what: str, of: Mapping[str, Any]
) -> tuple[Outcome, str]:
    kind, reason = judge_share(
        share.model_dump() | {name: of[name] for name in ("broke", "updates")},
        floor=floor.model_dump(),
        control=None if control is None else control.model_dump(),
        what=what,
    )
    return cast(Outcome, kind), reason
