"""Pictures: scaled as the attacker would, in the order of the truth, failures in their place."""

from __future__ import annotations

import dataclasses
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from fedkl.config import AttackConfig
from fedkl.report import figures, pictures
from fedkl.report.collect import AttackRun
from fedkl.runs import RunDirectory


def run_of(tmp_path, *, found, truth, scaling, failed=(False, False, False)):
    config = AttackConfig(arms=("lock",), trials=1, batch_size=3)
    directory = RunDirectory.create(tmp_path / "run", config=config, version="0")
    directory.save_tensors("reconstructions/lock-0", {"reconstruction": found, "truth": truth})
    scores = [{"failed": lost, "psnr": None if lost else 20.0} for lost in failed]
    record = {"event": "trial", "arm": "lock", "trial": 0, "scaling": scaling, "scores": scores}
    summary = {"arms": [{"name": "lock"}]}
    return AttackRun(name="run", directory=directory, config=config, summary=summary, records=[record])


def test_a_batch_is_shown_in_the_order_of_the_truth(tmp_path):
    truth = torch.rand(3, 3, 8, 8)
    grid = pictures.grid(run_of(tmp_path, found=5 * truth.flip(0) - 2, truth=truth, scaling="prior"))
    for row, true in zip(grid.rows, truth, strict=True):
        assert torch.equal(row.cells[0].image, true)
        both = torch.stack([row.cells[1].image.flatten(), true.double().flatten()])
        assert torch.corrcoef(both)[0, 1] > 0.98
        assert row.cells[1].image.min() == 0
        assert row.cells[1].image.max() == 1


def test_clip_does_not_stretch(tmp_path):
    truth = torch.rand(3, 3, 8, 8)
    grid = pictures.grid(run_of(tmp_path, found=truth * 0.5, truth=truth, scaling="clip"))
    assert torch.allclose(grid.rows[0].cells[1].image.float(), truth[0] * 0.5)


def test_a_failure_keeps_its_place(tmp_path):
    truth = torch.rand(3, 3, 8, 8)
    found = truth.clone()
    found[1] = float("nan")
    failed = (False, True, False)
    grid = pictures.grid(run_of(tmp_path, found=found, truth=truth, scaling="clip", failed=failed))
    assert [row.cells[1].caption for row in grid.rows] == ["20.0 dB", "failed", "20.0 dB"]
    assert grid.rows[1].cells[1].image is None
    assert grid.rows[0].cells[1].image is not None


def test_figures_are_png_for_any_number_of_channels(tmp_path):
    for channels in (1, 2, 3, 4):
        assert figures.thumbnail(torch.rand(channels, 4, 4)).startswith(b"\x89PNG")


@pytest.mark.parametrize(("height", "width"), [(40, 28), (28, 40), (28, 28)])
def test_captions_below_pictures_of_any_shape_are_whole(height, width):
    cells = [pictures.Picture(torch.zeros(1, height, width), "9.4 dB", "")] * 2
    grid = pictures.Grid(["original", "lock"], [pictures.Row("", cells)] * 2, 2, [])
    ink = np.asarray(Image.open(BytesIO(figures.picture_grid(grid))).convert("L")) < 128
    assert not any(edge.any() for edge in (ink[:8], ink[-8:], ink[:, :8], ink[:, -8:]))
    lines = np.diff(np.flatnonzero(ink.any(1))) > 1
    assert lines.sum() == 4  # titles, pictures, captions, pictures, captions


@pytest.mark.parametrize("scaling", ["clip", "prior"])
@pytest.mark.parametrize("value", [1e300, -1e300, 1e-300, 0.0, float("inf")])
def test_numbers_of_any_size_make_a_picture_or_a_problem(tmp_path, scaling, value):
    found = torch.rand(3, 3, 8, 8, dtype=torch.float64) * value
    grid = pictures.grid(run_of(tmp_path, found=found, truth=torch.rand(3, 3, 8, 8), scaling=scaling))
    assert len(grid.rows) == 3
    assert figures.picture_grid(grid).startswith(b"\x89PNG")


def test_pictures_of_another_batch_are_a_problem(tmp_path):
    run = run_of(tmp_path, found=torch.rand(2, 3, 8, 8), truth=torch.rand(2, 3, 8, 8), scaling="clip")
    grid = pictures.grid(run)
    assert len(grid.problems) == 1
    assert "lock, trial 1: expected 3 pictures, got 2" in grid.problems[0]
    assert all(row.cells[1].image is None for row in grid.rows)


def test_no_more_rows_are_made_than_are_shown(tmp_path):
    """However many trials and images the configuration claims."""
    run = run_of(tmp_path, found=torch.rand(3, 3, 8, 8), truth=torch.rand(3, 3, 8, 8), scaling="clip")
    config = run.config.model_copy(update={"trials": 10**12, "batch_size": 10**12})
    grid = pictures.grid(dataclasses.replace(run, config=config, records=[]))
    assert len(grid.rows) == 8
    assert len(grid.problems) == 1
    config = run.config.model_copy(update={"trials": 10**12})
    assert len(pictures.grid(dataclasses.replace(run, config=config)).rows) == 8
