"""Audits made by hand, and their folders as an audit leaves them."""

from __future__ import annotations

import json
from pathlib import Path

import safetensors.torch
import torch

from fedkl.auditing.results import Audit, Exposure, Finding, Measured, NotRun, Settings, Summary
from fedkl.metrics import wilson_interval

REAL = Exposure(
    name="real", title="your client: one epoch of 300 images", headline=True, images=300, steps=38
)
SINGLE = Exposure(name="single", title="one step on one image", headline=False, images=1, steps=1)
SUMS = Exposure(name="sums", title="the mean of 16 clients", headline=False, images=300, steps=38, clients=16)

SUM = REAL.model_copy(update={"name": "sum-of-3", "title": "the sum of 3 clients", "clients": 3})


def measured(successes: int, n: int) -> Measured:
    low, high = wilson_interval(successes, n)
    return Measured(rate=successes / n, low=low, high=high, n=n)


def finding(question: str = "presence", successes: int = 201, n: int = 300, **changes) -> Finding:
    values = {
        "question": question,
        "attacker": "span",
        "exposure": "real",
        "threat_model": "D",
        "knew": "200 images of its own",
        "found": measured(successes, n),
        "outcome": "leaks",
        "reason": "more than the floor",
        "seconds": 12.5,
    }
    return Finding(**(values | changes))


def not_run(attacker: str = "gauss-newton", **changes) -> NotRun:
    values = {"attacker": attacker, "exposure": "real", "kind": "no time left", "reason": "it needs 300 s"}
    return NotRun(**(values | changes))


def audit(*results: Finding | NotRun, finished: bool = True, **settings) -> Audit:
    """`settings` are those that differ from the usual ones."""
    values = {
        "fedkl": "0.1.0",
        "target": "audits.mine:subject",
        "source": "audits/mine.py",
        "line": 12,
        "subject": "hospital",
        "images": 400,
        "classes": 10,
        "batch_sizes": (1, 16),
        "environment": {"torch": "2.6.0"},
        "exposures": (REAL, SINGLE, SUMS),
    }
    findings = tuple(each for each in results if isinstance(each, Finding))
    skipped = tuple(each for each in results if isinstance(each, NotRun))
    counts = {"findings": len(findings), "not_run": len(skipped)}
    done = Summary(seconds=60.0, date="2026-11-29", version=2, **counts) if finished else None
    return Audit(settings=Settings(**(values | settings)), findings=findings, not_run=skipped, summary=done)


def write(folder: Path, made: Audit) -> Path:
    """The files of an audit, without pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "audit.json").write_text(made.settings.model_dump_json())
    lines = [each.model_dump_json() + "\n" for each in (*made.findings, *made.not_run)]
    (folder / "results.jsonl").write_text("".join(lines))
    if made.summary is not None:
        (folder / "summary.json").write_text(json.dumps(made.summary.model_dump()))
    return folder


def write_pictures(folder: Path, name: str, *, images: int = 3, size: int = 16, seed: int = 0) -> str:
    """Pictures of a finding; the last one is lost. Returns the finding's `pictures`."""
    truth = torch.rand(images, 3, size, size, generator=torch.Generator().manual_seed(seed))
    found = (truth + 0.1).clamp(0, 1)
    found[-1] = float("nan")
    place = f"pictures/{name}.safetensors"
    (folder / "pictures").mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({"truth": truth, "found": found}, folder / place)
    return place
