"""The one rule for what figures say: a leak, nothing above the floor, or nothing at all."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fedkl import wording

Kind = Literal["leaks", "at the floor", "says nothing", "control"]

CONTROL_SHARE = 0.9
"""Share of the control's images that an attack must recover or identify before its failure says anything."""

CONTROL_LOW = 0.5
"""Lower end of that share's interval, at least: an attack that works half the time finds both of two."""

SAFE_FROM = 100
"""Images below which no figures are said to be at the floor."""

UPDATES_FROM = 6
"""Updates below which none are: an attack rebuilds the images of an update, or does not."""


class Areas(NamedTuple):
    """Areas under the curve of recognizing, in [0, 1]; 0.5 is chance.

    Attributes:
        surely: Lower end of the 99.9 % interval; 95 % would be crossed by chance in one of forty lines.
        high: Upper end of the 95 % interval.
        control_low: Lower end of the control's 95 % interval.
    """

    surely: float
    high: float
    control_low: float


SHOWN: dict[Kind, str] = {
    "leaks": "leaks",
    "at the floor": "at the floor",
    "says nothing": "undecided",
    "control": "control",
}
"""Kinds as readers are shown them: beside "0 %", "says nothing" reads like "reveals nothing"."""


class Verdict(NamedTuple):
    """What the figures of one attack against one client say.

    Attributes:
        kind: ``"leaks"``: more is found than a guess from the labels finds. ``"at the floor"``: no more, by
            an attack that succeeds on the same client with nothing hidden. ``"says nothing"``: neither can be
            said. ``"control"``: nothing was hidden; such figures test the attack.
        reason: Why, with the numbers.
    """

    kind: Kind
    reason: str

    @property
    def text(self) -> str:
        """Both in one phrase, for readers."""
        return f"{SHOWN[self.kind]}: {self.reason}"


def judge(
    found: Mapping[str, Any],
    *,
    floor: Mapping[str, Any] | None,
    control: Mapping[str, Any] | None,
    chance: float = 1.0,
    open: bool = False,
) -> Verdict:
    """The verdict on the figures of one attack.

    A leak that is seen counts in any case. That none is seen counts only where the same attack succeeds on
    the control, and with enough images.

    Args:
        found: Its figures: the shares ``identified`` and, if measured, ``success`` (recovered), each with
            rate, low, high and n; and of how many images it ``broke``, and how many ``updates`` it attacked.
        floor: The same of the guess from the labels alone, on the same images; None: not known.
        control: The same of this attack on the same client with nothing hidden; None: not run.
        chance: Share that random pictures identify at most; it takes the floor's place in runs without one.
        open: Whether nothing was hidden here either.
    """
    if open:
        return Verdict("control", f"attack {'succeeds' if _succeeds(_best(found)) else 'too weak'}")
    leak = _leak(found, floor, chance)
    if leak is not None:
        return Verdict("leaks", leak)
    missing = "what the labels alone give away is not known"
    if floor is not None:
        names = [name for name in ("identified", "success") if found.get(name) and floor.get(name)]
        pairs = [(found[name], floor[name]) for name in names]
        missing = _missing(found, pairs, control=None if control is None else _best(control))
    if missing:
        return Verdict("says nothing", missing)
    return Verdict("at the floor", "resists this attack")


def judge_share(
    found: Mapping[str, Any],
    *,
    floor: Mapping[str, Any] | None,
    control: Mapping[str, Any] | None,
    what: str,
) -> Verdict:
    """The same rule for one share of a client's images: of those rebuilt, or of those identified.

    Args:
        found: The share, with rate, low, high and n; ``broke`` and ``updates`` as in `judge`.
        floor: The same without the update; None: not known.
        control: The same of this attack on the same client with nothing hidden; None: not run.
        what: What happened to an image that counts: ``"rebuilt"``, of which one is a leak where a guess
            rebuilds none, or ``"identified"``.
    """
    above = _above_rare if what == "rebuilt" else _above
    if floor is not None and above(found, floor):
        return Verdict("leaks", f"{wording.count(found)} images {what}")
    missing = "what is found without the update is not known"
    if floor is not None:
        missing = _missing(found, [(found, floor)], control=control)
    if missing:
        return Verdict("says nothing", missing)
    return Verdict("at the floor", "resists this attack")


