"""The documentation as a site: it builds without a warning, links included, and is read on a phone."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fedkl.auditing.target import load

ROOT = Path(__file__).parent.parent
PAGES = (
    "index",
    "tutorial",
    "expect",
    "masked",
    "audit",
    "data",
    "adaptive",
    "made/commands",
    "made/first-leak",
    "made/audit-your-own",
    "reference/python",
    "results/2026-11-audit",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    pytest.importorskip("sphinx", reason="the site is built by Sphinx")
    copy, out = tmp_path_factory.mktemp("repository"), tmp_path_factory.mktemp("site")
    for name in ("docs", "src", "examples", "benchmarks", "tests/mutants", "tests/vectors"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "made"))
    for file in ROOT.glob("*.md"):
        shutil.copy(file, copy)
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--quiet",
        "--fail-on-warning",
        "-b",
        "html",
        copy / "docs",
        out,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_every_page_is_in_the_site_and_found_by_its_search(site):
    pages = {p.relative_to(ROOT / "docs").with_suffix("") for p in (ROOT / "docs").rglob("*.md")}
    pages = {page for page in pages if page.parts[0] != "made"}
    assert not [page for page in pages if not (site / page).with_suffix(".html").is_file()]
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert all(f'"{page.as_posix()}"' in index for page in pages)


@pytest.mark.parametrize(("page", "pictures"), [("first-leak", 5), ("audit-your-own", 1)])
def test_notebooks_are_shown_with_their_stored_outputs(site, page, pictures):
    text = (site / "made" / f"{page}.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img [^>]*src="(\.\./_images/[^"]+\.png)"', text)
    assert len(shown) == pictures
    assert all((site / "made" / each).is_file() for each in shown)
    links = re.findall(r'href="([^"]*)"', text)
    assert "../tutorial.html#install" in links
    assert not [link for link in links if link.endswith(".ipynb")]


def test_the_sidebar_fits_a_window_and_leads_to_every_page(site):
    text = (site / "index.html").read_text(encoding="utf-8")
    assert len(re.findall(r'class="toctree-l1', text)) <= 40
    assert {"reference/index.html", "results/index.html"} <= set(re.findall(r'href="([^"]*)"', text))
    pages = {page.relative_to(site).as_posix() for page in site.rglob("*.html")}
    pages -= {"genindex.html", "search.html", "py-modindex.html", "index.html", "frames.html"}
    assert not [page for page in pages if f'href="{page}"' not in text]


def test_no_link_shows_the_name_of_a_file(site):
    shown = re.compile(r'<a class="reference internal"[^>]*>(?:<span[^>]*>)*([^<]*\.(?:md|ipynb))<')
    found = {
        page.relative_to(site).as_posix(): names
        for page in site.rglob("*.html")
        if (names := shown.findall(page.read_text(encoding="utf-8")))
    }
    assert not found


def test_nothing_is_loaded_from_elsewhere(site):
    loaded = re.compile(r'<(?:script|link|img)[^>]*(?:src|href)="(?:https?:)?//', re.IGNORECASE)
    assert not [page for page in PAGES if loaded.search((site / f"{page}.html").read_text(encoding="utf-8"))]


@pytest.mark.parametrize("page", ["index", "why-gradients-leak"])
def test_a_picture_with_a_dark_twin_is_shown_in_one_mode_each(site, page):
    text = (site / f"{page}.html").read_text(encoding="utf-8")
    shown = re.findall(r'<img [^>]*class="(only-\w+)" src="_images/([\w-]+\.png)"', text)
    assert shown == [("only-light", "demo-side-by-side.png"), ("only-dark", "demo-side-by-side-dark.png")]


def test_code_breaks_at_blanks_only(site):
    text = (site / "audit.html").read_text(encoding="utf-8")
    code = "".join(re.findall(r"<pre>.*?</pre>", text, re.DOTALL))
    assert '<span class="word">--out</span>' in re.sub(
        r'<span class="(?!word)\w*">(--|out)</span>', r"\1", code
    )
    assert code.count("<span") == code.count("</span>")
    style = (ROOT / "docs" / "static" / "site.css").read_text(encoding="utf-8")
    assert re.search(r"\.word \{\s*display: inline-block", style)
    assert re.search(r"@media print \{\s*\.skip-to-content \{\s*display: none", style)


MEASURE = """<script>onload = () => {
  const documents = [...document.querySelectorAll("iframe")].map(frame => frame.contentDocument)
  const count = (page, name, wrong) => [...page.querySelectorAll(name)].filter(wrong).length
  document.title = JSON.stringify(documents.map(page => ({
    width: page.documentElement.scrollWidth,
    cut: count(page, "pre", each => each.scrollWidth > each.clientWidth),
    signs: count(page, ".headerlink", each => getComputedStyle(each).position != "absolute"),
  })))
}</script>"""


@pytest.mark.parametrize("width", [390, 1280])
def test_chromium_shows_pages_as_wide_as_the_window_and_all_of_their_code(site, width, tmp_path):
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("no Chromium on this machine: its test of the site needs one on PATH")
    frame = "".join(f'<iframe src="{page}.html" width="{width}" height="800"></iframe>' for page in PAGES)
    (site / "frames.html").write_text(frame + MEASURE, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    options += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=10000", "--dump-dom"]
    done = subprocess.run(
        [chromium, *options, (site / "frames.html").as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=200,
    )
    found = re.search(r"<title>(\[.+\])</title>", done.stdout)
    assert found is not None
    measured = json.loads(found[1])
    assert len(measured) == len(PAGES)
    assert max(each["width"] for each in measured) <= width
    assert not [page for page, each in zip(PAGES, measured, strict=True) if each["cut"] or each["signs"]]


def test_the_tutorials_subject_can_be_audited(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", text, re.DOTALL)
    assert code is not None
    (tmp_path / "mine.py").write_text(code[1], encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    subject = load("mine.py:subject").subject
    subject.check()
    assert (subject.name, subject.images_per_client) == ("mine", 8)
