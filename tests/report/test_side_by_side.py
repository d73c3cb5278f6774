"""Attacks on the same images side by side: the truth, what leaks, and what each attack finds elsewhere."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from PIL import Image

from fedkl import report
from fedkl.aggregation import MaskedAggregation
from fedkl.attacks import DLG, ClosedForm, LearnedInversion
from fedkl.defenses import KeyLock, own_arms
from fedkl.report.collect import collect
from fedkl.report.names import plain_names
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
        "original",
        "no protection",
        "lock",
        "lock, informed",
        "masks",
        "masks, informed",
    ]
    captions = [cell.caption for cell in found.grid.rows[0].cells]
    assert captions == ["", "identified", "", "identified", "", "failed"]
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
        "by chance 1 of 100. no protection (DLG) 2 of 2; lock (DLG) 0 of 2; lock, informed (the closed form) "
        "2 of 2; masks (DLG) 0 of 2; masks, informed (the closed form) 0 of 2; the guess from the labels "
        "alone 0 of 2",
        "never sees the true image",
    ):
        assert part in caption


def test_the_report_opens_with_it(folder):
    built = report.build(folder)
    html = built.html.read_text(encoding="utf-8")
    assert html.index("No protection:</strong> 2 of 2 images identified.") < html.index("What the server can")
    assert html.index("What the server can show") < html.index("no proof of safety") < html.index("<h2>")
    assert built.pictures == folder / "figures" / "side-by-side.png"
    assert built.pictures.read_bytes().startswith(b"\x89PNG")
    light, dark = (
        np.asarray(Image.open(folder / "figures" / f"side-by-side{kind}.png").convert("RGB")).astype(int)
        for kind in ("", "-dark")
    )
    assert light.shape == dark.shape
    assert (tuple(light[0, 0]), tuple(dark[0, 0])) == ((255, 255, 255), (13, 17, 23))
    ink = light[:60].max(-1) < 40  # of the titles
    assert ink.any()
    assert dark[:60][ink].min() > 150
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert re.search(r"^# .*\n\n\* \*\*No protection:\*\* 2 of 2 images identified\.\n", text)
    assert re.search(r"\n\n!\[2 images; columns: original; .*\]\(figures/side-by-side.png\)\n\n", text)


def test_the_first_screen_answers_in_plain_words(folder):
    found = compared(folder)
    assert [f"{sent}: {what}" for sent, what in found.answers] == [
        "No protection: 2 of 2 images identified.",
        "Lock: 0 of 2 images identified by an attacker who does not know how locks work, "
        "2 of 2 by one who does.",
        "Masks: 0 of 2 and 0 of 2 identified by the same attackers.",
    ]
    assert found.limits == (
        "By chance a picture is identified in 1 of 100 cases, and at least one of 2 pictures in 2.0 % of "
        "runs. 2 images show what happens; they do not prove it."
    )
    html = report.build(folder).html.read_text(encoding="utf-8")
    first, folded = html[: html.index("</details>")].split('<details class="runs">')
    assert all(what in first for _, what in found.answers)
    assert "In attack-dlg, DLG recovers" in folded
    assert not re.search("no-norm|public-norm", first.split("<main>")[1].replace("arm no-norm", ""))


def test_attackers_who_all_know_are_told_apart_by_name(tmp_path, attack_run):
    attack_run(KNOWING_RUN, name="a", attack=ClosedForm())
    attack_run(KNOWING_RUN, name="b", attack=LearnedInversion(), auxiliary=100)
    found = compared(tmp_path)
    assert "lock, learned inversion" in [" ".join(name.split()) for name in found.grid.columns]
    assert found.answers[1].found == "0 of 2 by the closed form, 0 of 2 by learned inversion."


def test_arms_of_one_plain_name_keep_their_own():
    arms = {arm.name: arm for arm in own_arms(KeyLock()).values()}
    names = plain_names({name: arms[name] for name in ("no-norm", "public-norm", "lock", "lock-known-key")})
    assert list(names.values()) == ["no protection", "lock, opened", "lock", "lock-known-key"]


@pytest.mark.parametrize(("contrast", "said"), [(1e-4, True), (0.1, False)])
def test_a_gray_picture_is_compared_and_that_is_said(folder, contrast, said):
    truth = torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    run = collect(folder).attacks[0].directory
    run.save_tensors("reconstructions/no-norm-0", {"reconstruction": 0.5 + contrast * truth, "truth": truth})
    found = compared(folder)
    cell = found.grid.rows[0].cells[1]
    assert (cell.image is None) is said
    assert cell.caption == "identified"  # what is too faint to be seen leaks all the same
    assert ("×: no picture that can be seen. Contrast too faint" in found.caption) is said


def test_what_protection_costs_stands_beside_what_it_stops(folder, train_run):
    train_run("a", accuracy=0.9)
    assert "What it costs" not in report.build(folder).html.read_text(encoding="utf-8")
    train_run("b", accuracy=0.8, defense=KeyLock())
    train_run("c", accuracy=0.9, aggregation=MaskedAggregation())
    html = report.build(folder).html.read_text(encoding="utf-8")
    said = "accuracy is 90.0 % without protection, 80.0 % with the lock, 90.0 % with masks."
    assert -1 < html.find(f"What it costs:</strong> {said}") < html.find("What the server can show")
    assert "lock: 80.0 %; no protection (plain network): 90.0 %" in html


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
