"""The report as Markdown, for terminals, reviews and repositories; its figures lie in figures/."""

from __future__ import annotations

import re
from collections.abc import Iterator

from fedkl.markdown import escaped as _text
from fedkl.markdown import table_lines
from fedkl.report.figures import ACCURACY, SIDE_BY_SIDE
from fedkl.report.page import REPEAT_NOTE, TITLE, AttackSection, Page, Repeat, Table


def render(page: Page) -> str:
    """The whole report."""
    return "\n".join(_lines(page)) + "\n"


def _lines(page: Page) -> Iterator[str]:
    yield from (f"# {TITLE}", "")
    if page.opening:
        for sent, found in page.opening.answers:
            yield f"* **{_text(sent)}:** {_text(found)}"
        yield from ("", _text(page.opening.limits), "")
        yield from (f"![{_text(page.opening.alt)}](figures/{SIDE_BY_SIDE})", "")
        yield from (_text(page.opening.caption), "")
    yield from (_text(page.verdict), "")
    if page.note:
        yield from (f"**{_text(page.note)}**", "")
    for line in page.unfinished:
        yield f"* {_text(line)}"
    if page.verdict_table.rows:
        yield from ("", *_table(page.verdict_table))
    if page.training:
        yield from ("## Training", "", f"![{_text(page.curves_alt)}](figures/{ACCURACY})", "")
        yield from _table(page.training)
    for figure in page.partitions:
        yield from (f"![{_text(figure.alt)}](figures/{figure.name})", "", _text(figure.caption), "")
    if page.claim_b:
        yield from _table(page.claim_b)
    for section in page.attacks:
        yield from _attack(section)
    yield from ("## Repeat this", "", REPEAT_NOTE, "")
    for repeat in page.repeat:
        yield from _repeat(repeat)


def _attack(section: AttackSection) -> Iterator[str]:
    name = _text(section.name)
    yield from (f"## Attack: {name}", "", f"![Reconstructions of {name}](<figures/{section.figure}>)", "")
    for problem in section.grid.problems:
        yield f"* Picture missing: {_text(problem)}"
    yield from ("", *_table(section.table))
    if section.paper:
        yield from (_text(section.paper), "")


def _repeat(repeat: Repeat) -> Iterator[str]:
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", repeat.config)), default=0))
    yield from (f"### {_text(repeat.name)}", "", f"    {repeat.command}", "")
    yield from (_text(f"Seed {repeat.seed}. {repeat.machine}."), "")
    yield from (f"{fence}toml", repeat.config.rstrip("\n"), fence, "")


def _table(table: Table) -> Iterator[str]:
    yield from (f"**{_text(table.title)}**", "")
    header, *rows = ([_text(cell) for cell in line] for line in table.lines())
    yield from table_lines(header, rows)
    yield ""
    for note in table.notes:
        yield from (_text(note), "")
