"""The whole report: what is on the page, what never is, and what it refuses."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil

import pytest

from fedkl import report
from fedkl.aggregation import MaskedAggregation
from fedkl.attacks import DLG, IDLG
from fedkl.defenses import KeyLock, PublicNorm
from fedkl.errors import ConfigError


@pytest.fixture
def folder(tmp_path, attack_run, train_run):
    train_run("train-fedavg", accuracy=0.92)
    train_run("train-fedkl", accuracy=0.9, defense=KeyLock(), fill_ins={"neutral": 0.88, "mean-affine": 0.9})
    attack_run({"no-norm": [40.0, 41.0], "public-norm": [35.0, 36.0], "lock": [6.0, None]})
    return tmp_path


def page(path):
    return report.build(path).html.read_text(encoding="utf-8")


def test_one_file_without_network_or_script(folder):
    html = page(folder)
    assert not re.search(r"<(script|link|iframe)|https?://|@import|url\(", html)
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert (folder / "report.md").exists()
    assert {p.name for p in (folder / "figures").iterdir()} == {"accuracy.png", "reconstructions.png"}


def test_every_image_has_alt_text_and_every_table_a_caption(folder):
    html = page(folder)
    assert all(re.search(r'alt="[^"]+"', tag) for tag in re.findall(r"<img[^>]*>", html))
    assert html.count("<table") == html.count("<caption>") > 3


def test_sections_come_in_order(folder):
    html = page(folder)
    headings = re.findall(r"<h[12]>(.*?)</h[12]>", html)
    assert headings[0] == "What does it leak, and what stops it?"
    assert headings[1:3] == ["Verdict", "Training"]
    assert headings[-2:] == ["Attack: attack", "Repeat this"]
    assert "no proof of safety" in html


def test_building_twice_gives_the_same_page(folder):
    assert page(folder) == page(folder)


def test_failures_are_shown_and_counted(folder):
    html = page(folder)
    _, header, rows = report.build(folder).tables[-1]
    assert header[0] == "Arm"
    assert rows[2][0] == "lock"
    assert "0 of 2" in rows[2][2]
    assert re.search(r'role="img" aria-label="Image 2, arm lock: reconstruction, failed"', html)
    assert re.search(r'<th scope="row">Failures</th><td>0</td><td>0</td><td>1</td>', html)


def test_the_chance_of_being_identified_stands_beside_the_counts(folder):
    html = page(folder)
    assert re.search(r'<th scope="row">Identified by chance</th>(<td>1 of 100</td>){3}', html)
    assert re.search(r'<th scope="row">In plain words</th><td>no protection</td><td>lock, opened</td>', html)


def test_repeat_names_the_command_and_the_configuration(folder):
    html = page(folder)
    config = folder / "train-fedkl" / "config.toml"
    shown = re.sub("</?span[^>]*>", "", html)
    assert f"<code>fedkl train --config {config} --out NEW</code>" in shown
    assert '<span class="word">--config</span> ' in html  # a line ends at a blank only, not behind a hyphen
    assert "key_distribution = &#34;normal&#34;" in html
    assert "cannot be seeded" in html


@pytest.mark.parametrize(
    ("defense", "printed"),
    [(None, "98.14 %"), (KeyLock(), "97.45 %")],
    ids=["none", "keylock"],
)
def test_the_papers_figure_stands_beside_the_matching_run(tmp_path, train_run, defense, printed):
    train_run("train", defense=defense, data="mnist")
    _, header, rows = report.build(tmp_path).tables[1 if defense else 0]
    assert header[-1] == "Paper, full MNIST, 200 rounds"
    assert rows[0][-1] == printed


def test_no_column_of_the_paper_without_a_matching_run(tmp_path, train_run):
    train_run("train", defense=PublicNorm(), data="mnist")
    train_run("sample", data="mnist-sample")
    assert "full MNIST" not in page(tmp_path)


def test_papers_psnr_is_converted(folder):
    assert "17.3 dB without and 5.1 dB with the lock" in " ".join(page(folder).split())


def test_single_run_directory(attack_run):
    run = attack_run({"no-norm": [40.0]})
    assert "Attack: attack" in page(run.path)


def test_unfinished_runs_are_named_with_their_progress(tmp_path, train_run, attack_run):
    train_run("cut-train", rounds=5, done=2)
    attack_run({"no-norm": [40.0, 41.0], "lock": [6.0, 7.0]}, name="cut-attack", finished=False)
    html = page(tmp_path)
    assert "cut-train: not finished, 2 of 5 rounds done" in html
    assert "cut-attack: not finished, 4 of 4 trials (over all arms) done" in html
    assert "nothing to say" in html


def test_hostile_text_is_escaped(tmp_path, attack_run, train_run):
    attack_run({"lock": [6.0]}, name="a<script>b", description="<script>alert(1)</script> | [/red]")
    train_run("t<img src=x>$")
    html = page(tmp_path)
    assert not re.search(r"<script|<img src=x", html)
    assert "&lt;script&gt;alert(1)" in html
    markdown = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "\\<script\\>alert(1)\\</script\\> \\| \\[/red\\]" in markdown


@pytest.mark.parametrize("damage", ["missing", "broken", "empty"])
def test_a_missing_picture_is_named_and_the_figures_stay(attack_run, damage):
    run = attack_run({"no-norm": [40.0], "lock": [6.0]})
    place = run.path / "reconstructions" / "lock-0.safetensors"
    if damage == "missing":
        place.unlink()
    elif damage == "broken":
        place.write_bytes(b"nothing")
    else:
        run.save_tensors("reconstructions/lock-0", {})
    html = page(run.path)
    assert f"Picture missing: {place}" in html
    assert "no picture, 6.0 dB" in html


@pytest.mark.parametrize("granted", [True, False])
@pytest.mark.parametrize(
    ("attack", "labels", "inferred"), [(IDLG(), "", "; label inferred"), (DLG(), "labels, ", "")]
)
def test_what_the_server_knows_is_what_the_attack_uses(attack_run, attack, labels, inferred, granted):
    run = attack_run({"lock": [6.0], "lock-known-key": [6.0]}, attack=attack, labels_known=granted)
    markdown = report.build(run.path).html.with_name("report.md").read_text(encoding="utf-8")
    labels = labels if granted else ""
    nothing = labels.rstrip(", ") or "nothing private"
    assert f"| The server knows | {nothing}{inferred} | {labels}key{inferred} |" in markdown


def test_controls_without_fill_ins_are_named_as_left_out(folder, train_run):
    train_run("train-control", defense=PublicNorm())
    train_run("train-masked", defense=KeyLock(), aggregation=MaskedAggregation(mode="blind"))
    assert "Left out, as they keep no γ, β or layer: train-control, train-fedavg." in page(folder)
    assert "Left out, as the server cannot read their model: train-masked." in page(folder)
    assert [row[0] for row in report.build(folder).tables[2][2]] == ["train-fedkl"] * 2


def test_no_table_of_fill_ins_without_any(tmp_path, train_run):
    train_run("train-control", defense=PublicNorm())
    assert "private part?" not in page(tmp_path)


def test_statistics_that_are_public_were_not_estimated(tmp_path, train_run):
    lock = KeyLock(share_statistics=True)
    train_run("train", defense=lock, fill_ins={"neutral": 0.1}, statistics="public")
    assert report.build(tmp_path).tables[2][2][0][2] == "public: the federation's own"


def test_a_folder_that_cannot_be_written_is_an_error(attack_run):
    run = attack_run({"no-norm": [40.0]})
    (run.path / "figures").write_text("in the way", encoding="utf-8")
    with pytest.raises(ConfigError, match="the report cannot be written here"):
        report.build(run.path)


def test_tables_fit_a_phone_and_paper(folder):
    html = page(folder)
    stacked = html.split('<table class="wide named">')[1].partition("</table>")[0]
    assert "The server completes the global model itself" in stacked
    assert re.search(r'<td data-name="Accuracy">88.00 %</td>', stacked)
    assert re.search(r'<th scope="row">Rounds</th><td>3</td><td>3</td>', html)  # runs side by side
    phone, paper = (html.partition(f"@media {kind}")[2] for kind in ("(max-width: 40rem)", "print"))
    assert ".named td { display: block" in phone.partition("@media")[0]
    assert ".runs::details-content { content-visibility: visible" in paper


def test_no_run_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no run directory here or below"):
        report.build(tmp_path)


@pytest.mark.parametrize("name", ["summary", "environment"])
def test_a_damaged_file_is_an_error_that_names_it(train_run, name):
    run = train_run("train")
    (run.path / f"{name}.json").write_text("{", encoding="utf-8")
    with pytest.raises(ConfigError, match=rf"{name}\.json: missing or damaged"):
        report.build(run.path)


def summary_with(run, path, value):
    """The run's summary with something else in one place; None: nothing."""
    file = run.path / "summary.json"
    summary = json.loads(file.read_text())
    *places, last = path
    inner = summary
    for place in places:
        inner = inner[place]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    file.write_text(json.dumps(summary))


