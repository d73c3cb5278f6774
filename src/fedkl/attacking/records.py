"""One record per arm of an attack run, the paper's figures beside it, and the table as Markdown."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field, TypeAdapter

from fedkl import wording
from fedkl.attacking.reconstructions import load_reconstruction
from fedkl.attacking.results import arm_figures, attack_summary, broken, floor_shares
from fedkl.attacks import DLG, IDLG
from fedkl.config import AttackConfig
from fedkl.errors import ConfigError
from fedkl.files import read_file, write_atomically
from fedkl.markdown import table_lines
from fedkl.metrics import SSIM_SUCCESS, SUCCESS_DB, match, paper_psnr_to_true
from fedkl.metrics.perceptual import LPIPS
from fedkl.parsing import parse_json_object
from fedkl.runs import RunDirectory

Record = dict[str, Any]

_PRINTED_ARMS = {"no-norm": 0, "lock": 1}  # the paper's two columns
_LPIPS_FILE = "lpips.json"

_NOTES = (
    "n counts images; failed ones (no finite picture) count in n and as not recovered. Recovered: PSNR ≥ "
    f"{SUCCESS_DB:.0f} dB; attack success rate: SSIM ≥ {SSIM_SUCCESS}; intervals of shares: 95 %, after "
    "Wilson, by update. PSNR and SSIM: median [quartiles] of the others, with scale and offset fixed by the "
    "attacker's own rule. After the best affine fit: a diagnostic that uses the truth. Identified: of all "
    "candidates the true image correlates best.",
    "Paper: PSNR converted to its true value (2 × printed − 48.13 dB), means over its trials. Its figures "
    "without lock stand beside the arm no-norm, those with lock beside the arm lock.",
    "Keys and lock layers come from the operating system's random numbers: locked arms vary from run to run.",
)


def records_of(
    run: RunDirectory,
    *,
    given: Mapping[str, Any],
    printed: Mapping[str, Sequence[float]] | None,
    distances: Mapping[str, Mapping[str, Sequence[float | None]]],
    alone: bool = False,
) -> list[Record]:
    """One record per arm of a finished run.

    Args:
        run: The run.
        given: What the table knows of it: row, budget, seed.
        printed: The paper's [without, with] figures as printed; None: not in the paper.
        distances: LPIPS by arm and measure, see `perceptual_distances`.
        alone: Count only images whose label no other image of their update has. What an attack makes of
            several images of one class is a mixture of them, so that such images say little about a defense.

    Raises:
        ConfigError: The run is not a finished attack, or no image is alone.
    """
    config = run.config
    summary = attack_summary(run) if isinstance(config, AttackConfig) else None
    if not isinstance(config, AttackConfig) or summary is None:
        raise ConfigError(f"{run.path}: not a finished attack. Run the table again.")
    results = list(run.results())
    trials, guesses = ([r for r in results if r["event"] == event] for event in ("trial", "floor"))
    if alone:
        if not all("labels" in trial for trial in trials):
            raise ConfigError(f"{run.path}: of an older version, without labels. Use another folder.")
        trials, guesses = [_alone(trial) for trial in trials], [_alone(guess) for guess in guesses]
        if not any(trial["scores"] for trial in trials):
            raise ConfigError(f"{run.path}: every image shares its label with another. Attack more images.")
    floor = floor_shares(guesses) if guesses else None
    return [
        dict(given)
        | _setting(config)
        | _figures(config, arm, trials, distances.get(arm["name"], {}), summary.get("not_run", []))
        | {"floor": floor, "paper": _paper(arm["name"], printed), "seconds": summary["seconds"]}
        for arm in summary["arms"]
    ]


def _alone(trial: Record) -> Record:
    """A trial without the images that share their label with another."""
    count = Counter[int](trial["labels"])
    pairs = zip(trial["scores"], trial["labels"], strict=True)
    return trial | {"scores": [score for score, label in pairs if count[label] == 1]}


def _setting(config: AttackConfig) -> Record:
    return {
        "attack": config.attack.type,
        "model": config.model.name,
        "initialization": config.model.initialization,
        "data": config.data.name,
        "norm_mode": config.norm_mode,
        "defense": config.defense.describe(),
        "labels": _labels(config),
    }


def _figures(
    config: AttackConfig,
    arm: Record,
    trials: Sequence[Record],
    distances: Mapping[str, Sequence[float | None]],
    left_out: Sequence[Record],
) -> Record:
    own = [trial for trial in trials if trial["arm"] == arm["name"]]
    scores = [s for trial in own for s in trial["scores"]]
    if not scores:
        raise ConfigError(f"{arm['name']}: results.jsonl holds no image of this arm. Run the table again.")
    broke = broken(left_out, arm["name"]) * config.batch_size
    found = arm_figures(own, updates_per_client=config.updates_per_client, broke=broke)
    about = ("scaling", "candidates", "broke", "updates")
    kept = (*about, "success", "ssim_success", "identified", "label_correct")
    return {
        "arm": arm["name"],
        **{name: arm[name] for name in ("description", "knows")},
        **{name: found[name] for name in kept},
        "n": found["figures"]["psnr"]["n"],
        "failures": found["figures"]["psnr"]["failures"],
        **{name: _quartiles([s[name] for s in scores]) for name in ("psnr", "ssim", "psnr_affine")},
        **{name: _quartiles(values) for name, values in distances.items()},
        "evaluations": found["evaluations"]["median"],
    }


def _labels(config: AttackConfig) -> str:
    if config.labels_known and not isinstance(config.attack, IDLG):
        return "given"
    optimized = config.attack.type == "grnn" or type(config.attack) is DLG
    return "found along" if optimized else "inferred"


def _quartiles(values: Sequence[float | None]) -> dict[str, float] | None:
    found = [value for value in values if value is not None]
    if not found:
        return None
    low, middle, high = (float(q) for q in np.percentile(found, (25, 50, 75)))
    return {"median": middle, "low": low, "high": high}


def _paper(arm: str, printed: Mapping[str, Sequence[float]] | None) -> dict[str, float] | None:
    """The paper's figures for an arm as true values; its LPIPS, fed 0..255, stays as printed."""
    if printed is None or arm not in _PRINTED_ARMS:
        return None
    values = {name: pair[_PRINTED_ARMS[arm]] for name, pair in printed.items()}
    true = {"psnr": paper_psnr_to_true(values["psnr"]), "mse": (values["mse"] / 255) ** 2}
    return true | {name: values[name] for name in ("ssim", "lpips_vgg", "lpips_alex")}


