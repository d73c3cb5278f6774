"""`fedkl audit` and `fedkl report` of an audit, with an audit that is made by hand."""

from __future__ import annotations

import json
import sys
from xml.etree import ElementTree

import pytest
from safetensors.torch import load_file, save_file

from fedkl import auditing, cli
from fedkl.auditing import plan
from fedkl.auditing.recognition import Pools
from fedkl.defenses import NoDefense
from fedkl.errors import ConfigError
from tests.auditing import recordings, subjects
from tests.auditing.audits import audit, finding, not_run, write
from tests.auditing.test_target import GOOD


@pytest.fixture
def fedkl(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine.py").write_text(GOOD)

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["fedkl", *map(str, words)])
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = end.code or 0
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.fixture
def audited(monkeypatch):
    """Makes `fedkl.auditing.audit` one that finds what is given; returns what it was called with."""

    def find(*results, **settings):
        calls = []

        def fake(subject, *, out, progress, planned, **options):
            progress(1, 2, "span")
            calls.append((subject, options))
            write(out, audit(*results, **settings))
            return auditing.results.Audit.read(out)

        monkeypatch.setattr(auditing, "audit", fake, raising=False)
        return calls

    return find


def test_the_audit_gets_everything_and_the_report_is_made(fedkl, audited, tmp_path):
    calls = audited(finding(), not_run())
    flags = ("--defense", "keylock", "--masking", "blind", "--batch-size", "2,8", "--minutes", 3, "--seed", 7)
    code, out, err = fedkl("audit", "mine.py:subject", "--out", "runs/a", *flags)
    assert code == 0, err
    ((subject, options),) = calls
    assert subject.name == "mine"
    assert options == {
        "defense": "keylock",
        "masking": "blind",
        "batch_sizes": (2, 8),
        "minutes": 3.0,
        "seed": 7,
        "target": "mine.py:subject",
        "source": "mine.py",
        "line": 8,
    }
    lines = out.splitlines()
    assert lines[0] == "Of your client's images, the server recognizes 67 % [61–72 %] at 1 % false alarms."
    assert lines[-1] == "Written: runs/a/report.html"
    assert len(lines) <= 15
    assert (tmp_path / "runs" / "a" / "report.md").is_file()


def test_the_defaults(fedkl, audited):
    calls = audited(finding())
    assert fedkl("audit", "mine.py:subject", "--out", "a")[0] == 0
    options = calls[0][1]
    assert (options["defense"], options["masking"], options["batch_sizes"]) == ("none", "none", (1, 16))
    assert (options["minutes"], options["seed"]) == (10.0, 0)


@pytest.mark.parametrize(
    ("limits", "code", "said"),
    [
        ("presence_tpr=0.05", 1, "Limit crossed: presence_tpr, span on real"),
        ("presence_tpr=0.9", 0, "Limit kept: presence_tpr, span on real"),
        ("presence_tpr=0.7", 3, "Limit undecided: presence_tpr, span on real"),
        (
            "labels=0.5",
            3,
            "Limit without evidence: labels: nothing was measured on what clients really send.",
        ),
    ],
)
def test_exit_codes_and_the_files_that_are_written_all_the_same(fedkl, audited, tmp_path, limits, code, said):
    audited(finding())
    files = ("--junit", "j/a.xml", "--sarif", "a.sarif", "--summary", "a.md")
    ended, out, err = fedkl("audit", "mine.py:subject", "--out", "a", "--fail-above", limits, *files)
    assert ended == code, err
    assert out.splitlines()[-1] == "Written: a/report.html, j/a.xml, a.sarif, a.md"
    assert [line.partition(": 0.")[0] for line in out.splitlines() if line.startswith("Limit")] == [said]
    suite = ElementTree.fromstring((tmp_path / "j" / "a.xml").read_bytes())[0]
    assert (suite.attrib["failures"], suite.attrib["errors"]) == (str(int(code == 1)), str(int(code == 3)))
    run = json.loads((tmp_path / "a.sarif").read_text())["runs"][0]
    assert [each["level"] for each in run["results"]] == ["error" if code == 1 else "warning"]
    assert (tmp_path / "a.md").read_text().startswith("## What does hospital leak without a defense?")


def test_a_plan_without_a_result_for_real_clients_says_so_before_the_work(fedkl, monkeypatch):
    few = subjects.subject(count=100, images_per_client=50)

    def planned_only(subject, *, planned, **options):
        exposures = plan.exposures_of(few, defense=NoDefense(), masking="none", batch_sizes=(1,), seed=0)
        planned(plan.plan(exposures, pools=Pools.of(few.images, few.labels, seed=0)))
        raise ConfigError("the work")

    monkeypatch.setattr(auditing, "audit", planned_only, raising=False)
    _, out, _ = fedkl("audit", "mine.py:subject", "--out", "a")
    said = out.splitlines()[-1]
    assert said.startswith(
        "  There will be no result for what your clients really send, 13 local steps on 50"
    )
    assert said.endswith("Give more images, or set images_per_client to at most 20.")


