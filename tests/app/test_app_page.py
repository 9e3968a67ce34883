"""`zoo app` clicked through in a browser: each tab gives its result, odd uploads a line, and nothing is kept."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from zoo.cli.app.offers import Offers
from zoo.cli.app.service import Limits, Service

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra dev)")
pytest.importorskip("gradio", reason="gradio is not installed (extra app)")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.enable_socket,
    pytest.mark.skipif(BROWSER is None, reason="no chromium among the system's packages"),
]
WAIT = 240_000  # ms; only how long a result may take on a machine with other work


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Service]]:
    """The page with the shipped weights, on this machine, in a folder of temporary files of its own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        yield from _serve()


def _serve() -> Iterator[tuple[str, Service]]:
    from zoo.cli.app.page import serve

    service, stop, known = Service(Offers.of(), Limits(pixels=1_000_000)), threading.Event(), threading.Event()
    address: list[str] = []

    def tell(where: str) -> None:
        address.append(where)
        known.set()

    thread = threading.Thread(
        target=serve, args=(service,), kwargs={"stop": stop, "tell": tell, "max_file_size": "2mb"}
    )
    thread.start()
    assert known.wait(240)
    yield address[0], service
    stop.set()
    thread.join(60)
    assert not service.folder.exists()  # nothing of a visitor's is kept


@pytest.fixture(scope="module")
def page(served: tuple[str, Service]) -> Iterator[Any]:
    """The page in a browser that reaches nothing but this machine."""
    with playwright.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
        context.set_default_timeout(WAIT)
        asked: list[str] = []
        context.on("request", lambda request: asked.append(request.url))
        page = context.new_page()
        page.goto(served[0])
        yield page
        outside = [url for url in asked if not url.startswith((served[0], "data:", "blob:"))]
        assert not outside
        browser.close()


def upload(page: Any, *files: Path) -> None:
    """Choose files in the open tab until it lists the first: before its script is ready it takes none."""
    panel = page.locator("[role=tabpanel]:visible")
    listed = panel.locator(f'td[aria-label="{files[0].name}"]')  # the text stands in two parts, stem and suffix
    for wait in (WAIT / 12,) * 11:
        with contextlib.suppress(playwright.TimeoutError):  # what is listed or on its way has no field for files
            panel.locator("input[type=file]").first.set_input_files(files, timeout=wait)
        with contextlib.suppress(playwright.TimeoutError):
            return listed.wait_for(timeout=wait)
    return listed.wait_for(timeout=WAIT / 12)


def open_tab(page: Any, name: str) -> None:
    page.get_by_role("tab", name=name).click()


def look(page: Any, name: str) -> None:
    """Store what is seen, where somebody wants to look at it."""
    folder = os.environ.get("ZOO_SCREENSHOTS")
    if folder:
        page.wait_for_timeout(1500)
        page.screenshot(path=str(Path(folder) / f"{name}.png"), full_page=True)


def uploads(service: Service) -> list[Path]:
    """Return what visitors left, wherever Gradio may put it."""
    folders = (service.folder, Path(tempfile.gettempdir()) / "gradio")
    return [path for folder in folders for path in folder.rglob("*") if path.is_file()]


def photo(path: Path, side: int = 64) -> Path:
    Image.radial_gradient("L").resize((side, side)).convert("RGB").save(path)
    return path


def test_the_page_is_local_and_private(served: tuple[str, Service], page: Any) -> None:
    assert served[0].startswith("http://127.0.0.1:")
    config = page.evaluate("window.gradio_config")
    assert config["analytics_enabled"] is False


def test_classify(page: Any, tmp_path: Path) -> None:
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "page.jpg").write_text("<html><script>alert(1)</script></html>")
    good = photo(tmp_path / "good.png")
    upload(page, good, tmp_path / "empty.png", tmp_path / "page.jpg")
    page.get_by_role("button", name="Classify").click()
    page.locator("#answers .bar").first.wait_for()
    answers = page.locator("#answers")
    assert answers.locator(".bar").count() == 10  # five classes of two models
    said = answers.inner_text()
    assert "good.png" in said
    assert "⚠ page.jpg" in said
    assert "⚠ empty.png" in said
    look(page, "classify")


def test_restore(page: Any, tmp_path: Path) -> None:
    open_tab(page, "Restore")
    upload(page, photo(tmp_path / "photo.tif"))
    page.get_by_role("button", name="Restore", exact=True).click()
    page.get_by_text("64×64 → 128×128 pixels").wait_for()
    look(page, "restore")
    with page.expect_download() as download:
        page.get_by_role("link", name="Download photo.tif").or_(
            page.get_by_role("button", name="Download photo.tif")
        ).first.click()
    with Image.open(download.value.path()) as result:
        assert (result.format, result.size) == ("TIFF", (128, 128))