def perceptual_distances(
    run: RunDirectory, measures: Sequence[LPIPS]
) -> dict[str, dict[str, list[float | None]]]:
    """LPIPS of a finished run's reconstructions by arm and measure, None where failed; kept in lpips.json."""
    path = run.path / _LPIPS_FILE
    if not measures:
        return {}
    if path.is_file():
        return _kept_distances(path)
    found: dict[str, dict[str, list[float | None]]] = {}
    for trial in (record for record in run.results() if record["event"] == "trial"):
        reconstruction, true = load_reconstruction(run, trial["arm"], trial=trial["trial"])
        truth = true.double()
        matched = match(reconstruction, truth, scaling=trial["scaling"])
        for measure in measures:
            values = measure(matched.scaled, truth.clamp(0, 1))
            values = torch.where(matched.failed, torch.nan, values)
            row = found.setdefault(trial["arm"], {}).setdefault(f"lpips_{measure.backbone}", [])
            row += [None if value != value else value for value in values.tolist()]
    write_atomically(path, (json.dumps(found, allow_nan=False) + "\n").encode())
    return found


_DISTANCES = TypeAdapter(
    dict[str, dict[str, list[Annotated[float, Field(strict=True, allow_inf_nan=False)] | None]]]
)


def _kept_distances(path: Path) -> dict[str, dict[str, list[float | None]]]:
    try:
        return _DISTANCES.validate_python(parse_json_object(read_file(path)))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: damaged. Remove it; it will be measured again.") from error


def markdown(records: Sequence[Record], *, refused: Mapping[str, str], described: bool = False) -> str:
    """The table, what its columns mean, and the rows that could not be run.

    Args:
        records: See `records_of`.
        refused: Rows that could not be run, and why.
        described: Whether to describe each arm.
    """
    columns = _columns(records, described=described)
    rows = [[cell(record) for cell in columns.values()] for record in records]
    quick = any(record["budget"] == "quick" for record in records)
    notes = [
        "**Budget quick: not the paper's iterations; a weak attack makes any defense look good.**"
    ] * quick
    notes += _NOTES
    if any("lpips_vgg" in record for record in records):
        notes.append("LPIPS: unverified against the reference implementation. The paper's was fed 0..255.")
    notes += [f"Not run: {name}. {' '.join(reason.split())}" for name, reason in refused.items()]
    return "\n\n".join(["\n".join(table_lines(list(columns), rows, tight=True)), *notes]) + "\n"


def _columns(records: Sequence[Record], *, described: bool) -> dict[str, Callable[[Record], str]]:
    columns: dict[str, Callable[[Record], str]] = {
        "attack": lambda r: r["attack"],
        "model": lambda r: f"{r['model']} ({r['initialization']})",
        "data": lambda r: r["data"],
        "norm mode": lambda r: r["norm_mode"],
        "labels": _label_cell,
        "arm": lambda r: r["arm"],
    }
    if described:
        columns |= {"what it is": lambda r: r["description"], "the server knows": lambda r: r["knows"]}
    columns |= {
        "n": lambda r: str(r["n"]),
        "failed": lambda r: str(r["failures"]),
        f"≥ {SUCCESS_DB:.0f} dB [95 %]": lambda r: wording.count_interval(r["success"]),
        f"SSIM ≥ {SSIM_SUCCESS} [95 %]": lambda r: wording.count_interval(r["ssim_success"]),
        "PSNR (dB)": lambda r: _spread(r["psnr"], 1),
        "SSIM": lambda r: _spread(r["ssim"], 2),
    }
    if any("lpips_vgg" in record for record in records):
        columns |= {
            "LPIPS-VGG": lambda r: _spread(r.get("lpips_vgg"), 2),
            "LPIPS-Alex": lambda r: _spread(r.get("lpips_alex"), 2),
        }
    return columns | {
        "PSNR after affine fit (diagnostic)": lambda r: _spread(r["psnr_affine"], 1),
        "identified [95 %]": lambda r: f"{wording.count_interval(r['identified'])} among {r['candidates']}",
        "paper: PSNR (dB)": lambda r: _printed(r, "psnr", 1),
        "paper: SSIM": lambda r: _printed(r, "ssim", 2),
    }


def _label_cell(record: Record) -> str:
    if record["labels"] == "given":
        return "given"
    return f"{record['labels']}: {wording.count(record['label_correct'])}"


def _spread(figure: Mapping[str, float] | None, digits: int) -> str:
    if figure is None:
        return wording.NONE
    middle, low, high = (wording.number(figure[n], digits=digits) for n in ("median", "low", "high"))
    return f"{middle} [{low}, {high}]"


def _printed(record: Record, name: str, digits: int) -> str:
    return wording.NONE if record["paper"] is None else wording.number(record["paper"][name], digits=digits)
