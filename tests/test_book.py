"""The book: every page is built from what is committed, and holds together without a network."""

from __future__ import annotations

import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from test_repository import NOTEBOOKS, Notebook, is_folded, prose

from foggen.store import ROOT

pytestmark = pytest.mark.slow


class Page(HTMLParser):
    """What a page holds: links, pictures, what it loads, anchors, and how often each tag."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.classes: list[str] = []
        self.tags: list[str] = []
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.append(tag)
        self.classes += given.get("class", "").split()
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in ("img", "script", "iframe", "source") and "src" in given:
            self.loads.append(given["src"])
        if tag == "link" and given.get("rel") in ("stylesheet", "icon", "preload"):
            self.loads.append(given["href"])


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built anew by the command of `make book`: a warning is an error."""
    if not (ROOT / ".venv-book" / "bin" / "sphinx-build").exists():
        pytest.skip("no .venv-book: `make book` makes it")
    out = tmp_path_factory.mktemp("book")
    command = [".venv-book/bin/sphinx-build", "-q", "-E", "-W", "--keep-going", "-c", "docs/book"]
    done = subprocess.run(
        [*command, "-d", out / "doctrees", ".", out / "html"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out / "html"


@pytest.fixture(scope="module")
def pages(book: Path) -> dict[Path, Page]:
    files = [file for file in sorted(book.rglob("*.html")) if "_static" not in file.parts]
    return {file: Page(file) for file in files}


def test_every_notebook_and_guide_is_a_page(book: Path) -> None:
    sources = [ROOT / "README.md", *NOTEBOOKS, *(ROOT / "docs").glob("*.md")]
    pages = [book / file.relative_to(ROOT).with_suffix(".html") for file in sources]
    assert len(pages) > 15 and not [page for page in pages if not page.exists()]
    contents = set(Page(book / "README.html").links)
    assert {str(page.relative_to(book)) for page in pages[1:]} <= contents


def broken(page: Page, pages: dict[Path, Page]) -> list[str]:
    """The links of a page that lead nowhere in the site: to no file, or to no anchor of a page."""
    found = []
    for link in page.links:
        address = urlsplit(link)
        if address.scheme or link in ("#", ""):
            continue
        path = unquote(address.path)
        target = (page.file.parent / path).resolve() if path else page.file
        anchor = unquote(address.fragment)
        if not target.exists() or (target in pages and anchor not in {"", *pages[target].anchors}):
            found.append(link)
    return found


def test_internal_links_hold(pages: dict[Path, Page]) -> None:
    assert sum(len(page.links) for page in pages.values()) > 1000
    found = {file.name: broken(page, pages) for file, page in pages.items()}
    assert not {name: links for name, links in found.items() if links}


def test_a_broken_link_is_seen(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / f"{name}.html").write_text(
            '<h1 id="here"><a href="two.html#here"><a href="two.html#gone"><a href="gone.html">'
        )
    pages = {tmp_path / f"{name}.html": Page(tmp_path / f"{name}.html") for name in ("one", "two")}
    assert broken(pages[tmp_path / "one.html"], pages) == ["two.html#gone", "gone.html"]


def test_nothing_is_missing_and_nothing_comes_from_the_network(pages: dict[Path, Page]) -> None:
    loads = [(page, load) for page in pages.values() for load in page.loads]
    assert len([load for page, load in loads if load.endswith(".png")]) > 15
    for page, load in loads:
        address = urlsplit(load)
        assert not address.netloc, f"{page.file.name}: {load}"
        if address.scheme != "data":
            assert (page.file.parent / unquote(address.path)).exists(), f"{page.file.name}: {load}"


def test_every_formula_is_one(book: Path) -> None:
    for path in NOTEBOOKS:
        parts = [part for cell in Notebook(path).code for part in cell["outputs"]]
        shown = ["".join(part.get("data", {}).get("text/markdown", "")) for part in parts]
        text = re.sub(r"`[^`]*`", "", "\n".join([prose(path), *shown]))
        formulas = re.findall(r"\$\$.+?\$\$|\$[^$\n]+\$", text, flags=re.DOTALL)
        page = Page(book / "notebooks" / f"{path.stem}.html")
        assert page.tags.count("math") >= len(formulas), path.name


def test_machinery_and_solutions_are_folded(book: Path) -> None:
    for path in NOTEBOOKS:
        code = Notebook(path).code
        folded = [cell for cell in code if is_folded(cell)]
        page = Page(book / "notebooks" / f"{path.stem}.html")
        assert page.classes.count("tag_hide-input") == len(folded), path.name
