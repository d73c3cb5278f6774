"""The report of one run, of several, or of an audit: one HTML page, its Markdown twin, and the figures."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from fedkl.errors import ConfigError
from fedkl.files import PRIVATE_FILE, write_atomically
from fedkl.report import (
    attack_tables,
    audit,
    figures,
    html,
    markdown,
    partitions,
    pictures,
    training_tables,
    verdict,
)
from fedkl.report.collect import AttackRun, Collected, collect
from fedkl.report.names import plain_names
from fedkl.report.page import NOTE, AttackSection, Figure, Page, Repeat, Table
from fedkl.report.side_by_side import Answer, side_by_side

__all__ = ["Built", "build"]


class Built(NamedTuple):
    """What `build` made.

    Attributes:
        html: The self-contained page.
        pictures: The attacks side by side, where several were tried on the same images; of an audit the
            pictures that leak.
        tables: Title, header and rows of each table, in the columns that a terminal has room for.
    """

    html: Path
    pictures: Path | None
    tables: list[tuple[str, list[str], list[list[str]]]]


def build(path: Path) -> Built:
    """Builds report.html, report.md and figures/ in `path`, from the audit in it or all runs below it.

    Args:
        path: A run directory, a folder of run directories, or the folder of an audit.

    Raises:
        ConfigError: There is neither, or one is damaged or cannot be written to.
    """
    of_audit = audit.is_audit(path)  # whose pictures are of the user's images, or a real client's
    files, found = audit.files_of(path) if of_audit else _files_of_runs(path)
    if (path / "figures").is_symlink():
        raise ConfigError(f"{path / 'figures'}: a symbolic link; no figure is written through it. Remove it.")
    try:
        for name, content in files.items():
            write_atomically(path / name, content, mode=PRIVATE_FILE if of_audit else 0o644)
    except OSError as error:
        raise ConfigError(
            f"{path}: the report cannot be written here ({error.strerror}). The runs are kept: make room or "
            "the folder writable, or copy them to one that is, then `fedkl report FOLDER`."
        ) from error
    opening = [name for name in files if name in (f"figures/{figures.SIDE_BY_SIDE}", audit.PICTURES)]
    shown = [table.essential() for table in found]
    return Built(path / "report.html", path / opening[0] if opening else None, shown)


def _files_of_runs(path: Path) -> tuple[dict[str, bytes], list[Table]]:
    page = _page(collect(path))
    files = {f"figures/{name}": image for name, image in page.figures.items()}
    files |= {"report.md": markdown.render(page).encode(), "report.html": html.render(page).encode()}
    return files, page.tables()


def _page(collected: Collected) -> Page:
    sections = [_attack_section(run, collected) for run in collected.attacks]
    images = {section.figure: figures.picture_grid(section.grid) for section in sections}
    opening = side_by_side(collected.attacks)
    if opening:
        cost = verdict.costs(collected)
        costs = [Answer("What it costs", cost)] if cost else []
        opening = opening._replace(answers=[*opening.answers, *costs])
        images[figures.SIDE_BY_SIDE] = figures.picture_grid(opening.grid)
        images[figures.SIDE_BY_SIDE_DARK] = figures.picture_grid(opening.grid, dark=True)
    if collected.trains:
        images[figures.ACCURACY] = figures.accuracy_curves(collected.trains)
    divisions = _named(partitions.divisions(collected.trains))
    images |= {name: figures.partition_map(division.shown) for name, division in divisions.items()}
    return Page(
        opening=opening,
        verdict=verdict.paragraph(collected),
        note=NOTE if collected.attacks else "",
        verdict_table=attack_tables.verdict_table(verdict.findings(collected)),
        unfinished=collected.unfinished,
        training=training_tables.training_table(collected.trains) if collected.trains else None,
        partitions=[Figure(name, each.caption, each.alt) for name, each in divisions.items()],
        claim_b=training_tables.fill_in_table(collected.trains)
        if any(r.fill_ins for r in collected.trains)
        else None,
        attacks=sections,
        repeat=[
            Repeat(run.name, run.command, run.text, run.machine, run.config.seed)
            for run in (*collected.trains, *collected.attacks)
        ],
        figures=images,
        curves_alt=figures.curves_alt(collected.trains),
    )


def _named(divisions: list[partitions.Division]) -> dict[str, partitions.Division]:
    if len(divisions) == 1:
        return {"partition.png": divisions[0]}
    return {f"partition-{number}.png": division for number, division in enumerate(divisions, start=1)}


def _attack_section(run: AttackRun, collected: Collected) -> AttackSection:
    alone = len(collected.attacks) == 1
    slug, names = run.name.replace("/", "-"), plain_names(run.chosen)
    return AttackSection(
        name=run.name,
        grid=pictures.grid(run)._replace(columns=["original", *(names[arm] for arm in run.arms)]),
        figure="reconstructions.png" if alone else f"reconstructions-{slug}.png",
        table=attack_tables.attack_table(run, titled=not alone),
        paper=verdict.paper_comparison(run),
    )
