from __future__ import annotations

import errno
import json
import os
import shutil

import pytest
import torch

from fedkl.attacking.reconstructions import load_reconstruction, save_reconstruction
from fedkl.config import AttackConfig, TrainConfig
from fedkl.defenses import KeyLock, PrivateNorm, PublicNorm
from fedkl.errors import ConfigError
from fedkl.files import exclusive, write_atomically
from fedkl.runs import RunDirectory

SCORE = {
    "mse": 0.1, "psnr": 10.0, "ssim": 0.5, "correlation": 0.5, "psnr_raw": 9.0, "psnr_affine": 11.0,
    "ssim_affine": 0.6, "identified": True, "candidates": 100, "label_correct": None, "failed": False,
}  # fmt: skip
TRIAL = {
    "event": "trial", "arm": "lock", "trial": 0, "scaling": "prior", "scores": [SCORE | {"rank": 1}],
    "evaluations": 5, "loss": None, "elapsed": 1.5,
}  # fmt: skip
ROUND = {
    "event": "round", "round": 0, "accuracy": 0.5, "local_accuracy": None, "accuracies": {"client-0": 0.5},
    "local_accuracies": {}, "elapsed": 2, "seconds": 1.0, "dropped": [], "failed": {"client-1": "diverged"},
    "aggregated": True, "update_bytes": 8,
}  # fmt: skip
FILL_IN = {"event": "fill-in", "arm": "neutral", "statistics": "public", "accuracy": 1, "auxiliary": 0}
PARTITION = {"event": "partition", "class_counts": [[1, 2], [0, 3]]}


def create(path, config=None):
    return RunDirectory.create(path, config=config or TrainConfig(), version="0")


def test_a_run_is_continued_with_the_same_configuration_only(tmp_path):
    run = create(tmp_path / "run")
    run.append(ROUND)
    again = create(tmp_path / "run")
    assert list(again.results()) == [ROUND]
    with pytest.raises(ConfigError, match="another configuration"):
        create(tmp_path / "run", AttackConfig())
    assert list(again.results()) == [ROUND]


def without_norm_statistics(path):
    """As a version wrote it that knew no such field."""
    text = path.read_text()
    assert text.count('norm_statistics = "recalibrated"\n') == 1
    path.write_text(text.replace('norm_statistics = "recalibrated"\n', ""))


@pytest.mark.parametrize("defense", [KeyLock(), PrivateNorm(), PublicNorm()], ids=lambda d: d.type)
def test_a_training_from_before_recalibration_kept_its_statistics(tmp_path, defense):
    config = TrainConfig(defense=defense)
    run = create(tmp_path / "run", config)
    run.append(ROUND)
    without_norm_statistics(run.path / "config.toml")
    earlier = run.config
    assert earlier.training.norm_statistics == "kept"
    with pytest.raises(ConfigError, match=r"another configuration.*norm_statistics=kept"):
        create(tmp_path / "run", config)  # its rounds would be evaluated in two ways
    assert create(tmp_path / "run", earlier).config == earlier


def test_where_clients_keep_nothing_an_earlier_training_is_the_same(tmp_path):
    run = create(tmp_path / "run")
    run.append(ROUND)
    without_norm_statistics(run.path / "config.toml")
    assert run.config == TrainConfig()
    assert create(tmp_path / "run").config == TrainConfig()


