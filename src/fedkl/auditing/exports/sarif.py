"""SARIF 2.1.0: findings as a code host's security page shows them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

from fedkl.auditing import words
from fedkl.auditing.gate import GateResult
from fedkl.auditing.results import Audit, Finding, Question, Settings

_SCHEMA = "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"

Level = Literal["error", "warning", "note"]

_RULES: dict[Question, tuple[str, str, str]] = {
    "rebuilt": ("ClientImagesRebuilt", "The update lets the server rebuild a client's images", "9.0"),
    "identified": ("ClientImagesIdentified", "The update tells a client's images from many others", "8.0"),
    "presence": ("ClientImagesRecognized", "The update tells which images a client trained on", "6.0"),
    "labels": ("ClientLabelsTold", "The update tells the classes of a client's images", "4.0"),
}
"""Name, meaning, and severity from 0 to 10 as code hosts order them."""


def sarif(audit: Audit, result: GateResult, *, page: Path | None = None) -> str:
    """One run: a rule for each question, a result for each leak and each finding that crosses a limit.

    Crossed limits are errors, other leaks of what clients really send are warnings, leaks at upper bounds are
    notes.

    Args:
        audit: What was found.
        result: What `judge` made of it.
        page: Its report; a result is placed there where the target's file is not known, because code hosts
            refuse results without a file.

    Returns:
        The file's text, to be written as UTF-8.

    Source:
        OASIS, "Static Analysis Results Interchange Format (SARIF) Version 2.1.0"; of the optional properties
        those that GitHub's code scanning reads.
    """
    shown = [each for each in audit.worst_first() if each.outcome == "leaks" or result.crossed(each)]
    run = {
        "tool": {"driver": _driver(audit.settings)},
        "automationDetails": {"id": f"fedkl-audit/{'/'.join(_protocol(audit.settings))}/"},
        "originalUriBaseIds": {"%SRCROOT%": {"description": {"text": "Where the audit was started."}}},
        "invocations": [_invocation(audit, result)],
        "results": [_result(audit, each, result, page) for each in shown],
        "columnKind": "unicodeCodePoints",
    }
    document = {"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]}
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def _driver(settings: Settings) -> dict[str, Any]:
    return {
        "name": "fedkl",
        "version": settings.fedkl,
        "rules": [
            {
                "id": _rule_id(question),
                "name": name,
                "shortDescription": {"text": f"{meaning}."},
                "fullDescription": {"text": f"{meaning}, as attacks that were run on this model show."},
                "help": {"text": f"{words.NOT_SAFE} The audit's report.html says what was measured."},
                "defaultConfiguration": {"level": "warning"},
                "properties": {"tags": ["privacy", "security"], "security-severity": severity},
            }
            for question, (name, meaning, severity) in _RULES.items()
        ],
    }


def _rule_id(question: Question) -> str:
    return f"fedkl/{question}"


def _invocation(audit: Audit, result: GateResult) -> dict[str, Any]:
    """Whether the audit ran to its end; what it found does not matter here."""
    lacking = [each.text for each in result.checks if each.state in ("undecided", "missing")]
    lacking += [f"{each.attacker} on {each.exposure} {each.kind}: {each.reason}" for each in audit.not_run]
    return {
        "executionSuccessful": audit.summary is not None,
        "exitCode": result.exit_code,
        "toolExecutionNotifications": [
            {"level": "warning", "message": {"text": text}} for text in dict.fromkeys(lacking)
        ],
    }


def _result(audit: Audit, finding: Finding, result: GateResult, page: Path | None) -> dict[str, Any]:
    real = audit.exposure(finding.exposure)
    crossed = result.crossed(finding)
    level: Level = "error" if crossed else "warning" if real.headline else "note"
    place = real.title if real.headline else f"upper bound, {real.title}"
    verdict = f"{words.OUTCOMES[finding.outcome].capitalize()}: {finding.reason}"
    text = f"{words.sentence(finding)} Attacker: {finding.attacker}. Setting: {place}. {verdict}"
    return {
        "ruleId": _rule_id(finding.question),
        "ruleIndex": list(_RULES).index(finding.question),
        "level": level,
        "message": {"text": " ".join([text, *crossed])},
        "locations": [_location(audit.settings, page)],
        "partialFingerprints": {"fedklFinding/v2": _fingerprint(audit.settings, finding)},
        "properties": {"attacker": finding.attacker, "exposure": finding.exposure, "n": finding.found.n},
    }


def _location(settings: Settings, page: Path | None) -> dict[str, Any]:
    """Where the audited function begins; of a file that is not known the report, of which the first line."""
    known = settings.source is not None
    file = settings.source.replace("\\", "/") if settings.source is not None else _place_of(page)
    return {
        "physicalLocation": {
            "artifactLocation": {"uri": quote(file, safe="/"), "uriBaseId": "%SRCROOT%"},
            "region": {"startLine": (settings.line if known else None) or 1},
        },
        "logicalLocations": [{"fullyQualifiedName": settings.target, "kind": "function"}],
    }


def _place_of(page: Path | None) -> str:
    """Relative to where the audit was started; of a page elsewhere, its name."""
    if page is None:
        return "report.html"
    here, there = Path.cwd().resolve(), page.resolve()
    return there.relative_to(here).as_posix() if there.is_relative_to(here) else page.name


def _protocol(settings: Settings) -> list[str]:
    """What is audited: audits of these are other ones, and none replaces another."""
    sent = "recorded" if settings.recorded else "simulated"
    return [settings.subject, settings.defense, settings.masking, sent]


def _fingerprint(settings: Settings, finding: Finding) -> str:
    """The same for the same finding of every audit of the same, whatever its numbers."""
    parts = [*_protocol(settings), finding.question, finding.attacker, finding.exposure]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()