TRAINED = ("accuracy", "accuracies", "best_accuracy", "clients", "rounds", "fill_ins", "public_parameters",
           "private_parameters", "update_bytes", "seconds")  # fmt: skip
OLDER = ("local_accuracy", "test_images", "classes", "statistics_shared", "dropped", "failed",
         "skipped_rounds")  # fmt: skip


FINE = (("fill_ins", "[]"), ("seconds", "1e+30"))
WRONG = [(n, v) for n in TRAINED for v in (None, "x", -1, [], True, 1e30) if (n, repr(v)) not in FINE]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=repr)
def test_a_training_whose_summary_says_too_little_is_an_error(tmp_path, train_run, name, value):
    run = train_run("train", defense=KeyLock(), fill_ins={"neutral": 0.5})
    summary_with(run, [name], value)
    with pytest.raises(ConfigError, match=rf"summary\.json: not the summary of this run\.\n  - {name}"):
        report.build(tmp_path)


@pytest.mark.parametrize("name", OLDER)
def test_what_older_summaries_lack_may_lack_but_not_be_something_else(tmp_path, train_run, name):
    run = train_run("train", defense=KeyLock(), fill_ins={"neutral": 0.5})
    summary_with(run, [name], ["x"])
    with pytest.raises(ConfigError, match=name):
        report.build(tmp_path)
    summary_with(run, [name], None)
    report.build(tmp_path)


