"""What the report says of trainings: who took part, on what the accuracy is, how the images were divided."""

from __future__ import annotations

import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from fedkl import report
from fedkl.aggregation import MaskedAggregation
from fedkl.data import Dirichlet, Shards
from fedkl.defenses import KeyLock
from fedkl.report import figures
from fedkl.report.collect import collect
from fedkl.report.partitions import divisions
from fedkl.report.training_tables import training_table

SKEWED = [[9, 0, 1], [0, 8, 0]]
EVEN = [[5, 4, 1], [4, 4, 0]]


def table(path):
    made = training_table(collect(path).trains)
    return {row[0]: dict(zip(made.header, row, strict=True)) for row in made.rows}, made.notes


def test_runs_of_one_partition_share_a_figure(tmp_path, train_run):
    train_run("fedavg", class_counts=SKEWED, clients=2, partition=Dirichlet(alpha=0.1))
    train_run("fedkl", class_counts=SKEWED, clients=2, partition=Dirichlet(alpha=0.1), defense=KeyLock())
    html = report.build(tmp_path).html.read_text(encoding="utf-8")
    assert html.count("<figure>") == 1
    assert (tmp_path / "figures" / "partition.png").exists()
    assert "at each client (Dirichlet, α = 0.1) in fedavg, fedkl." in html
    assert "each of 2 clients has 8 to 10 images, of 1 to 2 of 3 classes" in html
    places = [html.index(each) for each in ("<h2>Training", "<figure>", "<caption><span>Training runs")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("mode", "defense", "said"),
    [
        ("blind", None, "blind masks"),
        ("pairwise", None, "pairwise masks"),
        ("both", KeyLock(), "keylock (layers first, normal key, softplus) and blind and pairwise masks"),
    ],
)
def test_masks_are_named_among_what_protects(tmp_path, train_run, mode, defense, said):
    train_run("plain")
    train_run("masked", aggregation=MaskedAggregation(mode=mode), defense=defense)
    rows, _ = table(tmp_path)
    assert (rows["plain"]["Defense"], rows["masked"]["Defense"]) == ("none", said)


def test_each_distinct_partition_has_a_figure_on_both_pages(tmp_path, train_run):
    train_run("a", class_counts=SKEWED, clients=2, partition=Shards(per_client=1))
    train_run("b", class_counts=EVEN, clients=2)
    html = report.build(tmp_path).html.read_text(encoding="utf-8")
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    captions = re.findall(r"<figcaption[^>]*>(.*?)</figcaption>", html)
    assert ["shards, 1 a client" in captions[0], "IID" in captions[1]] == [True, True]
    assert len(re.findall(r'<figure>\s*<img class="curves" src="data:[^"]+" alt="Heat map[^"]+">', html)) == 2
    named = re.findall(r"!\[Heat map[^\n]+\]\(figures/(.*?)\)", markdown)
    assert named == ["partition-1.png", "partition-2.png"]
    assert all((tmp_path / "figures" / name).exists() for name in named)


@pytest.mark.parametrize("counts", [None, [[3, 4]]], ids=["an older run", "a single client"])
def test_no_figure_without_a_division(tmp_path, train_run, counts):
    train_run("train", class_counts=counts)
    assert "<figure>" not in report.build(tmp_path).html.read_text(encoding="utf-8")


def test_of_many_clients_the_first_hundred_are_shown(tmp_path, train_run):
    train_run("train", clients=250, class_counts=[[1, 2]] * 250)
    (division,) = divisions(collect(tmp_path).trains)
    assert len(division.shown) == 100
    assert "The first 100 of 250 clients are shown." in division.caption
    assert "each of 250 clients" in division.alt


@pytest.mark.parametrize(("clients", "classes"), [(2, 2), (20, 10), (21, 10), (100, 100), (2, 100), (100, 2)])
def test_a_map_of_any_size_is_wide_and_not_too_high(clients, classes):
    counts = np.arange(clients * classes, dtype=np.int64).reshape(clients, classes)
    picture = Image.open(BytesIO(figures.partition_map(counts)))
    assert picture.width == 880
    assert picture.height <= 1.3 * picture.width


def test_more_samples_are_darker_and_none_is_white():
    counts = np.array([[0, 1], [50, 100]], dtype=np.int64).repeat(11, axis=0).repeat(6, axis=1)
    picture = np.asarray(Image.open(BytesIO(figures.partition_map(counts))).convert("L")).astype(int)
    top, bottom = picture.shape[0] // 5, picture.shape[0] // 2
    none, one, half, most = (picture[y, x] for y in (top, bottom + 100) for x in (200, 500))
    assert none == 255 > one > half > most


def test_own_classes_stand_beside_the_whole_test_set_only_where_they_differ(tmp_path, train_run):
    measured = {"local_accuracies": {"client-0": 0.95, "client-1": 0.99}, "summary": {"local_accuracy": 0.97}}
    train_run("even", **measured)
    _, notes = table(tmp_path)
    assert not [note for note in notes if "own training images" in note]
    train_run("skewed", partition=Dirichlet(), **measured)
    train_run("older", partition=Dirichlet())
    rows, notes = table(tmp_path)
    own = "On own classes, mean (min–max)"
    assert {name: row[own] for name, row in rows.items()} == {
        "even": "–",
        "skewed": "97.00 % (95.00–99.00)",
        "older": "–",
    }
    assert [note for note in notes if "own training images" in note]
    assert own in report.build(tmp_path).tables[0][1]


def test_the_papers_figure_is_for_iid_only(tmp_path, train_run):
    train_run("skewed", partition=Shards())
    assert "full MNIST" not in report.build(tmp_path).html.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("recorded", "said"), [(True, "shared"), (False, "private"), (None, "none"), ("absent", None)]
)
def test_norm_statistics_are_as_recorded(tmp_path, train_run, recorded, said):
    train_run("train", summary={} if recorded == "absent" else {"statistics_shared": recorded})
    rows, _ = table(tmp_path)
    assert rows["train"].get("Norm statistics") == said


def test_who_was_missing_is_noted_once_for_runs_alike(tmp_path, train_run):
    missing = {"dropped": 4, "failed": 1, "skipped_rounds": 2}
    train_run("a", clients=10, cohort=2, summary=missing)
    train_run("b", clients=10, cohort=2, summary=missing)
    train_run("complete", clients=2, summary=dict.fromkeys(missing, 0))
    train_run("older", clients=2)
    _, notes = table(tmp_path)
    assert notes[-1] == (
        "a, b: 2 of 10 clients sampled each round; dropouts of sampled clients: 4; updates refused: 1; "
        "rounds skipped for lack of updates: 2; 2 of 10 clients tested."
    )
    assert not [note for note in notes if "complete" in note or "older" in note]


def test_rounds_that_masks_lost_are_told_from_those_without_updates(tmp_path, train_run):
    train_run(
        "a", clients=2, summary={"skipped_rounds": 3, "lost_rounds": 2}, lost={1: "It cannot be opened."}
    )
    _, notes = table(tmp_path)
    assert (
        "rounds skipped for lack of updates: 1; rounds lost: 2, the first because: It cannot be opened."
        in notes[-1]
    )
