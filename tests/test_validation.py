"""Messages about fields: their place as in TOML, and what there is instead of an unknown one."""

from __future__ import annotations

import pytest

from fedkl import config as configs
from fedkl.errors import ConfigError


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"type": "attack", "attack": {"type": "ig", "evaluations": 20}},
            "attack.evaluations: 'ig' has no such field; expected one of iterations, restarts,",
        ),
        (
            {"type": "attack", "attack": {"type": "ig", "tv": "x"}},
            "attack.tv: Input should be a valid number",
        ),
        ({"type": "attack", "attack": {"type": "magic"}}, "attack: unknown type 'magic'"),
        ({"type": "attack", "nme": 1}, "nme: 'attack' has no such field; expected one of seed, data, model,"),
        (
            {"type": "attack", "lock": {"x": 1}},
            "defense.x: 'keylock' has no such field; expected one of layers,",
        ),
        (
            {"type": "train", "data": {"train": 1}},
            "data.train: no such field here; expected one of name, root,",
        ),
        (
            {"type": "train", "training": {"schedule": {"type": "step", "step": 1}}},
            "training.schedule.step: 'step' has no such field; expected one of milestones,",
        ),
        (
            {"type": "train", "defense": {"type": "public-norm", "like": {"x": 1}}},
            "defense.like.x: 'keylock' has no such field; expected one of layers,",
        ),
        (
            {"type": "train", "training": {"local": {"lr": "x"}}},
            "training.local.lr: Input should be a valid number",
        ),
        (
            {"type": "train", "training": {"train": {"train": 1}}},
            "training.train: no such field here; expected",
        ),
    ],
)
def test_places_and_alternatives(values, line):
    with pytest.raises(ConfigError) as caught:
        configs.parse(values, source="here")
    assert any(found.startswith(f"  - {line}") for found in str(caught.value).splitlines()), caught.value


def test_no_line_is_cut_before_its_end():
    """Of every class of an experiment all fields fit in a line."""
    for kind in configs.ATTACKS:
        with pytest.raises(ConfigError) as caught:
            configs.parse({"type": "attack", "attack": {"type": kind, "magic": 1}}, source="here")
        assert "…" not in str(caught.value)
