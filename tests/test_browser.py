"""In a real browser: JupyterLab with the notebooks, and every page of the book.

Needs Debian's `chromium` (apt install chromium) and `pip install playwright`; skipped without.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from foggen.store import ROOT, RUN_VARIABLE

pytestmark = pytest.mark.slow
playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install it")
MINUTES = 60_000  # in the milliseconds that playwright counts


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if not program:
        pytest.skip("no chromium: apt install chromium")
    with playwright.sync_playwright() as engine:
        opened = engine.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


# ---- The book


def local(url: str) -> bool:
    return url.startswith(("file:", "data:"))


def test_every_page_of_the_book_opens(browser: Any) -> None:
    """No error on the console, nothing that fails to load, no empty picture."""
    book = ROOT / "build" / "book"
    if not (book / "index.html").exists():
        pytest.skip("no build/book: make book")
    page, troubles = browser.new_page(), []
    page.on("console", lambda line: troubles.append(line.text) if line.type == "error" else None)
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("requestfailed", lambda request: troubles.append(request.url))
    page.on("request", lambda request: None if local(request.url) else troubles.append(request.url))
    page.set_default_timeout(3 * MINUTES)
    page.goto((book / "index.html").as_uri())
    page.wait_for_url("**/README.html")
    files = [file for file in book.rglob("*.html") if "_static" not in file.parts]
    files.remove(book / "index.html")
    assert len(files) > 25
    for file in files:
        page.goto(file.as_uri(), wait_until="load")
        assert page.title() and page.locator("body").inner_text().strip(), file.name
        empty = "images => images.filter(image => image.complete && !image.naturalWidth).length"
        assert page.eval_on_selector_all("img", empty) == 0, file.name
        assert not troubles, f"{file.name}: {troubles}"
    page.close()


# ---- JupyterLab


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """JupyterLab on a copy of the notebooks: its address, and the fresh run folder of its kernels.

    Cells out of sight stay in the page, so that they can be looked for.
    """
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension"
    settings.mkdir(parents=True)
    (settings / "tracker.jupyterlab-settings").write_text('{"windowingMode": "none"}')
    clean = {name: value for name, value in os.environ.items() if not name.startswith("JUPYTER")}
    places = {"JUPYTERLAB_SETTINGS_DIR": tmp_path / "settings", "HOME": tmp_path}
    places |= {"JUPYTERLAB_WORKSPACES_DIR": tmp_path / "workspaces", RUN_VARIABLE: tmp_path / "run"}
    variables = {**clean, **{name: str(place) for name, place in places.items()}}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port=0"]
    options += ["--IdentityProvider.token=", "--LabApp.news_url="]
    command = [sys.executable, "-m", "jupyterlab", *options, str(tmp_path / "notebooks")]
    with open(tmp_path / "lab.log", "w+") as log:
        server = subprocess.Popen(command, env=variables, stdout=log, stderr=log)
        try:
            yield address(tmp_path / "lab.log", server), tmp_path / "run"
        finally:
            server.terminate()
            server.wait(60)


def address(log: Path, server: subprocess.Popen[bytes]) -> str:
    """Where the server listens, as it says itself."""
    for _ in range(600):
        if found := re.search(r"http://127\.0\.0\.1:\d+/", log.read_text()):
            return found[0]
        assert server.poll() is None, log.read_text()
        time.sleep(0.2)
    raise AssertionError(f"JupyterLab did not start: {log.read_text()}")


def run_all(browser: Any, url: str, notebook: str) -> Any:
    """The page of a notebook whose cells run, after Run > Run All Cells.

    Lab now and then asks for the kernel while it starts, and drops what was sent: chosen once more.
    """
    page = browser.new_page(viewport={"width": 1500, "height": 1000})
    page.set_default_timeout(3 * MINUTES)
    accept = page.locator(".jp-Dialog button.jp-mod-accept")  # "Select Kernel", now and then
    page.add_locator_handler(
        page.locator(".jp-Dialog"), lambda: accept.first.click(), no_wait_after=True
    )
    page.goto(f"{url}lab/tree/{notebook}.ipynb")
    page.locator(".jp-Notebook .jp-Cell").first.wait_for()
    page.locator('.jp-NotebookPanel .jp-Toolbar [data-status="idle"]').first.wait_for()
    for _ in range(3):
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(10_000)
        if page.locator(".jp-InputPrompt", has_text="[*]").count():
            break
    return page


def wait_for(file: Path, page: Any, minutes: float) -> None:
    """Until the notebook's last cell has written its sentinel; an error in a cell ends it."""
    end = time.monotonic() + 60 * minutes
    while not file.exists():
        errors = page.locator(".jp-OutputArea-output[data-mime-type*='error']")
        assert errors.count() == 0, errors.first.inner_text()
        assert time.monotonic() < end, f"{file.name} was not written"
        page.wait_for_timeout(500)


def test_the_slider_of_00_moves_its_picture(browser: Any, lab: tuple[str, Path]) -> None:
    url, run = lab
    page = run_all(browser, url, "00_quickstart")
    wait_for(run / "done" / "00_quickstart.json", page, 15)
    picture, handle = page.locator("img.widget-image"), page.locator(".noUi-handle")
    words = page.locator(".widget-html-content")
    before = picture.get_attribute("src"), words.inner_text()
    assert "to the cloud" in before[1]
    for _ in range(5):
        handle.press("ArrowRight")
    moved = "old => document.querySelector('img.widget-image').src !== old"
    page.wait_for_function(moved, arg=before[0])
    playwright.expect(words).not_to_have_text(before[1])
    page.close()


def test_03_runs_alone(browser: Any, lab: tuple[str, Path]) -> None:
    """In a fresh run folder it needs no chain: it reads the stored study, and says where else."""
    url, run = lab
    page = run_all(browser, url, "03_routing")
    wait_for(run / "done" / "03_routing.json", page, 10)
    text = page.locator(".jp-Notebook").inner_text()
    assert "the chain is trained first" in text
    assert page.locator(".jp-OutputArea-output img").count() >= 5
    assert not (run / "stages").exists() or not list((run / "stages").glob("*-sft-*"))
    page.close()
