"""The page /docs in a browser that can reach nothing but the service: read it, call it, upload to it, authorize."""

import re
from pathlib import Path

import pytest
from conftest import TESTS, Server, serve

playwright = pytest.importorskip("playwright.sync_api")
pytest_plugins = ["chromium"]


def opened(page: playwright.Page, path: str) -> playwright.Locator:
    """The block of a route, opened and ready to be tried out."""
    block = page.locator(".opblock", has=page.locator(f'[data-path="{path}"]'))
    block.locator(".opblock-summary-control").click()
    block.get_by_role("button", name="Try it out").click()
    return block


def execute(block: playwright.Locator, path: str) -> playwright.Response:
    with block.page.expect_response(f"**{path}") as answer:
        block.get_by_role("button", name="Execute").click()
    status = block.locator(".live-responses-table .response .response-col_status")
    playwright.expect(status).to_contain_text(str(answer.value.status))
    return answer.value


def test_a_route_is_called_with_its_own_example(page: playwright.Page, server: Server) -> None:
    page.goto(f"{server.url}/docs")
    block = opened(page, "/v1/embeddings")
    answer = execute(block, "/v1/embeddings")
    assert answer.status == 200
    assert len(answer.json()["data"]) == 2
    (number,) = re.findall(r"-?\d\.\d+", answer.text())[:1]
    playwright.expect(block.locator(".live-responses-table")).to_contain_text(number)


def test_an_image_is_uploaded_through_the_file_chooser(page: playwright.Page, server: Server) -> None:
    image = TESTS / "shapes" / "red_circle.png"
    with server.client() as client:
        alone = client.post("/embed/image", files={"file": image.read_bytes()}).json()
    page.goto(f"{server.url}/docs")
    block = opened(page, "/embed/image")
    with page.expect_file_chooser() as chooser:
        block.locator("input[type=file]").click()
    chooser.value.set_files(image)
    answer = execute(block, "/embed/image")
    assert (answer.status, answer.json()) == (200, alone)


def test_an_upload_without_a_file_is_not_sent_and_the_page_shows_how_to_choose_one(
    page: playwright.Page, server: Server
) -> None:
    page.goto(f"{server.url}/docs")
    block = opened(page, "/embed/image")
    sent = []
    page.on("request", lambda request: sent.append(request.url))
    block.get_by_role("button", name="Execute").click()
    page.wait_for_timeout(500)
    assert sent == []
    playwright.expect(block.locator("input[type=file]")).to_be_visible()
    playwright.expect(block).to_contain_text("Choose an image file")


def test_the_authorize_button_sends_the_key(page: playwright.Page, tmp_path: Path) -> None:
    with serve(tmp_path / "log", GME_API_KEY="secret") as guarded:
        page.goto(f"{guarded.url}/docs")
        block = opened(page, "/embed/text")
        assert execute(block, "/embed/text").status == 401
        page.locator(".auth-wrapper .authorize").click()
        dialog = page.locator(".modal-ux")
        dialog.locator("input").fill("secret")
        dialog.get_by_role("button", name="Apply credentials").click()
        dialog.locator(".btn-done").click()
        assert execute(block, "/embed/text").status == 200
