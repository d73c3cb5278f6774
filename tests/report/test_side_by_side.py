"""Attacks on the same images side by side: the truth, what leaks, and what each attack finds elsewhere."""

from __future__ import annotations

import re

import pytest

from fedkl import report
from fedkl.attacks import DLG, ClosedForm
from fedkl.report.collect import collect
from fedkl.report.side_by_side import MAX_COLUMNS, side_by_side

DLG_RUN = {"no-norm": [40.0, 41.0], "public-norm": [9.0, 9.0], "lock": [6.0, 7.0], "masked": [3.0, 3.0]}
KNOWING_RUN = {"no-norm": [90.0, 90.0], "lock": [26.0, 27.0], "masked": [None, 4.0]}


@pytest.fixture
def folder(tmp_path, attack_run):
    attack_run(DLG_RUN, name="attack-dlg", attack=DLG(), identified=("no-norm", "public-norm"))
    identified = ("no-norm", "lock")
    attack_run(KNOWING_RUN, name="attack-knowing", attack=ClosedForm(), identified=identified)
    return tmp_path


def compared(path):
    return side_by_side(collect(path).attacks)


def test_each_defense_stands_between_the_truth_and_every_attack(folder):
    found = compared(folder)
    headings = [" ".join(name.split()) for name in found.grid.columns]
    assert headings == [
        "true image",
        "plain network, no lock: DLG",
        "key-lock, nothing private known: DLG",
        "key-lock, nothing private known: the closed form",
        "masked (blind): DLG",
        "masked (blind): the closed form",
    ]
    captions = [cell.caption for cell in found.grid.rows[0].cells]
    assert captions == ["", "40.0 dB", "6.0 dB", "26.0 dB", "3.0 dB", "failed"]
    assert not found.grid.problems


def test_the_caption_has_n_seed_identification_and_floor(tmp_path, attack_run):
    share = {"rate": 0.0, "low": 0.0, "high": 0.66, "n": 2}
    floor = {"success": share, "identified": share}
    attack_run(DLG_RUN, name="a", attack=DLG(), floor=floor, identified=("no-norm",))
    attack_run(KNOWING_RUN, name="b", attack=ClosedForm(), identified=("lock",))
    caption = compared(tmp_path).caption
    for part in (
        "first 2 of n = 2 images of mnist-sample",
        "untrained lenet, seed 0",
        "DLG on no-norm 2 of 2; DLG on lock 0 of 2; the closed form on lock 2 of 2; DLG on masked 0 of 2; "
        "the closed form on masked 0 of 2; the guess from the labels alone 0 of 2",
        "never sees the true image",
    ):
        assert part in caption


def test_the_report_opens_with_it(folder):
    built = report.build(folder)
    html = built.html.read_text(encoding="utf-8")
    assert html.index("What the server can show") < html.index("no proof of safety") < html.index("<h2>")
    assert built.pictures == folder / "figures" / "side-by-side.png"
    assert built.pictures.read_bytes().startswith(b"\x89PNG")
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert re.search(r"^# .*\n\n!\[2 images; columns: true image; .*\]\(figures/side-by-side.png\)\n\n", text)


@pytest.mark.parametrize("options", [{"seed": 1}, {"labels_known": False}, {"networks": "one"}])
def test_attacks_on_something_else_are_not_put_beside_each_other(folder, attack_run, options):
    attack_run(KNOWING_RUN, name="other", attack=ClosedForm(), **options)
    assert compared(folder) is None
    assert report.build(folder).pictures is None


def test_one_attack_has_its_own_pictures_only(tmp_path, attack_run):
    attack_run(DLG_RUN)
    assert compared(tmp_path) is None


def test_not_more_columns_than_a_page_has_room_for(folder, attack_run):
    for number in range(MAX_COLUMNS):
        attack_run(KNOWING_RUN, name=f"more-{number}", attack=ClosedForm())
    assert compared(folder) is None


def test_runs_that_hide_nothing_are_no_comparison(tmp_path, attack_run):
    for name in ("a", "b"):
        attack_run({"no-norm": [40.0, 41.0]}, name=name)
    assert compared(tmp_path) is None