def test_what_cannot_be_restored_is_said_and_the_page_lives(page: Any, tmp_path: Path) -> None:
    open_tab(page, "Restore")
    Image.new("1", (5000, 5000)).save(tmp_path / "bomb.png")
    panel = page.locator("[role=tabpanel]:visible")
    panel.get_by_label("Clear").or_(panel.get_by_label("Remove this file")).first.click()
    upload(page, tmp_path / "bomb.png")
    page.get_by_role("button", name="Restore", exact=True).click()
    page.get_by_text("bomb.png is refused").wait_for()
    look(page, "refused")
    (tmp_path / "huge.png").write_bytes(bytes(3_000_000))
    panel.get_by_label("Clear").or_(panel.get_by_label("Remove this file")).first.click()
    panel.locator("input[type=file]").first.set_input_files(tmp_path / "huge.png")
    page.get_by_text("maximum allowed size").first.wait_for()


def test_many_visitors_at_once(served: tuple[str, Service], tmp_path: Path) -> None:
    """Each gets a result or a line, and the server lives."""
    from gradio_client import Client, handle_file

    good, bad = photo(tmp_path / "good.png", 24), tmp_path / "page.jpg"
    bad.write_text("<html></html>")
    patient = {"timeout": WAIT / 1000}
    clients = [
        Client(served[0], verbose=False, download_files=str(tmp_path / "got"), httpx_kwargs=patient) for _ in range(4)
    ]
    jobs = []
    for index in range(20):
        client, file = clients[index % 4], handle_file(bad if index % 5 == 4 else good)
        if index % 2:
            jobs.append(client.submit([file], ["repavit_tiny.cifar10"], api_name="/classify"))
        else:
            jobs.append(client.submit(file, "sr", "fast", "", "4GB", "auto", api_name="/restore"))
    said = []
    for job in jobs:
        try:
            said.append(str(job.result(timeout=WAIT / 1000)))
        except Exception as error:
            said.append(f"refused: {error}")
    for index, line in enumerate(said):
        wanted = "page.jpg is not an image" if index % 5 == 4 else "good.png"
        assert wanted in line, said
    assert all(path.is_relative_to(served[1].folder) for path in uploads(served[1]))


def test_what_a_visitor_reads_is_not_written_again(served: tuple[str, Service], tmp_path: Path) -> None:
    """Two visitors with the same picture get the same files; the second must not empty them while the first reads."""
    from gradio_client import Client, handle_file

    client = Client(served[0], verbose=False, download_files=False, httpx_kwargs={"timeout": WAIT / 1000})
    calls: list[tuple[str, list[Any]]] = [
        ("/restore", [handle_file(photo(tmp_path / "same.png", 24)), "sr", "fast", "", "4GB", "auto"]),
        ("/generate", [served[1].offers.pipelines[0], "frog", 1, 0, 3, "none"]),
    ]
    for name, values in calls:
        client.predict(*values, api_name=name)
        given = [path for path in uploads(served[1]) if path.name == "image.png"]
        assert given
        for path in given:
            path.write_bytes(b"being read")
        client.predict(*values, api_name=name)
        assert {path.read_bytes() for path in given} == {b"being read"}
        for path in given:
            path.unlink()


def test_generate(page: Any) -> None:
    open_tab(page, "Generate")
    panel = page.locator("[role=tabpanel]:visible")
    panel.get_by_label("number input for Pictures").fill("1")
    panel.get_by_label("number input for Steps").fill("6")
    page.get_by_role("button", name="Generate", exact=True).click()
    page.get_by_text("times as fast").wait_for()
    panel.locator("img").nth(2).wait_for()  # without, with, and the timeline
    look(page, "generate")


def test_explore(page: Any) -> None:
    open_tab(page, "Explore")
    panel = page.locator("[role=tabpanel]:visible")
    panel.get_by_label("Search").fill("cfsr_x2.bsds")
    cell = panel.get_by_text("cfsr_x2.bsds", exact=True).locator("visible=true").first
    panel.get_by_text("affnet_et", exact=True).locator("visible=true").first.wait_for(state="hidden")
    cell.wait_for()
    cell.click()
    page.locator("#card").get_by_text("normalisation").wait_for()
    assert page.evaluate("[...document.images].every(image => !image.complete || image.naturalWidth > 0)")
    look(page, "explore")
    page.locator("#points [data-model=emov2_1m]").click()
    page.locator("#card").get_by_text("EMOv2-1M").first.wait_for()
    look(page, "explore_point")
