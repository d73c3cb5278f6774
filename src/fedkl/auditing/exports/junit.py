"""JUnit XML: a test case for each question and attacker, as CI services show them."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, SubElement, indent, tostring

from fedkl.auditing import words
from fedkl.auditing.gate import Check, GateResult
from fedkl.auditing.results import Audit, Finding, NotRun

_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def junit(audit: Audit, result: GateResult) -> str:
    """One suite with a case for every finding on what clients really send.

    A crossed limit is a failure, evidence that is missing an error, an attacker without figures is skipped
    with its reason.

    Args:
        audit: What was found.
        result: What `judge` made of it.

    Returns:
        The file's text, to be written as UTF-8.

    Source:
        The elements that Jenkins, GitLab and pytest have in common: testsuites, testsuite, testcase with
        failure, error, skipped or system-out.
    """
    suites = Element("testsuites")
    suite = SubElement(suites, "testsuite", name=_text(f"fedkl audit: {audit.settings.subject}"))
    properties = SubElement(suite, "properties")
    for name in ("target", "defense", "masking", "seed", "fedkl"):
        SubElement(properties, "property", name=name, value=_text(str(getattr(audit.settings, name))))
    for finding in audit.headlines():
        _case(suite, finding, [check for check in result.checks if check.finding is finding])
    for each in audit.not_run:
        if audit.exposure(each.exposure).headline:
            _skipped(suite, each)
    lacking = [check for check in result.checks if check.state == "missing" and check.finding is None]
    for number, check in enumerate(lacking, start=1):
        case = _new_case(suite, "evidence", f"{check.quantity or 'audit'} {number}", 0.0)
        _problem(case, "error", [check])
    _count(suites, suite)
    indent(suites)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{tostring(suites, encoding="unicode")}\n'


def _case(suite: Element, finding: Finding, checks: list[Check]) -> None:
    name = f"{finding.question} by {finding.attacker}"
    case = _new_case(suite, finding.exposure, name, finding.seconds)
    crossed = [check for check in checks if check.state == "crossed"]
    open_ones = [check for check in checks if check.state in ("undecided", "missing")]
    if crossed:
        _problem(case, "failure", crossed)
    elif open_ones:
        _problem(case, "error", open_ones)
    verdict = f"{words.OUTCOMES[finding.outcome]}: {finding.reason}"
    said = f"{words.sentence(finding)} n = {finding.found.n}. {verdict}"
    SubElement(case, "system-out").text = _text(said)


def _skipped(suite: Element, each: NotRun) -> None:
    case = _new_case(suite, each.exposure, each.attacker, 0.0)
    SubElement(case, "skipped", message=_text(f"{each.kind}: {each.reason}"))


def _new_case(suite: Element, exposure: str, name: str, seconds: float) -> Element:
    about = {"classname": f"fedkl.audit.{exposure}", "name": name, "time": f"{seconds:.3f}"}
    return SubElement(suite, "testcase", {key: _text(value) for key, value in about.items()})


def _problem(case: Element, kind: str, checks: list[Check]) -> None:
    """One element for all of them: most readers show the first only."""
    text = _text(" ".join(check.text for check in checks))
    SubElement(case, kind, type=checks[0].state, message=text).text = text


def _count(suites: Element, suite: Element) -> None:
    cases = suite.findall("testcase")
    kinds = {"failures": "failure", "errors": "error", "skipped": "skipped"}
    counts = {name: sum(case.find(kind) is not None for case in cases) for name, kind in kinds.items()}
    seconds = sum(float(case.attrib["time"]) for case in cases)
    for name, number in {"tests": len(cases), **counts}.items():
        suites.set(name, str(number))
        suite.set(name, str(number))
    suites.set("time", f"{seconds:.3f}")
    suite.set("time", f"{seconds:.3f}")


def _text(text: str) -> str:
    """Without the characters that XML cannot hold."""
    return _NOT_XML.sub("�", text)
