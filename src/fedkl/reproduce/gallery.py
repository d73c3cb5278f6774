"""Tables 4 and 5: the reconstructions as pictures, one figure per row of Table 6."""

from __future__ import annotations

from base64 import b64encode
from pathlib import Path
from typing import NamedTuple

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedkl.attacking.records import Record
from fedkl.errors import ConfigError
from fedkl.files import write_atomically
from fedkl.report import figures, pictures
from fedkl.report.collect import AttackRun, collect
from fedkl.reproduce.leakage import LeakageTable, leakage, leakage_rows
from fedkl.study import OpenProgress

_SCALE = (
    "Pictures as the attacker would show them: clipped to [0, 1], or, behind a norm, which leaves the scale "
    "open, stretched to fill it."
)


class Shown(NamedTuple):
    """A row's figure: its name, the file's, the same in words, and the problems there were."""

    name: str
    file: str
    alt: str
    problems: list[str]
    png: bytes


def gallery(
    table: LeakageTable, *, title: str, out: Path, progress: OpenProgress, name: str = "table4"
) -> list[Record]:
    """Runs a table's rows and shows what every arm made of the first images.

    With several repeats there is one column per arm and repeat: other weights, keys and searches, the same
    images.

    Args:
        table: Which rows.
        title: The page's title.
        out: Folder of the table; figures/, pictures.md and the self-contained pictures.html are written too.
        progress: Opens a progress display for a run's name.
        name: See `leakage`, as for what is raised.
    """
    records = leakage(table, out=out, progress=progress, name=name)
    done = {record["row"] for record in records}
    shown = [_shown(name, table, out) for name in table.rows if name in done]
    for each in shown:
        write_atomically(out / "figures" / each.file, each.png)
    write_atomically(out / "pictures.md", _markdown(title, shown).encode())
    write_atomically(out / "pictures.html", _html(title, shown).encode())
    return records


def _shown(name: str, table: LeakageTable, out: Path) -> Shown:
    cells = table.cells(leakage_rows()[name])
    runs = [run for cell in cells for run in collect(out / cell.place).attacks]
    grid = beside_each_other(runs)
    columns = ", ".join(grid.columns[1:])
    alt = f"{name}: {len(grid.rows)} of {grid.total} images; columns: the true image, {columns}"
    file = f"{name.replace('/', '-')}.png"
    return Shown(name, file, alt, grid.problems, figures.picture_grid(grid))


def beside_each_other(runs: list[AttackRun]) -> pictures.Grid:
    """The pictures of runs on the same images as one grid: true, then every arm with all its repeats.

    Raises:
        ConfigError: There is no run, or the runs differ in their arms or trials.
    """
    grids = [pictures.grid(run) for run in runs]
    if len({(tuple(grid.columns), len(grid.rows), grid.total) for grid in grids}) != 1:
        raise ConfigError(
            "Pictures: expected finished runs of the same arms and trials. Run the table again."
        )
    first = grids[0]
    if len(grids) == 1:
        return first
    arms = range(1, len(first.columns))
    columns = [f"{first.columns[arm]} {n}" for arm in arms for n in range(1, len(grids) + 1)]
    rows = [
        pictures.Row(row.label, [row.cells[0], *(g.rows[i].cells[arm] for arm in arms for g in grids)])
        for i, row in enumerate(first.rows)
    ]
    problems = [problem for grid in grids for problem in grid.problems]
    return pictures.Grid([first.columns[0], *columns], rows, first.total, problems)


def _markdown(title: str, shown: list[Shown]) -> str:
    lines = [f"# {title}", "", _SCALE, ""]
    for each in shown:
        lines += [f"## {each.name}", "", f"![{each.alt}](<figures/{each.file}>)", ""]
        lines += [f"* Picture missing: {problem}" for problem in each.problems]
    return "\n".join(lines).rstrip() + "\n\nFigures: [table.md](table.md)\n"


def _html(title: str, shown: list[Shown]) -> str:
    environment = Environment(
        loader=PackageLoader("fedkl.reproduce"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("pictures.html.j2")
    return template.render(title=title, note=_SCALE, shown=shown, source=_uri)


def _uri(png: bytes) -> str:
    return "data:image/png;base64," + b64encode(png).decode()