@pytest.mark.parametrize("name", ["arm", "statistics", "accuracy", "auxiliary"])
def test_so_with_fill_ins(tmp_path, train_run, name):
    run = train_run("train", defense=KeyLock(), fill_ins={"neutral": 0.5})
    summary_with(run, ["fill_ins", 0, name], [])
    with pytest.raises(ConfigError, match=rf"fill_ins\.0\.{name}"):
        report.build(tmp_path)


def test_the_oracle_alone_is_no_completion(tmp_path, train_run):
    train_run("train", defense=KeyLock(), fill_ins={"mean-affine": 0.5})
    with pytest.raises(ConfigError, match="expected one that a server can have"):
        report.build(tmp_path)


ARM = ("name", "description", "knows", "scaling", "candidates", "figures", "success", "identified",
       "label_correct", "evaluations", "loss")  # fmt: skip
PLACES = [
    *(([name], None) for name in ("attack", "initialization", "arms", "seconds")),
    (["arms"], []),
    (["arms"], [3]),
    *((["arms", 0, name], value) for name in ARM for value in (None, [], 3.5)),
    (["arms", 0, "name"], "magic"),
    (["arms", 0, "name"], "../../x"),
    (["arms", 0, "description"], "\x1b[2J"),
    (["arms", 0, "candidates"], 0),
    (["arms", 0, "ssim_success"], 3),
    *((["arms", 0, "figures", name], None) for name in ("psnr", "ssim", "psnr_affine")),
    *((["arms", 0, "figures", "psnr", name], "x") for name in ("n", "failures", "mean", "std", "median")),
    *((["arms", 0, "figures", "psnr", name], None) for name in ("median_low", "median_high")),
    *((["arms", 0, "success", name], "x") for name in ("rate", "low", "high", "n")),
    (["arms", 0, "success", "rate"], 2),
]


@pytest.mark.parametrize(
    ("path", "value"), PLACES, ids=lambda x: ".".join(map(str, x)) if x and type(x) is list else repr(x)
)
def test_an_attack_whose_summary_says_too_little_is_an_error(attack_run, path, value):
    run = attack_run({"no-norm": [40.0], "lock": [6.0]})
    summary_with(run, path, value)
    with pytest.raises(ConfigError, match=r"summary\.json: not the summary of this run\.\n  - \w") as caught:
        report.build(run.path)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


def test_an_arm_is_there_once(attack_run):
    run = attack_run({"no-norm": [40.0], "lock": [6.0]})
    summary_with(run, ["arms", 1, "name"], "no-norm")
    with pytest.raises(ConfigError, match="arms: one is there twice"):
        report.build(run.path)


def test_older_attacks_have_no_rate_of_similar_images(attack_run):
    run = attack_run({"no-norm": [40.0], "lock": [6.0]})
    summary_with(run, ["arms", 0, "ssim_success"], None)
    assert "Attack: attack" in page(run.path)


