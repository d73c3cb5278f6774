"""What CI services read of an audit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fedkl.auditing import exports
from fedkl.auditing.gate import Gate, judge
from tests.auditing.audits import audit, finding, not_run

EVIL = 'a<b>&"c" | *d* `e` \ufffe'


@pytest.fixture
def made():
    return audit(
        finding("rebuilt", 22, 30, attacker="ig", exposure="single"),
        finding(reason=EVIL),
        finding("identified", 0, 300, outcome="at the floor"),
        finding("labels", 30, 300, outcome="says nothing"),
        not_run(reason=EVIL),
        not_run("dlg", exposure="single"),
        subject="hospital <A&B>",
    )


@pytest.fixture
def result(made):
    return judge(made, Gate.parse("presence_tpr=0.05,identified=0.1,labels=0.1,recovered=0.5"))


def suite_of(text):
    root = ElementTree.fromstring(text.encode())
    assert root.tag == "testsuites"
    (suite,) = root
    assert root.attrib == {name: suite.attrib[name] for name in root.attrib}
    return suite


def test_junit_has_a_case_for_each_question_and_attacker(made, result):
    suite = suite_of(exports.junit(made, result))
    cases = {(case.attrib["classname"], case.attrib["name"]): case for case in suite.iter("testcase")}
    found = {name: [child.tag for child in case] for (_, name), case in cases.items()}
    assert found == {
        "presence by span": ["failure", "system-out"],
        "labels by span": ["error", "system-out"],  # undecided
        "identified by span": ["system-out"],
        "gauss-newton": ["skipped"],
        "identified 1": ["error"],  # gauss-newton had no time
        "recovered 2": ["error"],  # a limit without evidence
    }
    counts = {name: suite.attrib[name] for name in ("tests", "failures", "errors", "skipped")}
    assert counts == {"tests": "6", "failures": "1", "errors": "3", "skipped": "1"}
    assert {place for place, _ in cases} == {"fedkl.audit.real", "fedkl.audit.evidence"}
    skipped = cases["fedkl.audit.real", "gauss-newton"][0].attrib["message"]
    assert skipped == f"no time left: {EVIL[:-1]}�"
    failure = cases["fedkl.audit.real", "presence by span"].find("failure")
    assert "above the limit 0.05" in failure.attrib["message"]
    assert suite.attrib["name"] == "fedkl audit: hospital <A&B>"


def test_junit_without_a_limit_fails_nothing(made):
    suite = suite_of(exports.junit(made, judge(made, Gate())))
    assert (suite.attrib["failures"], suite.attrib["errors"]) == ("0", "0")


def run_of(text):
    document = json.loads(text)
    assert (document["version"], len(document["runs"])) == ("2.1.0", 1)
    return document["runs"][0]


def test_sarif_has_what_its_readers_need(made, result):
    run = run_of(exports.sarif(made, result))
    rules = run["tool"]["driver"]["rules"]
    assert len({rule["id"] for rule in rules}) == len(rules) == 4
    for rule in rules:
        assert rule["shortDescription"]["text"].endswith(".")
        assert 0 < float(rule["properties"]["security-severity"]) <= 10
    levels = [(each["ruleId"], each["level"]) for each in run["results"]]
    assert levels == [("fedkl/presence", "error"), ("fedkl/rebuilt", "note")]
    for each in run["results"]:
        assert rules[each["ruleIndex"]]["id"] == each["ruleId"]
        place = each["locations"][0]["physicalLocation"]
        assert place == {
            "artifactLocation": {"uri": "audits/mine.py", "uriBaseId": "%SRCROOT%"},
            "region": {"startLine": 12},
        }
        assert re.fullmatch("[0-9a-f]{64}", each["partialFingerprints"]["fedklFinding/v2"])
    assert "67 % [61–72 %]" in run["results"][0]["message"]["text"]
    assert "Setting: upper bound" in run["results"][1]["message"]["text"]
    (invocation,) = run["invocations"]
    assert (invocation["executionSuccessful"], invocation["exitCode"]) == (True, 1)
    assert len(invocation["toolExecutionNotifications"]) == 5  # undecided, two missing, two not run


def test_a_leak_is_a_warning_until_a_limit_says_otherwise(made):
    run = run_of(exports.sarif(made, judge(made, Gate())))
    assert [each["level"] for each in run["results"]] == ["warning", "note"]


def test_a_crossed_limit_is_reported_though_the_verdict_is_no_leak():
    made = audit(finding("labels", 200, 300, outcome="at the floor"))
    run = run_of(exports.sarif(made, judge(made, Gate.parse("labels=0.1"))))
    assert [each["level"] for each in run["results"]] == ["error"]


def test_what_says_nothing_is_called_undecided_everywhere_with_its_reason():
    made = audit(finding("labels", 200, 300, outcome="says nothing", reason="its control failed"))
    result = judge(made, Gate.parse("labels=0.1"))
    row = "  undecided: Class told 67 % [61–72 %], n = 300, span, your client: one epoch of 300 images"
    assert f"{row}: its control failed" in exports.text(made, result)
    assert "| undecided: its control failed |" in exports.summary(made, result)
    assert "undecided: its control failed" in exports.junit(made, result)
    message = run_of(exports.sarif(made, result))["results"][0]["message"]["text"]
    assert "Undecided: its control failed" in message
    every = [*exports.text(made, result), exports.summary(made, result), exports.junit(made, result), message]
    assert "says nothing" not in " ".join(every).lower()


def test_fingerprints_stay_when_numbers_change_and_differ_by_finding():
    def prints(*findings, **settings):
        made = audit(*findings, **settings)
        run = run_of(exports.sarif(made, judge(made, Gate())))
        return [each["partialFingerprints"]["fedklFinding/v2"] for each in run["results"]]

    first = prints(finding(), finding("identified"), finding(attacker="ratio"), finding(exposure="single"))
    assert len(set(first)) == 4
    assert prints(finding(successes=150), seed=5) == prints(finding())
    assert prints(finding(), subject="another") != prints(finding())


def test_audits_with_a_defense_masks_or_recordings_replace_no_other():
    """A code host closes the alerts of a category that its newest file does not have."""
    kinds = ({}, {"defense": "pruning:keep=0.1"}, {"masking": "blind"}, {"recorded": ("aa",)})
    runs = [
        run_of(exports.sarif(made, judge(made, Gate()))) for made in (audit(finding(), **e) for e in kinds)
    ]
    categories = [run["automationDetails"]["id"] for run in runs]
    assert categories[:2] == [
        "fedkl-audit/hospital/none/none/simulated/",
        "fedkl-audit/hospital/pruning:keep=0.1/none/simulated/",
    ]
    assert len(set(categories)) == len(kinds)
    assert (
        len({each["partialFingerprints"]["fedklFinding/v2"] for run in runs for each in run["results"]}) == 4
    )


@pytest.mark.parametrize(
    ("source", "uri"), [("a b/ä#.py", "a%20b/%C3%A4%23.py"), (r"audits\mine.py", "audits/mine.py")]
)
def test_sarif_places_are_uris(source, uri):
    made = audit(finding(), source=source)
    run = run_of(exports.sarif(made, judge(made, Gate())))
    assert run["results"][0]["locations"][0]["physicalLocation"]["artifactLocation"]["uri"] == uri


@pytest.mark.parametrize(
    ("page", "uri"),
    [
        (None, "report.html"),
        ("runs/a b/report.html", "runs/a%20b/report.html"),
        ("/x/page.html", "page.html"),
    ],
)
def test_sarif_without_a_file_names_the_function_and_the_report(page, uri):
    """GitHub refuses a file of which one result has no place."""
    made = audit(finding(), source=None, line=None, finished=False)
    run = run_of(exports.sarif(made, judge(made, Gate()), page=page and Path(page)))
    (place,) = run["results"][0]["locations"]
    assert place["physicalLocation"] == {
        "artifactLocation": {"uri": uri, "uriBaseId": "%SRCROOT%"},
        "region": {"startLine": 1},
    }
    assert place["logicalLocations"][0]["fullyQualifiedName"] == "audits.mine:subject"
    assert not run["invocations"][0]["executionSuccessful"]


def test_the_summary_is_short_and_escaped(made, result):
    text = exports.summary(made, result)
    lines = text.splitlines()
    assert lines[0] == r"## What does hospital \<A&B\> leak without a defense? (2026-11-29)"
    assert lines[2].startswith("**Of your client's images, the server recognizes 67 % \\[61–72 %\\]")
    assert sum(line.startswith("* ") for line in lines) == len(result.reasons) == 4
    assert sum(line.startswith("| ") for line in lines) == 2 + len(made.headlines())
    assert "Nothing found is not safe" in lines[-1]
    assert "gauss-newton" in lines[-1]
    many = audit(*(finding(attacker=f"a{number}") for number in range(40)))
    shown = exports.summary(many, judge(many, Gate.parse("presence_tpr=0.1"))).splitlines()
    assert "* and 30 more" in shown
    assert len(shown) < 35


def test_the_terminal_gets_fifteen_lines_at_most_the_worst_first():
    many = audit(
        *(finding("labels", 30, 300, attacker=f"a{number}") for number in range(20)),
        finding("rebuilt", 20, 30, attacker="ig"),
    )
    lines = exports.text(many, judge(many, Gate.parse("labels=0.01,recovered=0.01")))
    assert len(lines) <= 15
    assert lines[0] == "Of your client's images, the server rebuilds 67 % [49–81 %] as pictures."
    assert "ig" in lines[1]
    assert "  and 16 more findings" in lines
    assert [line.partition(": 0.")[0] for line in lines if line.startswith("Limit")] == [
        "Limit crossed: labels, a0 on real",  # one of twenty
        "Limit crossed: recovered, ig on real",
    ]
    assert "Nothing found is not safe" in lines[-1]


def test_the_terminal_gets_a_line_for_each_limit_kept_or_not():
    made = audit(
        finding("identified", 0, 300),
        finding("identified", 1, 300, attacker="ig"),
        finding("rebuilt", 30, 300),
        finding("rebuilt", 60, 300, attacker="ig"),
        finding("presence", 30, 300),
    )
    gate = Gate.parse("identified=0.1,recovered=0.15,presence_tpr=0.1,labels=0.5")
    lines = [each for each in exports.text(made, judge(made, gate)) if each.startswith(("Limit", "Not"))]
    assert [line.partition(" [")[0] for line in lines[:3]] == [
        "Limit kept: identified, ig on real: 0.003",
        "Limit crossed: recovered, ig on real: 0.200",
        "Limit undecided: presence_tpr, span on real: 0.100",
    ]
    assert lines[0].endswith("is not above the limit 0.1.")
    assert lines[3] == "Limit without evidence: labels: nothing was measured on what clients really send."
    assert len(lines) == 5  # the caution, which begins with "Nothing"


def test_what_did_not_pass_and_is_no_limit_is_said_beside_the_limits():
    now = audit(finding("identified", 0, 300), finding(), finished=False)
    result = judge(now, Gate.parse("identified=0.1"), baseline=audit(finding("identified", 0, 300)))
    lines = [each for each in exports.text(now, result) if each.startswith(("Limit", "Not passed"))]
    assert [line.partition(": ")[0] for line in lines] == ["Limit kept", "Not passed", "Not passed"]
    assert lines[1] == "Not passed: The audit was interrupted: not everything was tried."
    assert lines[2].endswith("the baseline has no such figure to compare.")