def test_foreign_folders_are_not_written_to(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(ConfigError, match="not empty"):
        create(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("half", [b'{"event": "rou', b"\xff\xfe", b'{"a": "\xc3', b" ", b"[1]", b"{}", b"3"])
def test_a_line_that_was_cut_off_is_dropped(tmp_path, half):
    run = create(tmp_path / "run")
    run.append(ROUND)
    with (run.path / "results.jsonl").open("ab") as file:
        file.write(half)
    assert list(run.results()) == [ROUND]
    run = create(tmp_path / "run")
    run.append(TRIAL)
    assert list(run.results()) == [ROUND, TRIAL]


def test_a_last_line_without_its_end_that_says_everything_counts(tmp_path):
    run = create(tmp_path / "run")
    (run.path / "results.jsonl").write_text(json.dumps(ROUND) + "\n" + json.dumps(TRIAL))
    assert list(run.results()) == [ROUND, TRIAL]


def changed(record, **fields):
    return json.dumps(record | fields).encode()


def without(record, name):
    return json.dumps({key: value for key, value in record.items() if key != name}).encode()


NO_RECORDS = {
    "nonsense": b"nonsense",
    "a high byte": json.dumps(ROUND).encode().replace(b"0.5", b"0.\xff"),
    "nothing": b"",
    "a number": b"3",
    "a list": b"[1]",
    "null": b"null",
    "no event": b'{"round": 0}',
    "another event": b'{"event": "magic"}',
    "an event of a wrong kind": b'{"event": ["round"]}',
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep inside": changed(ROUND, more=1)[:-2] + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN": changed(ROUND, accuracy=float("nan")),
    "infinite": changed(ROUND, more=1)[:-2] + b"1e999}",
    "a million digits": changed(ROUND, more=1)[:-2] + b"1" * 10**6 + b"}",
    **{f"round without {name}": without(ROUND, name) for name in ("round", "accuracy")},
    **{f"trial without {name}": without(TRIAL, name) for name in TRIAL if name != "labels"},
    **{
        f"score without {name}": changed(TRIAL, scores=[{k: v for k, v in SCORE.items() if k != name}])
        for name in SCORE
    },
    **{f"fill-in without {name}": without(FILL_IN, name) for name in FILL_IN},
    **{f"round {value!r}": changed(ROUND, round=value) for value in (-1, 1.0, "0", True, None, 2**53)},
    **{f"accuracy {value!r}": changed(ROUND, accuracy=value) for value in (-0.1, 1.1, "1", [1], True)},
    **{f"local accuracies {value!r}": changed(ROUND, local_accuracies=value) for value in ([], {"a": 2})},
    **{
        f"counts {value!r}"[:60]: json.dumps({"event": "partition", "class_counts": value}).encode()
        for value in ([], [[]], [[1], [1, 2]], [[-1]], [[1.5]], 3, [[10**30]], [[0] * 10_001])
    },
    **{f"trial {value!r}": changed(TRIAL, trial=value) for value in (-1, "0", None, True)},
    **{f"arm {value!r}"[:60]: changed(TRIAL, arm=value) for value in ("../../x", "", 3, "a\n", "x" * 200)},
    **{f"scaling {value!r}": changed(TRIAL, scaling=value) for value in ("stretch", None, [])},
    **{f"scores {value!r}": changed(TRIAL, scores=value) for value in ([], [3], None, {})},
    **{f"psnr {value!r}": changed(TRIAL, scores=[SCORE | {"psnr": value}]) for value in ("1", [1], True)},
    "candidates": changed(TRIAL, scores=[SCORE | {"candidates": 0}]),
    "labels": changed(TRIAL, labels=[1, 2]),
    "elapsed": changed(TRIAL, elapsed=-1),
}


@pytest.mark.parametrize("line", NO_RECORDS.values(), ids=NO_RECORDS)
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    run = create(tmp_path / "run")
    good = json.dumps(ROUND).encode()
    (run.path / "results.jsonl").write_bytes(good + b"\n" + line + b"\n" + good + b"\n")
    for continued in (False, True):
        with pytest.raises(
            ConfigError, match=r"results\.jsonl: line 2 is damaged \(.*\)\. Remove it"
        ) as caught:
            list(run.results(continued=continued))
        assert len(str(caught.value)) < 2000


@pytest.mark.parametrize("name", [name for name in ROUND if name not in ("event", "local_accuracies")])
def test_going_on_takes_more_of_a_round_than_reading_it(tmp_path, name):
    run = create(tmp_path / "run")
    (run.path / "results.jsonl").write_bytes(without(ROUND, name) + b"\n")
    if name not in ("round", "accuracy"):
        assert len(list(run.results())) == 1
    with pytest.raises(ConfigError, match=f"line 1 is damaged .*{name}"):
        list(run.results(continued=True))


def test_every_record_is_read_as_it_was_written(tmp_path):
    run = create(tmp_path / "run")
    records = [PARTITION, ROUND, FILL_IN, TRIAL | {"labels": [3], "more": {"deep": [None]}}]
    for record in records:
        run.append(record)
    assert list(run.results()) == list(run.results(continued=True)) == records


def test_a_record_is_on_disk_when_it_was_appended(tmp_path, monkeypatch):
    """What is only in the system's memory a power failure loses: the file is synced, with all of the line."""
    run, synced = create(tmp_path / "run"), []
    fsync, path = os.fsync, run.path / "results.jsonl"

    def note(handle):
        if path.exists() and os.fstat(handle).st_ino == path.stat().st_ino:
            synced.append(path.read_bytes())
        fsync(handle)

    monkeypatch.setattr(os, "fsync", note)
    for count in (1, 2):
        run.append(ROUND)
        assert synced[-1].count(b"\n") == count
        assert len(synced) == count


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
    header = b'{"w":{"dtype":"F8_E8M0","shape":[4],"data_offsets":[0,4]}}'
    (run.path / "odd.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    with pytest.raises(ConfigError, match="damaged"):
        run.load_tensors("odd")


TRUTH = torch.rand(2, 3, 8, 8)
NO_PICTURES = {
    "nothing": {},
    "one of them": {"truth": TRUTH},
    "numbers": {"reconstruction": torch.ones(1), "truth": torch.ones(1)},
    "no batch": {"reconstruction": TRUTH[0].clone(), "truth": TRUTH[0].clone()},
    "none": {"reconstruction": TRUTH[:0].clone(), "truth": TRUTH[:0].clone()},
    "empty ones": {"reconstruction": torch.ones(2, 3, 0, 8), "truth": torch.ones(2, 3, 0, 8)},
    "other shapes": {"reconstruction": torch.ones(2, 3, 8, 7), "truth": TRUTH},
    "integers": {"reconstruction": torch.ones(2, 3, 8, 8, dtype=torch.int64), "truth": TRUTH},
    "integers too": {"reconstruction": TRUTH, "truth": torch.ones(2, 3, 8, 8, dtype=torch.int64)},
    "no numbers": {"reconstruction": TRUTH, "truth": torch.full((2, 3, 8, 8), torch.nan)},
    "too bright": {"reconstruction": TRUTH, "truth": TRUTH + 0.1},
    "too dark": {"reconstruction": TRUTH, "truth": TRUTH - 1},
}


@pytest.mark.parametrize("tensors", NO_PICTURES.values(), ids=NO_PICTURES)
def test_pictures_are_two_batches_of_one_shape(tmp_path, tensors):
    run = create(tmp_path / "run")
    run.save_tensors("reconstructions/lock-0", tensors)
    with pytest.raises(ConfigError, match=r"lock-0\.safetensors: holds no pictures"):
        load_reconstruction(run, "lock", trial=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e30, 0.5])
def test_what_an_attack_found_may_be_anything(tmp_path, value):
    run = create(tmp_path / "run")
    save_reconstruction(run, "lock", trial=0, reconstruction=torch.full_like(TRUTH, value), truth=TRUTH)
    found, truth = load_reconstruction(run, "lock", trial=0)
    assert torch.equal(truth, TRUTH)
    assert torch.equal(found, torch.full_like(TRUTH, value)) or value != value


def test_no_run(tmp_path):
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDirectory.open(tmp_path)


def test_the_environment_names_no_place(tmp_path):
    text = (create(tmp_path / "run").path / "environment.json").read_text()
    assert set(json.loads(text)) == {
        "version",
        "fedkl",
        "folders",
        "python",
        "torch",
        "system",
        "cores",
        "threads",
        "gpu",
    }


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"3", b"\xff", b'{"a": NaN}', b"[" * 100_000])
@pytest.mark.parametrize("name", ["summary", "environment"])
def test_a_damaged_file_is_named(tmp_path, name, content):
    run = create(tmp_path / "run")
    (run.path / f"{name}.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}\.json: missing or damaged \(.*\)\. Remove it"):
        getattr(run, name)


