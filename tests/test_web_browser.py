"""The web page in a real browser: what a reader sees, and that nothing of a model's text runs there."""

from __future__ import annotations

import shutil
import time

import pytest
from PIL import Image
from playwright.sync_api import Page, expect, sync_playwright
from web_server import SCRIPT, serving

import demo_world

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# What Chromium itself would send home, and what a machine without a screen or as root lacks.
NETWORK = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
QUIET = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", *NETWORK]
QUESTION = "Which stripes are on the red square?"
HOSTILE = "<script>hacked=1</script><img src=x onerror=hacked=1>${hacked=1}{{hacked}}`"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on this machine: install the package chromium"),
]


@pytest.fixture(scope="module")
def server(base_folder):
    with serving(str(base_folder)) as served:
        yield served


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield browser
        browser.close()


@pytest.fixture
def page(server, browser):
    """The page with a picture uploaded; at its end it must have asked no other host, and met no error."""
    server.script, server.pause = SCRIPT, 0.0
    page = browser.new_page(viewport={"width": 1280, "height": 900})
    page.set_default_timeout(20_000)
    expect.set_options(timeout=20_000)
    addresses, faults = [], []
    page.on("request", lambda request: addresses.append(request.url))
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda said: faults.append(said.text) if said.type == "error" else None)
    page.goto(server.url)
    yield page
    page.close()
    assert [url for url in addresses if not url.startswith((server.url, "data:", "blob:"))] == []
    assert faults == []


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(demo_world.draw_picture(3, 0).pixels).save(path)
    return path


def ask(page: Page, picture, question: str = QUESTION) -> None:
    expect(page.get_by_text("Drop Image Here")).to_be_visible()
    page.set_input_files("input[type=file]", picture)
    page.get_by_label("Question").fill(question)
    expect(page.get_by_label("Remove Image").or_(page.get_by_label("Clear"))).to_be_visible()
    page.get_by_role("button", name="Ask").click()


def numbers(page: Page) -> list[str]:
    return page.locator("#shown svg text").all_text_contents()


def test_boxes_crops_and_answer_appear_in_turn_and_the_trace_can_be_saved(server, page, picture, tmp_path):
    server.pause = 0.03
    ask(page, picture)
    expect(page.locator("#thinking .flow")).to_contain_text("The red")
    expect(page.get_by_role("button", name="Stop")).to_be_visible()
    assert numbers(page) == []
    assert page.locator("#thinking figure").count() == 0
    expect(page.locator("#thinking figure img")).to_be_visible()
    assert numbers(page) == ["1"]
    expect(page.locator("#end .answer")).to_have_text("rising")
    assert page.locator("#thinking .chip").all_inner_texts()[1].startswith("2")
    with page.expect_download() as download:
        page.get_by_text("Save as a page").click()
    download.value.save_as(tmp_path / "answer.html")
    trace = page.context.browser.new_page()
    trace.goto(f"file://{tmp_path}/answer.html")
    assert trace.locator("figure img").count() == 1
    assert QUESTION in trace.locator(".question").inner_text()
    trace.close()


def test_the_box_is_drawn_where_the_call_says(page, picture):
    ask(page, picture)
    expect(page.locator("#end .answer")).to_have_text("rising")
    image, box = page.locator("#shown img").bounding_box(), page.locator("#shown rect.box").bounding_box()
    scale = image["width"] / 448
    assert box["x"] - image["x"] == pytest.approx(80 * scale, abs=4)  # the call's 10 of 56 shown pixels
    assert box["y"] - image["y"] == pytest.approx(80 * scale, abs=4)
    assert box["width"] == pytest.approx(160 * scale, abs=8)
    assert box["height"] == pytest.approx(240 * scale, abs=8)
    stroke = page.locator("#shown rect.box").evaluate("box => getComputedStyle(box).stroke")
    frame = page.locator("#thinking figure img").evaluate("image => getComputedStyle(image).borderColor")
    assert stroke == frame, "a box has the colour of its crop"


def test_each_crop_stands_beside_the_text_that_reads_it(server, page, picture):
    call = "<tool_call>[10, 10, 30, 40]</tool_call>"
    server.script = f"<think>\nHere {call} this, {call} that.</think>\n\n<answer>rising</answer><|im_end|>"
    ask(page, picture)
    expect(page.locator("#end .answer")).to_have_text("rising")
    for number in range(2):
        crop = page.locator("#thinking figure").nth(number).bounding_box()
        read = (
            page.locator("#thinking .text")
            .nth(number + 1)
            .evaluate("text => { const [line] = text.getClientRects(); return {x: line.x, y: line.y}; }")
        )
        assert read["x"] >= crop["x"] + crop["width"]
        assert crop["y"] - 12 <= read["y"] <= crop["y"] + crop["height"]


def test_nothing_of_a_hostile_text_runs(server, page, picture):
    call = f"<tool_call>{HOSTILE}</tool_call>"
    server.script = f"<think>\n{HOSTILE}{call}</think><answer>{HOSTILE}</answer>{HOSTILE}<|im_end|>"
    ask(page, picture, HOSTILE)
    expect(page.locator("#end .answer")).to_have_text(HOSTILE)
    assert page.locator("#thinking .text").first.inner_text() == HOSTILE
    assert page.evaluate("typeof hacked") == "undefined"
    page.get_by_role("button", name="Another picture").click()
    ask(page, picture, HOSTILE + "<|image_pad|>")
    expect(page.locator("#end .note")).to_contain_text("reserved token")
    assert page.evaluate("typeof hacked") == "undefined"


def test_stop_ends_the_work_and_another_question_is_answered(server, page, picture):
    server.pause, server.steps = 0.1, 0
    ask(page, picture)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Ask")).to_be_visible()
    page.wait_for_timeout(500)
    done = server.steps
    page.wait_for_timeout(500)
    assert server.steps == done < len(server.inference.renderer.text_ids(SCRIPT))
    server.pause = 0.0
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#end .answer")).to_have_text("rising")


def test_a_reader_who_leaves_ends_the_work(server, browser, picture):
    server.script, server.pause, server.steps = SCRIPT, 0.1, 0
    page = browser.new_page()
    page.goto(server.url)
    ask(page, picture)
    expect(page.locator("#thinking .flow")).to_contain_text("The", timeout=20_000)
    page.close()
    time.sleep(2)
    done = server.steps
    time.sleep(1)
    assert server.steps == done < len(server.inference.renderer.text_ids(SCRIPT))


def test_another_picture_begins_anew(page, picture):
    ask(page, picture)
    expect(page.locator("#end .answer")).to_have_text("rising")
    page.get_by_role("button", name="Another picture").click()
    expect(page.locator("#shown")).not_to_be_visible()
    expect(page.locator("#end .answer")).to_have_count(0)
    expect(page.locator("input[type=file]")).to_have_count(1)
    page.get_by_role("button", name="Ask").click()
    expect(page.locator("#end .note")).to_have_text("Upload a picture first.")


@pytest.mark.parametrize("width", [390, 1280])
def test_it_fits_a_phone_and_a_desk(page, picture, width):
    page.set_viewport_size({"width": width, "height": 800})
    ask(page, picture)
    expect(page.locator("#end .answer")).to_have_text("rising")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
