"""The report of an audit: what a data-protection officer must know first, then every figure behind it."""

from __future__ import annotations

from pathlib import Path

from fedkl.auditing.results import Audit
from fedkl.report import figures
from fedkl.report.audit import html, markdown
from fedkl.report.audit.page import AuditPage, audit_page
from fedkl.report.audit.pictures import as_grid
from fedkl.report.page import Table

__all__ = ["PICTURES", "files_of", "is_audit"]

PICTURES = "figures/rebuilt.png"
"""The pictures that the page opens with, for its Markdown twin."""


def is_audit(folder: Path) -> bool:
    """Whether a folder holds an audit."""
    try:
        return (folder / "audit.json").is_file()
    except OSError:  # a name that no file can have
        return False


def files_of(folder: Path) -> tuple[dict[str, bytes], list[Table]]:
    """The report's files by their names below the folder, and its tables.

    Raises:
        ConfigError: It is no audit's folder, or a file is damaged.
    """
    page = audit_page(Audit.read(folder), folder)
    files = {"report.html": html.render(page).encode(), "report.md": _markdown(page).encode()}
    if page.opening and page.opening.pairs:
        files[PICTURES] = figures.picture_grid(as_grid(page.opening))
    return files, [page.findings]


def _markdown(page: AuditPage) -> str:
    return markdown.render(page, pictures=PICTURES)