LINKS = ("config.toml", "environment.json", "results.jsonl", "summary.json", "reconstructions", "checkpoints",
         "tensorboard", "global.safetensors")  # fmt: skip


@pytest.mark.parametrize("name", LINKS)
def test_a_link_in_a_run_is_not_written_through(tmp_path, name):
    run = create(tmp_path / "run")
    run.append(ROUND)
    outside = tmp_path / "outside"
    if (run.path / name).exists():
        shutil.copy(run.path / name, outside)
    elif "." in name:
        outside.write_bytes(b"precious")
    else:
        outside.mkdir()
        (outside / ".x.0123abcd.part").write_text("precious")
        (outside / "lock-0.safetensors").write_text("precious")
    before = {path: path.read_bytes() for path in (outside, *outside.rglob("*")) if path.is_file()}
    (run.path / name).unlink(missing_ok=True)
    (run.path / name).symlink_to(outside)
    with pytest.raises(ConfigError, match=rf"run/{name}: a symbolic link; nothing is written through it"):
        create(tmp_path / "run")
    assert {path: path.read_bytes() for path in (outside, *outside.rglob("*")) if path.is_file()} == before
    assert (run.path / name).is_symlink()


def test_nor_is_one_that_comes_later(tmp_path):
    run = create(tmp_path / "run")
    (tmp_path / "precious").write_text("precious")
    for name in ("results.jsonl", "summary.json", "global.safetensors"):
        (run.path / name).symlink_to(tmp_path / "precious")
    with pytest.raises(ConfigError, match="cannot be written"):
        run.append(ROUND)
    run.finish({"accuracy": 0.5})
    run.save_tensors("global", {"x": torch.ones(1)})
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (run.path / "summary.json").is_symlink()


