"""The page at `/` in a browser that can reach nothing but the service, as a person uses it."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import TESTS, Server, Start
from make_toy import COLORS, SHAPES

playwright = pytest.importorskip("playwright.sync_api")
pytest_plugins = ["chromium"]
expect = playwright.expect
expect.set_options(timeout=60_000)  # ms, for a busy machine

PROMPT = "Find an image that matches the given text."
PICTURES = sorted((TESTS / "shapes").glob("*.png"))
BLUE, GREEN, RED, YELLOW = (path.name for path in PICTURES)
STAR = "一个蓝色的星形"
PHONE = {"width": 375, "height": 740}


def test_each_sentence_finds_its_picture(page: playwright.Page, server: Server) -> None:
    page.goto(server.url)
    expect(page.locator("body")).to_contain_text("toy/shapes on cpu in float32")
    for word in (*COLORS, *SHAPES):
        expect(page.locator("#toy")).to_contain_text(word)
    drop(page, PICTURES)
    expect(state(page)).to_have_text("2 sentences against 4 pictures.")
    assert best(page) == {"a red circle": RED, STAR: BLUE}
    type_sentences(page, "a yellow square", "一个绿色的三角形")
    page.get_by_role("button", name="Compare").click()
    expect(row(page, "a yellow square")).to_contain_text("best")
    expect(row(page, "一个绿色的三角形")).to_contain_text("best")
    assert best(page) == {"a yellow square": YELLOW, "一个绿色的三角形": GREEN}


def test_scores_are_the_dot_products_of_the_services_vectors(page: playwright.Page, server: Server) -> None:
    with server.client() as client:
        texts = client.post("/embed/text", json={"texts": ["a red circle", STAR], "prompt": PROMPT}).json()
        images = client.post("/embed/image", files=[("file", path.read_bytes()) for path in PICTURES]).json()
    wanted = np.array(texts["embeddings"]) @ np.array(images["embeddings"]).T
    page.goto(server.url)
    drop(page, PICTURES)
    expect(state(page)).to_contain_text("against")
    np.testing.assert_allclose(scores(page), wanted, rtol=0, atol=6e-4)


def test_only_what_has_no_vector_yet_is_sent(page: playwright.Page, server: Server) -> None:
    page.goto(server.url)
    drop(page, PICTURES)
    expect(state(page)).to_contain_text("against 4")
    sent: list[playwright.Request] = []
    page.on("request", lambda request: sent.append(request))
    type_sentences(page, "a red circle", "a black ring")
    page.get_by_role("button", name="Compare").click()
    expect(row(page, "a black ring")).to_contain_text("best")
    assert [json.loads(request.post_data) for request in sent] == [{"texts": ["a black ring"], "prompt": PROMPT}]
    drop(page, PICTURES)  # which are there already
    page.get_by_label("Prompt for the sentences").fill("")
    page.get_by_role("button", name="Compare").click()
    expect(row(page, "a black ring")).to_contain_text("best")
    texts = {"texts": ["a red circle", "a black ring"], "prompt": ""}
    assert [json.loads(request.post_data) for request in sent[1:]] == [texts]


def test_a_sentence_orders_the_pictures(page: playwright.Page, server: Server) -> None:
    page.goto(server.url)
    drop(page, PICTURES)
    expect(state(page)).to_contain_text("against 4")
    before = names(page)
    type_sentences(page, "a red circle", "a black ring")  # which the click below ends
    button = page.get_by_role("button", name="a red circle")
    button.click()
    expect(button).to_have_attribute("aria-pressed", "true")
    expect(button).to_be_focused()
    assert names(page)[0] == RED
    ordered = scores(page)[0]
    assert ordered == sorted(ordered, reverse=True)
    button.click()
    assert names(page) == before


def test_a_picture_is_removed_and_added_again(page: playwright.Page, server: Server) -> None:
    page.goto(server.url)
    drop(page, PICTURES)
    expect(state(page)).to_contain_text("against 4")
    page.get_by_role("button", name=f"Remove {BLUE}").click()
    expect(page.get_by_role("button", name=f"Remove {GREEN}")).to_be_focused()
    assert names(page) == [GREEN, RED, YELLOW]
    drop(page, PICTURES[:1])
    expect(state(page)).to_have_text("2 sentences against 4 pictures.")
    assert names(page) == [GREEN, RED, YELLOW, BLUE]


def test_a_picture_is_pasted(page: playwright.Page, server: Server) -> None:
    page.goto(server.url)
    give(page, "paste", PICTURES[2:3])
    expect(state(page)).to_have_text("2 sentences against 1 picture.")


def test_the_keyboard_alone_is_enough(page: playwright.Page, server: Server) -> None:
    page.goto(server.url)
    page.keyboard.press("Tab")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Space")
    chooser.value.set_files(PICTURES)
    page.keyboard.press("Tab")
    page.keyboard.press("Control+A")
    page.keyboard.type("a blue star")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    expect(row(page, "a blue star")).to_contain_text("best")
    assert best(page) == {"a blue star": BLUE}


def test_a_file_that_is_no_picture_is_named_and_the_others_go_on(page: playwright.Page, server: Server) -> None:
    page.goto(server.url)
    broken = {"name": "<img src=x onerror=alert(1)>.png", "mimeType": "image/png", "buffer": b"no picture"}
    page.locator("#files").set_input_files([broken])
    fault = page.get_by_role("alert")
    expect(fault).to_contain_text("<img src=x onerror=alert(1)>.png: ")
    assert len(fault.inner_text()) > len("<img src=x onerror=alert(1)>.png: ") + 10
    assert "File 1" not in fault.inner_text()
    drop(page, PICTURES)
    expect(state(page)).to_have_text("2 sentences against 4 pictures.")
    expect(fault).to_be_empty()
    type_sentences(page, "<b>a red circle</b>")
    page.get_by_role("button", name="Compare").click()
    expect(row(page, "<b>a red circle</b>")).to_contain_text("best")


def test_a_key_is_asked_for_and_kept_in_the_page_alone(page: playwright.Page, start: Start) -> None:
    guarded = start(GME_API_KEY="ein geheimer Schlüssel 密码")
    page.goto(guarded.url)
    key = page.get_by_label("API key")
    fault = page.get_by_role("alert")
    expect(key).to_be_hidden()
    drop(page, PICTURES)
    expect(fault).to_have_text("The service needs an API key: type it, and press Compare.")
    expect(key).to_be_focused()
    for wrong in ("a-wrong-key", "密码"):
        key.fill(wrong)
        page.keyboard.press("Enter")
        expect(fault).to_have_text("The service refuses this API key.")
    key.fill("ein geheimer Schlüssel 密码")
    page.keyboard.press("Enter")
    expect(state(page)).to_have_text("2 sentences against 4 pictures.")
    expect(fault).to_be_empty()
    assert best(page) == {"a red circle": RED, STAR: BLUE}
    assert page.context.cookies() == []
    assert page.evaluate("localStorage.length + sessionStorage.length") == 0
    page.reload()
    assert key.input_value() == ""


def test_a_service_that_has_stopped_is_told(page: playwright.Page, start: Start) -> None:
    stopped = start()
    page.goto(stopped.url)
    drop(page, PICTURES[:2])
    expect(state(page)).to_contain_text("against 2")
    stopped.process.terminate()
    stopped.process.wait(30)
    drop(page, PICTURES[2:])
    expect(page.get_by_role("alert")).to_contain_text(f"The service at {stopped.url} can't be reached")
    expect(state(page)).to_contain_text("2 of 4 pictures")
    assert names(page) == [BLUE, GREEN, RED, YELLOW]


@pytest.mark.parametrize("size", [PHONE, {"width": 1280, "height": 900}], ids=["phone", "desktop"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_can_be_read_by_everybody(page: playwright.Page, server: Server, scheme: str, size: dict[str, int]) -> None:
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    page.set_viewport_size(size)
    page.emulate_media(color_scheme=scheme)
    page.goto(server.url)
    drop(page, PICTURES)
    expect(state(page)).to_contain_text("against 4")
    drop(page, [Path(__file__)])
    expect(page.get_by_role("alert")).not_to_be_empty()
    page.evaluate("document.getElementById('key-field').hidden = false")
    assert axe.Axe().run(page).response["violations"] == []
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_on_a_phone_the_table_scrolls_beside_its_sentences(page: playwright.Page, server: Server) -> None:
    page.set_viewport_size(PHONE)
    page.goto(server.url)
    type_sentences(page, "a red circle", "a yellow square")
    drop(page, PICTURES)
    expect(state(page)).to_contain_text("against 4")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    last = page.get_by_role("button", name=f"Remove {YELLOW}")
    sentence = page.get_by_role("button", name="a red circle")
    left = sentence.bounding_box()["x"]
    last.scroll_into_view_if_needed()
    expect(last).to_be_in_viewport()
    assert sentence.bounding_box()["x"] == left


# ------------------------------------------------------------------------------------------ The rig
def drop(page: playwright.Page, files: Sequence[Path]) -> None:
    give(page, "drop", files)


def give(page: playwright.Page, event: str, files: Sequence[Path]) -> None:
    """What a browser does when files are dropped or pasted."""
    contents = [[path.name, list(path.read_bytes())] for path in files]
    page.evaluate(
        """([event, contents]) => {
            const given = new DataTransfer();
            for (const [name, bytes] of contents) {
                given.items.add(new File([new Uint8Array(bytes)], name, { lastModified: 0 }));
            }
            const options = { bubbles: true, cancelable: true, dataTransfer: given, clipboardData: given };
            const kind = event === "drop" ? DragEvent : ClipboardEvent;
            document.body.dispatchEvent(new kind(event, options));
        }""",
        [event, contents],
    )


def type_sentences(page: playwright.Page, *lines: str) -> None:
    page.get_by_label("Sentences, one a line").fill("\n".join(lines))


def state(page: playwright.Page) -> playwright.Locator:
    return page.get_by_role("status")


def row(page: playwright.Page, sentence: str) -> playwright.Locator:
    header = page.get_by_role("button", name=sentence, exact=True)
    return page.locator("#scores tr").filter(has=header)


def names(page: playwright.Page) -> list[str]:
    """The pictures, in the order of the columns."""
    return page.locator("#pictures .name").all_inner_texts()


def scores(page: playwright.Page) -> list[list[float]]:
    rows = page.locator("#scores tr").all()
    return [[float(cell.split()[0]) for cell in one.locator("td").all_inner_texts()] for one in rows]


def best(page: playwright.Page) -> dict[str, str]:
    """For each sentence the picture that is marked."""
    found = {}
    for one in page.locator("#scores tr").all():
        marked = ["best" in cell for cell in one.locator("td").all_inner_texts()]
        (found[one.get_by_role("button").inner_text()],) = np.array(names(page))[marked]
    return found