def judge_presence(
    found: Mapping[str, Any],
    *,
    at_threshold: Mapping[str, Any],
    floor: Mapping[str, Any],
    control: Mapping[str, Any] | None,
    areas: Areas | None,
) -> Verdict:
    """The same rule for the share of a client's images that are recognized as trained on.

    Where nothing is hidden that share may be anything: it tells how much a client leaks, more than how good
    the attack is. So the control has to leak, and what is found must surely be less than half of it: as a
    share, or as an advantage over chance (area − 0.5), which few clients tell better.

    Args:
        found: The share, with rate, low, high and n.
        at_threshold: The same with an interval at the threshold as it was estimated; `floor` is at it, too.
        floor: The same of images that were not trained on.
        control: The same of this attack on the same client with nothing hidden; None: not run.
        areas: Of both; None where there is no control.
    """
    if _above(at_threshold, floor):
        return Verdict("leaks", f"{wording.count(found)} images recognized")
    if control is None or areas is None:
        return Verdict("says nothing", "its control was not attacked")
    if _perhaps_above(at_threshold, floor):
        return Verdict("says nothing", "more than of images that the client does not have, but not surely")
    if control["low"] <= floor["high"]:
        return Verdict("says nothing", f"the attack finds only {wording.count(control)} of its control")
    if found["n"] < SAFE_FROM:
        return Verdict("says nothing", f"too few images, {found['n']} of {SAFE_FROM}")
    if areas.surely > 0.5:
        return Verdict(
            "says nothing", "more is recognized than by chance, but not surely at few false alarms"
        )
    advantage, most = areas.high - 0.5, areas.control_low - 0.5
    if found["high"] < control["low"] / 2 or advantage < most / 2:
        return Verdict("at the floor", f"the same attack recognizes {wording.count(control)} of its control")
    return Verdict("says nothing", f"too few clients to tell from its control, {wording.count(control)}")


def _leak(found: Mapping[str, Any], floor: Mapping[str, Any] | None, chance: float) -> str | None:
    """What lies above the floor, in words."""
    recovered = found.get("success")
    if recovered and _above_rare(recovered, floor.get("success") if floor else None):
        return f"{wording.count(recovered)} images recovered"
    if found["identified"]["low"] > (floor["identified"]["high"] if floor else chance):
        return f"{wording.count(found['identified'])} images identified"
    return None


def _above_rare(found: Mapping[str, Any], floor: Mapping[str, Any] | None) -> bool:
    """Whether more is rebuilt than a guess rebuilds, which is seldom any: then one image is more."""
    if floor is None or not wording.hits(floor):
        return bool(wording.hits(found))
    return _above(found, floor)


def _above(found: Mapping[str, Any], floor: Mapping[str, Any]) -> bool:
    """Whether more is found than without the update, by both intervals."""
    return bool(found["low"] > floor["high"])


def _perhaps_above(found: Mapping[str, Any], floor: Mapping[str, Any]) -> bool:
    """Whether the interval of the difference lies above 0: too little for a leak, too much for "no more".

    Source:
        Newcombe 1998, "Interval estimation for the difference between independent proportions", method 10.
    """
    spread = math.hypot(found["rate"] - found["low"], floor["high"] - floor["rate"])
    return bool(found["rate"] - floor["rate"] > spread)


def _succeeds(share: Mapping[str, Any]) -> bool:
    return float(share["rate"]) >= CONTROL_SHARE


def _missing(
    about: Mapping[str, Any],
    pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    *,
    control: Mapping[str, Any] | None,
) -> str:
    """What it would take to say that there is no leak; empty if nothing.

    Args:
        about: Of how many images the attack broke, and how many updates it attacked.
        pairs: Shares, each with its floor.
        control: The share by which the control is judged.
    """
    if control is None:
        return "its control was not attacked"
    if not _succeeds(control):
        return f"the attack finds only {wording.count(control)} of its control"
    if float(control["low"]) < CONTROL_LOW:
        return f"too few of its control were attacked, {control['n']}"
    n = pairs[0][0]["n"]
    if about.get("broke"):
        return f"the attack broke on {about['broke']} of {n} images"
    images = min(each["n"] for pair in pairs for each in pair)
    if images < SAFE_FROM:
        return f"too few images, {images} of {SAFE_FROM}"
    updates = about.get("updates", UPDATES_FROM)
    if updates < UPDATES_FROM:
        number = "one update, as good as one trial" if updates == 1 else f"{updates} updates only"
        return f"{n} images of {number}"
    if any(_perhaps_above(*pair) for pair in pairs):
        return "more than without the update, but not surely"
    return ""


def _best(found: Mapping[str, Any]) -> Mapping[str, Any]:
    """By which a control is judged.

    Some attacks find an image without its contrast, or one that is only like it: they identify what they do
    not recover.
    """
    shares = [found[name] for name in ("success", "identified") if found.get(name)]
    best: Mapping[str, Any] = max(shares, key=lambda share: float(share["rate"]))
    return best