def test_the_run_itself_may_be_reached_through_a_link(tmp_path):
    create(tmp_path / "run").append(ROUND)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert list(create(tmp_path / "link").results()) == [ROUND]


def test_what_killed_writes_have_left_goes_and_nothing_else(tmp_path):
    run = create(tmp_path / "run")
    run.save_tensors("reconstructions/lock-0", {})
    (tmp_path / "precious").write_text("precious")
    for folder in (run.path, run.path / "reconstructions"):
        (folder / ".results.jsonl.0123abcd.part").write_text("half")
        (folder / ".thesis.part").write_text("precious")
        (folder / ".link.0123abcd.part").symlink_to(tmp_path / "precious")
    create(tmp_path / "run")
    for folder in (run.path, run.path / "reconstructions"):
        assert {path.name for path in folder.glob(".*")} == {".thesis.part", ".link.0123abcd.part"}
    assert (tmp_path / "precious").read_text() == "precious"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", ["config.toml", "results.jsonl"])
def test_nobody_waits_at_a_pipe(tmp_path, name):
    run = create(tmp_path / "run")
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    with pytest.raises(ConfigError, match=rf"{name}: cannot be read \(it is not an ordinary file"):
        create(tmp_path / "run")


@pytest.mark.parametrize("path", ["x" * 5000, "\0", "file"])
def test_what_is_no_folder_is_no_run(tmp_path, path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="not a run directory"):
        RunDirectory.open(tmp_path / path)


WRITES = {
    "append": lambda run: run.append(ROUND),
    "restart_from": lambda run: run.restart_from([ROUND]),
    "save_tensors": lambda run: run.save_tensors("global", {"x": torch.ones(1)}),
    "save_reconstruction": lambda run: save_reconstruction(
        run, "lock", trial=0, reconstruction=-TRUTH, truth=TRUTH
    ),
    "finish": lambda run: run.finish({"accuracy": 0.5}),
    "create": lambda run: create(run.path),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_full_disk_says_what_is_kept_and_how_to_go_on(tmp_path, monkeypatch, write):
    run = create(tmp_path / "run")
    run.append(TRIAL)
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        said = r"cannot be written \(No space left on device\)\. What was done so far is kept: make room"
        with pytest.raises(ConfigError, match=rf"run: {said}, then the same command goes on"):
            write(run)
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert {path: after[path][: len(content)] for path, content in before.items()} == before
    assert after.keys() == before.keys()
    write(run)  # there is room again
    assert TRIAL in list(run.results()) or write is WRITES["restart_from"]


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.replace", fail)
    with pytest.raises(OSError, match="No space"):
        write_atomically(path, b"new")
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
