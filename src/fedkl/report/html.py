"""The report as one HTML file: images inside, no script, no network."""

from __future__ import annotations

from base64 import b64encode

from jinja2 import Environment, PackageLoader, StrictUndefined

from fedkl.report.figures import ACCURACY, thumbnail
from fedkl.report.page import REPEAT_NOTE, RUNS_SUMMARY, TITLE, Page
from fedkl.report.pictures import Picture


def render(page: Page) -> str:
    """The whole page."""
    return (
        environment()
        .get_template("report.html.j2")
        .render(
            page=page,
            title=TITLE,
            note=page.note,
            repeat_note=REPEAT_NOTE,
            runs_summary=RUNS_SUMMARY,
            source=lambda name: uri(page.figures[name]),
            accuracy=ACCURACY,
            thumbnail=_thumbnail,
        )
    )


def environment() -> Environment:
    """Of all pages: everything is escaped, and a name that is missing is an error."""
    return Environment(
        loader=PackageLoader("fedkl.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _thumbnail(picture: Picture) -> str | None:
    return None if picture.image is None else uri(thumbnail(picture.image))


def uri(png: bytes) -> str:
    """An image as it stands in a page."""
    return "data:image/png;base64," + b64encode(png).decode()
