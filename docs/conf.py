"""The documentation as a site, by Sphinx with MyST-NB: `make docs`. The pages read well without it."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path

import typer
from sphinx.application import Sphinx
from typer.cli import get_docs_for_click

import fedkl
from fedkl.cli import app as commands

project = "fedkl"
author = copyright = "The fedkl authors"
release = version = fedkl.__version__

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton"]
exclude_patterns = ["images", "static"]
myst_enable_extensions = ["attrs_inline", "deflist"]
myst_heading_anchors = 4  # pages link to headings
nb_execution_mode = "off"  # `make notebooks` stores what cells give

default_role = "code"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
napoleon_use_rtype = False

copybutton_prompt_text = r">>> |\.\.\. "  # what is copied can be pasted
copybutton_prompt_is_regexp = True

html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_title = "fedkl"
html_show_copyright = False
html_copy_source = False
html_theme_options = {"top_of_page_buttons": []}

ROOT = Path(__file__).parent.parent
MADE = "made"
"""Folder of the pages that are made here."""

ELSEWHERE = {
    "CHANGELOG.md": f"docs/{MADE}/changes.md",
    "CONTRIBUTING.md": f"docs/{MADE}/contributing.md",
    "SECURITY.md": f"docs/{MADE}/reporting.md",
    "benchmarks/README.md": f"docs/{MADE}/benchmarks.md",
    "tests/vectors/README.md": f"docs/{MADE}/vectors.md",
    "examples/audit/README.md": f"docs/{MADE}/examples-audit.md",
    "examples/flower/README.md": f"docs/{MADE}/examples-flower.md",
    "examples/notebooks/audit-your-own.ipynb": f"docs/{MADE}/audit-your-own.ipynb",
    "examples/notebooks/first-leak.ipynb": f"docs/{MADE}/first-leak.ipynb",
}
"""Pages of the repository that do not lie in this folder."""

_LINK = re.compile(r"(?<=\]\()[^)\s#:]+(?=[#)])")
_FILE_NAME = re.compile(r"\[[\w./-]+\.md\](?=\([^):]+\))")
"""The text of a link that only repeats its file's name: a reader of the site has pages, which have titles."""
_PICTURE = re.compile(r"!\[[^]]*\]\(([\w./-]+)\.png\)")
_CODE = re.compile(r"<pre>.*?</pre>", re.DOTALL)
_WORD = re.compile(r"(?:<span[^>]*>[^\s<]+</span>|[^\s<]+)+|<[^>]*>")
"""In code with its colors: a tag alone, or what stands between two blanks."""


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    folder = ROOT / "docs" / MADE
    folder.mkdir(exist_ok=True)
    root = typer.main.get_command(commands)
    text = get_docs_for_click(obj=root, ctx=typer.Context(root), name="fedkl", title="Commands")
    (folder / "commands.md").write_text(text, encoding="utf-8")
    for source, place in ELSEWHERE.items():
        text = (ROOT / source).read_text(encoding="utf-8")
        linked = _linked_notebook if source.endswith(".ipynb") else _linked
        (ROOT / place).write_text(linked(text, source, place), encoding="utf-8")
    app.connect("source-read", _link_elsewhere)
    app.connect("html-page-context", _keep_options_whole)


def _link_elsewhere(app: Sphinx, page: str, source: list[str]) -> None:
    if not page.startswith(MADE):
        text = _linked(source[0], f"docs/{page}.md", f"docs/{page}.md")
        source[0] = _PICTURE.sub(lambda found: _in_both_modes(found, page), text)


def _in_both_modes(found: re.Match[str], page: str) -> str:
    """A picture of which there is a dark twin, followed by that: the theme shows one of them."""
    twin = f"{found[1]}-dark.png"
    if not (ROOT / "docs" / page).parent.joinpath(twin).is_file():
        return found[0]
    dark = found[0].replace(f"({found[1]}.png)", f"({twin})")
    return f"{found[0]}{{.only-light}} {dark}{{.only-dark}}"


def _keep_options_whole(app: Sphinx, page: str, template: str, context: dict, doctree: object) -> None:
    """Words of code that have a hyphen, such as options, are marked: site.css breaks lines at blanks only."""
    if "body" in context:
        context["body"] = _CODE.sub(lambda code: _WORD.sub(_whole, code[0]), context["body"])


def _whole(word: re.Match[str]) -> str:
    text = re.sub("<[^>]*>", "", word[0])
    return f'<span class="word">{word[0]}</span>' if "-" in text else word[0]


def _linked_notebook(text: str, source: str, place: str) -> str:
    notebook = json.loads(text)
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = _linked("".join(cell["source"]), source, place)
    return json.dumps(notebook)


def _linked(text: str, source: str, place: str) -> str:
    """A page's text with links from where it is in the site."""

    def turned(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[0]))
        if not (ROOT / target).exists():
            return match[0]  # the build names it
        return posixpath.relpath(ELSEWHERE.get(target, target), posixpath.dirname(place))

    return _LINK.sub(turned, _FILE_NAME.sub("[]", text))
