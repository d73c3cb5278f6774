"""The report of an audit as Markdown, for terminals, reviews and repositories."""

from __future__ import annotations

from collections.abc import Iterator

from fedkl.auditing import advice, words
from fedkl.markdown import escaped, table_lines
from fedkl.report.audit.page import BOUNDS_NOTE, PRESENCE_NOTE, AuditPage, Bar
from fedkl.report.page import Table


def render(page: AuditPage, *, pictures: str) -> str:
    """The whole report; `pictures` is the file of those that it opens with."""
    return "\n".join(_lines(page, pictures)) + "\n"


def _lines(page: AuditPage, pictures: str) -> Iterator[str]:
    yield from (f"# {escaped(page.title)}", "", f"**{escaped(page.verdict.text)}**", "")
    if page.opening and page.opening.pairs:
        yield from (f"**{escaped(page.opening_label)}**", "")
        yield from (f"![Originals beside the server's attempts]({pictures})", "")
        yield from (escaped(page.opening_note), "")
    elif page.opening:
        yield from (f"Pictures missing: {escaped(str(page.opening.problem))}", "")
    if page.presence:
        yield from ("## Is an image recognized?", "", f"{escaped(page.presence)} {PRESENCE_NOTE}", "")
    yield from _listed("Who could do it?", page.who)
    yield from _steps(page.steps)
    yield from (escaped(page.caution), "")
    yield from _bars("What your clients really send", page.real)
    yield from _bars("Upper bounds", page.bounds, note=BOUNDS_NOTE)
    for table in (page.findings, page.further, page.not_run):
        yield from _table(table)
    yield from ("## Repeat this", "", f"    {page.command}", "", escaped(page.versions))


def _listed(title: str, items: list[str]) -> Iterator[str]:
    if items:
        yield from (f"## {title}", "", *(f"* {escaped(item)}" for item in items), "")


def _steps(steps: list[advice.Step]) -> Iterator[str]:
    if steps:
        yield from ("## What to do next", "")
        for step in steps:
            yield f"* {escaped(step.text)}"
            if step.command is not None:
                yield from ("", f"      {step.command}")
        yield ""


def _bars(title: str, bars: list[Bar], *, note: str = "") -> Iterator[str]:
    if bars:
        lines = [_bar(bar) for bar in bars]
        yield from (f"## {title}", "", *([note, ""] if note else []), *lines, "")


def _bar(bar: Bar) -> str:
    because = f": {bar.reason}" if bar.tone == "open" else ""
    found = f"{bar.alt} ({bar.title}){because}"
    return f"* {words.OUTCOMES[bar.finding.outcome]}: {escaped(found)}"


def _table(table: Table) -> Iterator[str]:
    if table.rows:
        yield from (f"## {table.title}", "")
        header, *rows = ([escaped(cell) for cell in line] for line in table.lines())
        yield from (*table_lines(header, rows), "")
        for note in table.notes:
            yield from (escaped(note), "")