EXITS = """
import sys
from tests.auditing import subjects

calls = []

def loop(network, x, y):
    calls.append(len(x))
    if len(calls) == 7:
        sys.exit(0)
    subjects.trains(network, x, y)

def subject():
    return subjects.subject(procedure=loop)
"""


def test_a_training_that_exits_is_no_pass(fedkl, monkeypatch, unchecked, tmp_path):
    """Its 0 would be the command's, without a page, and nobody would know."""
    monkeypatch.setattr(auditing.plan, "available", tuple)
    (tmp_path / "exits.py").write_text(EXITS)
    words = ("--fail-above", "presence_tpr=0.01", "--junit", "a.xml", "--batch-size", "1")
    code, out, err = fedkl("audit", "exits.py:subject", "--out", "a", *words)
    assert code == 3, err
    assert "Limit without evidence: presence_tpr: nothing was measured" in out
    assert "raised SystemExit (0) on 8 images" in (tmp_path / "a" / "report.md").read_text().replace("\\", "")
    assert ElementTree.fromstring((tmp_path / "a.xml").read_bytes()).attrib["errors"] != "0"


class _Unheard:
    """Of rich, where nobody takes what is printed."""

    def __call__(self, *_, **__):
        try:
            raise BrokenPipeError
        except BrokenPipeError:
            sys.exit(1)


def _raises(error):
    def audit(*_, **__):
        raise error

    return audit


@pytest.mark.parametrize(
    ("audit", "code", "said"),
    [
        (_raises(SystemExit(0)), 2, "it ends the program (SystemExit: 0). Return, or raise an error"),
        (_raises(SystemExit(3)), 2, "test_cli_audit.py, line "),
        (_raises(EOFError("Ran out of input")), 2, "What was read ended too soon (Ran out of input)."),
        (_raises(KeyError("nobody")), 70, "Error: KeyError, which nobody foresaw. The lines above end where"),
        (_Unheard(), 141, ""),
    ],
    ids=["exit 0", "exit 3", "end of file", "unforeseen", "broken pipe"],
)
def test_no_code_of_an_audit_that_is_not_its_own(fedkl, monkeypatch, audit, code, said):
    """1 says that a limit is crossed, 0 that all are kept."""
    monkeypatch.setattr(auditing, "audit", audit, raising=False)
    ended, _, err = fedkl("audit", "mine.py:subject", "--out", "a")
    assert ended == code
    assert said in err
    assert ("Traceback" in err) is (code == 70)


def test_a_target_elsewhere_has_its_place_in_sarif_at_the_report(fedkl, audited, tmp_path):
    audited(finding(), source=None, line=None)
    assert fedkl("audit", "mine.py:subject", "--out", "runs/a", "--sarif", "a.sarif")[0] == 0
    (result,) = json.loads((tmp_path / "a.sarif").read_text())["runs"][0]["results"]
    place = result["locations"][0]["physicalLocation"]["artifactLocation"]
    assert place["uri"] == "runs/a/report.html"


def test_an_interrupted_audit_is_no_pass(fedkl, audited):
    audited(finding("identified", 0, 300), finished=False)
    code, out, _ = fedkl("audit", "mine.py:subject", "--out", "a", "--fail-above", "identified=0.1")
    assert code == 3
    assert out.startswith("Interrupted, not all was tried.")


def test_a_baseline(fedkl, audited, tmp_path):
    audited(finding())
    write(tmp_path / "same", audit(finding()))
    write(tmp_path / "better", audit(finding(successes=30)))
    write(tmp_path / "other", audit(finding(), defense="keylock"))
    for name, code, message in (
        ("same", 0, "recognizes"),
        ("better", 1, "worse than before"),
        ("other", 2, "- defense: none now, keylock then"),
        ("nowhere", 2, "nowhere/audit.json: not there."),
    ):
        ended, out, err = fedkl("audit", "mine.py:subject", "--out", "a", "--baseline", name)
        assert ended == code
        assert message in out + err
        (tmp_path / "a" / "report.html").unlink(missing_ok=name == "nowhere")  # made in all other cases


def test_a_baseline_of_something_else_is_told_before_the_work_begins(fedkl, tmp_path, monkeypatch):
    monkeypatch.setattr(auditing.run, "plan", lambda *args, **options: pytest.fail("works"))
    write(tmp_path / "other", audit(finding()))
    code, _, err = fedkl("audit", "mine.py:subject", "--out", "a", "--baseline", "other")
    assert code == 2
    assert "- subject: mine now, hospital then" in err
    assert not (tmp_path / "a").exists()


