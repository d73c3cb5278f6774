from __future__ import annotations

import json

import pytest
import torch

from fedkl.config import AttackConfig, TrainConfig
from fedkl.errors import ConfigError
from fedkl.files import exclusive
from fedkl.runs import RunDirectory, write_text


def create(path, config=None):
    return RunDirectory.create(path, config=config or TrainConfig(), version="0")


def test_a_run_is_continued_with_the_same_configuration_only(tmp_path):
    run = create(tmp_path / "run")
    run.append({"event": "round", "round": 0})
    again = create(tmp_path / "run")
    assert list(again.results()) == [{"event": "round", "round": 0}]
    with pytest.raises(ConfigError, match="another configuration"):
        create(tmp_path / "run", AttackConfig())
    assert list(again.results()) == [{"event": "round", "round": 0}]


def test_foreign_folders_are_not_written_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    run = create(tmp_path / "run")
    run.append({"a": 1})
    with (run.path / "results.jsonl").open("a") as file:
        file.write('{"a": 2, "b')
    assert list(run.results()) == [{"a": 1}]
    run = create(tmp_path / "run")
    run.append({"a": 3})
    assert list(run.results()) == [{"a": 1}, {"a": 3}]


def test_a_damaged_line_in_the_middle_is_named(tmp_path):
    run = create(tmp_path / "run")
    write_text(run.path / "results.jsonl", '{"a": 1}\nnonsense\n{"a": 2}\n')
    with pytest.raises(ConfigError, match="line 2"):
        list(run.results())


def test_no_nan_in_results(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        create(tmp_path / "run").append({"psnr": float("nan")})


def test_a_finished_run_says_so(tmp_path):
    run = create(tmp_path / "run")
    assert run.summary is None
    run.finish({"accuracy": 0.5})
    assert RunDirectory.open(tmp_path / "run").summary == {"accuracy": 0.5}
    assert run.config == TrainConfig()


def test_tensors_survive(tmp_path):
    run = create(tmp_path / "run")
    tensors = {"x": torch.rand(3, 4).T}
    run.save_tensors("deep/inside", tensors)
    assert torch.equal(run.load_tensors("deep/inside")["x"], tensors["x"])
    (run.path / "deep/inside.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match="damaged"):
        run.load_tensors("deep/inside")
    with pytest.raises(ConfigError, match="missing"):
        run.load_tensors("nowhere")


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDirectory.open(tmp_path)


def test_the_environment_names_no_place(tmp_path):
    text = (create(tmp_path / "run").path / "environment.json").read_text()
    assert set(json.loads(text)) == {"fedkl", "python", "torch", "system", "cores", "threads", "gpu"}


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_one_process_at_a_time(tmp_path):
    pytest.importorskip("fcntl")
    with exclusive(tmp_path / "run"):
        with pytest.raises(ConfigError, match="another process"), exclusive(tmp_path / "run"):
            pass
    with exclusive(tmp_path / "run"):
        pass


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be written"), exclusive(tmp_path / "file" / "run"):
        pass