@pytest.mark.parametrize("content", [b"3\n", b"[1]\n", b"\xff\n", b'{"round": 1}\n', b'{"event": "trial"}\n'])
@pytest.mark.parametrize("finished", [True, False])
def test_a_line_that_is_no_record_is_an_error_that_names_it(tmp_path, attack_run, content, finished):
    run = attack_run({"lock": [6.0]}, finished=finished)
    with (run.path / "results.jsonl").open("ab") as file:
        file.write(content)
    with pytest.raises(ConfigError, match=r"results\.jsonl: line 2 is damaged"):
        report.build(tmp_path)


@pytest.mark.parametrize("scores", [0, 2])
def test_a_trial_has_a_score_for_each_image(attack_run, scores):
    run = attack_run({"lock": [6.0]})
    record = json.loads((run.path / "results.jsonl").read_text())
    record["scores"] *= scores
    (run.path / "results.jsonl").write_text(json.dumps(record) + "\n")
    said = "line 1 is damaged" if scores == 0 else r"expected 1 scores in each trial, got 2 in trial 0"
    with pytest.raises(ConfigError, match=rf"results\.jsonl: {said}"):
        report.build(run.path)


@pytest.mark.parametrize("content", [b"[1]", b"3", b"\xff", b"null"])
@pytest.mark.parametrize("name", ["summary", "environment"])
def test_json_that_is_no_object_is_an_error(train_run, name, content):
    run = train_run("train")
    (run.path / f"{name}.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"{name}\.json: missing or damaged"):
        report.build(run.path)


def test_a_config_that_is_none_is_an_error(train_run):
    run = train_run("train")
    (run.path / "config.toml").write_bytes(b"\xff")
    with pytest.raises(ConfigError, match=r"config\.toml: not a TOML file"):
        report.build(run.path)


def test_links_to_folders_are_not_followed(tmp_path, train_run):
    """Not in circles, nor out of the folder."""
    train_run("outside", accuracy=0.1)
    inside = tmp_path / "inside"
    inside.mkdir()
    (tmp_path / "train").mkdir()
    shutil.copytree(tmp_path / "outside", inside / "run")
    (inside / "run" / "loop").symlink_to(inside)
    (inside / "circle").symlink_to(inside)
    (inside / "other").symlink_to(tmp_path / "outside")
    (inside / "nowhere").symlink_to(inside / "nowhere")
    html = page(inside)
    assert "<td>run</td>" in html or ">run<" in html
    assert "circle" not in html
    assert "other/" not in html
    assert not list((tmp_path / "outside").rglob("report*"))


def test_figures_are_not_written_through_a_link(tmp_path, train_run):
    run = train_run("train")
    (tmp_path / "outside").mkdir()
    (run.path / "figures").symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match="figures: a symbolic link; no figure is written through it"):
        report.build(run.path)
    assert not list((tmp_path / "outside").iterdir())


def test_a_report_replaces_links_and_leaves_what_they_lead_to(tmp_path, train_run):
    run = train_run("train")
    (tmp_path / "precious").write_text("precious")
    for name in ("report.html", "report.md"):
        (run.path / name).symlink_to(tmp_path / "precious")
    report.build(run.path)
    assert (tmp_path / "precious").read_text() == "precious"
    assert "<html" in (run.path / "report.html").read_text()


def test_folders_may_have_any_name(tmp_path, train_run):
    """Bytes that are no text, control codes: the page and the terminal show them as such."""
    run = train_run("train")
    for name in (b"not \xff text", b"\x1b[2J", "é ß".encode()):
        shutil.copytree(run.path, tmp_path / os.fsdecode(name))
    built = report.build(tmp_path)
    html = built.html.read_text(encoding="utf-8")
    for text in ("not \ufffd text", "\ufffd[2J", "é ß"):
        assert text in html
    assert "\x1b" not in html
    shown = str(built.tables)
    assert "\\x1b" not in shown
    assert "\\udcff" not in shown


def test_a_full_disk_says_that_the_runs_are_kept(tmp_path, train_run, monkeypatch):
    run = train_run("train")

    def full(handle):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConfigError, match=r"\(No space left on device\)\. The runs are kept: make room"):
            report.build(run.path)
    report.build(run.path)


@pytest.mark.parametrize("name", ["", "x" * 5000, "file", "nowhere/at/all"])
def test_what_is_no_folder_is_an_error(tmp_path, name):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="no run directory here or below"):
        report.build(tmp_path / name)


def test_at_most_eight_rows_of_pictures(attack_run):
    run = attack_run({"no-norm": [40.0] * 10})
    assert "the first 8 of 10 images" in page(run.path)