def test_a_missing_baseline_is_told_before_the_work_begins(fedkl, audited):
    calls = audited(finding())
    assert fedkl("audit", "mine.py:subject", "--out", "a", "--baseline", "nowhere")[0] == 2
    assert fedkl("audit", "mine.py:subject", "--out", "a", "--fail-above", "magic=1")[0] == 2
    assert not calls


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("mine.py:other",), "mine.py:other: no such function; it has subject."),
        (("mine",), "expected a module or file, a colon and a function"),
        (("mine.py:subject", "--batch-size", "0"), "expected numbers from 1"),
        (("mine.py:subject", "--batch-size", "a"), "expected whole numbers"),
        (("mine.py:subject", "--fail-above", "identified=2"), "from 0 to 1, got 2.0"),
        (("mine.py:subject", "--masking", "magic"), "magic"),
        (("mine.py:subject", "--minutes", "0"), "0.01"),
        (("mine.py:subject", "--baseline", "a"), "expected another folder than --out"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_wrong_uses(fedkl, audited, words, message):
    calls = audited(finding())
    code, _, err = fedkl("audit", *words, "--out", "a")
    assert code == 2
    assert message in err
    assert not calls


def test_ctrl_c_repeats_the_command(fedkl, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(auditing, "audit", interrupted, raising=False)
    code, _, err = fedkl("audit", "mine.py:subject", "--out", "my folder")
    assert code == 130
    assert err.endswith(
        "kept in my folder; the same command goes on: fedkl audit mine.py:subject --out 'my folder'\n"
    )


def test_the_report_of_an_audit_is_built_again(fedkl, tmp_path):
    folder = write(tmp_path / "a", audit(finding()))
    code, out, err = fedkl("report", folder)
    assert code == 0, err
    assert (folder / "report.html").is_file()
    assert "All findings" in out
    (folder / "audit.json").write_text("{}")
    assert fedkl("report", folder)[0] == 2


RECORDED = """
from tests.auditing.recordings import subject
"""


@pytest.fixture
def updates(tmp_path, monkeypatch, unchecked):
    """Two clients' updates, and whose images they were trained on; presence is tested only."""
    monkeypatch.setattr(auditing.plan, "available", tuple)
    (tmp_path / "recorded.py").write_text(RECORDED)
    (tmp_path / "updates").mkdir()
    for name, chosen in zip("ab", recordings.members(2), strict=True):
        tensors = recordings.sent(recordings.subject(), chosen).tensors
        save_file(dict(tensors), tmp_path / "updates" / f"{name}.safetensors")
    members = dict(zip("ab", recordings.members(2), strict=True))
    (tmp_path / "members.json").write_text(json.dumps(members))
    return ("audit", "recorded.py:subject", "--recorded", "updates", "--out", "a")


def test_recorded_updates_with_members_make_a_report(fedkl, updates, tmp_path):
    code, out, err = fedkl(*updates, "--members", "members.json", "--fail-above", "presence_tpr=0.01")
    assert code in (1, 3), err  # eight images
    assert "2 recorded updates, one gradient of 4 images" in out
    done = auditing.Audit.read(tmp_path / "a")
    assert (done.settings.target, len(done.settings.recorded)) == ("recorded.py:subject", 2)
    assert "2 recorded updates" in (tmp_path / "a" / "report.html").read_text()
    assert "--recorded UPDATES --members MEMBERS" in (tmp_path / "a" / "report.md").read_text()


def test_recorded_updates_without_members_give_scores(fedkl, updates, tmp_path):
    code, out, err = fedkl(*updates)
    assert code == 0, err
    lines = out.splitlines()
    assert [line.partition(":")[0] for line in lines[:2]] == ["a", "b"]
    assert lines[0].endswith("of 400 images look trained on; about 4 would by chance.")
    scores = load_file(tmp_path / "a" / "scores.safetensors")
    assert {name: tuple(each.shape) for name, each in scores.items()} == {
        "a": (400,),
        "b": (400,),
        "threshold": (),
    }
    members = json.loads((tmp_path / "members.json").read_text())
    assert sum(int((scores[name][each] >= scores["threshold"]).sum()) for name, each in members.items()) >= 5


def test_a_misfit_is_said_and_ends(fedkl, updates):
    code, _, err = fedkl(*updates, "--kind", "weights", "--members", "members.json")
    assert code == 2
    assert "the subject's clients send gradients" in " ".join(err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--members", "m.json"), "Give --recorded"),
        (("--anyway",), "Give --recorded"),
        (("--kind", "weights"), "--kind: of recorded updates"),
        (("--recorded", "u", "--members", "m.json", "--batch-size", "4"), "--batch-size: changes nothing"),
        (("--recorded", "u", "--minutes", "60"), "--minutes: changes nothing"),
        (("--recorded", "u", "--defense", "keylock"), "what was recorded is as it is"),
        (("--recorded", "u", "--masking", "blind"), "what was recorded is as it is"),
        (("--recorded", "u", "--fail-above", "identified=0.1"), "without --members"),
        (("--recorded", "u", "--junit", "j.xml"), "without --members"),
        (("--recorded", "nowhere"), "no recorded update"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, tuple) else "",
)
def test_wrong_uses_of_recordings(fedkl, words, message):
    code, _, err = fedkl("audit", "mine.py:subject", "--out", "a", *words)
    assert code == 2
    assert message in " ".join(err.split())
