"""Trace pages: what stands where, what is escaped, what is refused."""

import base64
import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

import traces
from crop_tool import Box, CropContract, ToolCall, run_call
from response_format import find_calls, parse_response
from traces import Trace, save_trace, trace_fragment, trace_html, trace_steps

VOID = {"meta", "img", "rect", "br"}
TEXT = (
    "<think>\nFirst <tool_call>[0, 0, 224, 224]</tool_call> a cat, then <tool_call>[5, 5, 1]</tool_call> and "
    "<tool_call>[300, 300, 200, 400]</tool_call> and <tool_call>[400, 224, 600, 448]</tool_call>.\n</think>\n\n"
    "<answer>a cat</answer>"
)


class Page(HTMLParser):
    """Elements with their attributes, and the text without style; fails on elements that do not nest."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text, self.open = "", []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.text += data

    def all(self, tag: str, css: str = "") -> list[dict[str, str]]:
        return [attrs for name, attrs in self.elements if name == tag and css in attrs.get("class", "")]


def make_trace(text: str = TEXT, size: tuple[int, int] = (448, 448), **fields) -> Trace:
    image = Image.effect_noise(size, 60).convert("RGB")
    done = [run_call(call, image, CropContract()) for call in find_calls(text)]
    response = parse_response(text, tuple(call for call, _ in done))
    return Trace(
        **{"question": "What is it?", "response": response, "image": image} | fields, crops=tuple(c for _, c in done)
    )


def embedded_images(page: Page) -> list[Image.Image]:
    sources = [attrs["src"] for attrs in page.all("img")]
    return [Image.open(io.BytesIO(base64.b64decode(source.partition("base64,")[2]))) for source in sources]


# ----------------------------------------------------------------------------------------------- traces


def test_page_embeds_the_image_and_each_executed_crop_in_reading_order():
    trace = make_trace()
    images = embedded_images(Page(trace_html(trace)))
    shown = [crop for crop in trace.crops if crop is not None]
    assert [call.outcome for call in trace.response.tool_calls] == ["exact", "malformed", "inverted", "clamped"]
    assert [image.size for image in images] == [trace.image.size, *(crop.size for crop in shown)]
    assert images[1].convert("RGB").tobytes() == shown[0].convert("RGB").tobytes()


def test_each_crop_stands_right_where_it_entered_the_text():
    page = Page(trace_html(make_trace()))
    order = [page.text.index(text) for text in ("First", "[0, 0, 224, 224]", "Crop 1", "a cat, then", "[5, 5, 1]")]
    assert order == sorted(order)
    assert page.text.index("[400, 224, 600, 448]") < page.text.index("Crop 4, as the model saw it")


def test_failing_calls_are_marked_with_their_reason():
    page = Page(trace_html(make_trace()))
    assert [attrs["class"] for attrs in page.all("span", "chip")] == ["chip", "chip bad", "chip bad", "chip"]
    assert "malformed: not four plain numbers" in page.text
    assert "inverted: x2 must be over x1" in page.text
    assert "clamped: partly outside the image" in page.text


def test_every_outcome_of_the_crop_tool_has_a_note():
    outcomes = set(re.findall(r"`(\w+)`", (ToolCall.__doc__ or "").partition("outcome:")[2])) - {"max_crops"}
    assert outcomes == set(traces.OUTCOME_NOTES)


def test_call_over_the_limit_is_drawn_but_marked():
    call = ToolCall("[0, 0, 9, 9]", 0, "over_limit", Box(0, 0, 28, 28))
    response = parse_response("<tool_call>[0, 0, 9, 9]</tool_call>", (call,))
    page = Page(trace_html(Trace("q", response, Image.new("RGB", (64, 64)), (None,))))
    assert len(page.all("rect", "box")) == 1
    assert len(page.all("span", "bad")) == 1
    assert len(page.all("img")) == 1


@pytest.mark.parametrize("size", [(448, 448), (896, 448), (4000, 3000)])
def test_boxes_are_drawn_in_the_pixels_of_the_original(size):
    trace = make_trace(size=size, reference_boxes=(Box(1, 2, 30, 40),))
    page = Page(trace_html(trace))
    assert page.all("svg")[0]["viewbox"] == f"0 0 {size[0]} {size[1]}"
    drawn = [[float(rect[key]) for key in ("x", "y", "width", "height")] for rect in page.all("rect", "box")]
    boxes = [call.box for call in trace.response.tool_calls if call.box is not None]
    assert drawn == [[box.x1, box.y1, box.width, box.height] for box in boxes]
    reference = page.all("rect", "reference")[0]
    assert [float(reference[key]) for key in ("x", "y", "width", "height")] == [1, 2, 29, 38]
    assert re.findall(r"<text [^>]*>(\d+)</text>", trace_html(trace)) == ["1", "4"]


@pytest.mark.parametrize("box", [Box(0, 0, 448, 448), Box(420, 420, 448, 448), Box(0, 420, 28, 448)])
def test_number_tags_stay_inside_the_picture(box):
    tag = traces.overlay(box, 448, 448, 12)
    assert tag["tag_x"] >= 0 and tag["tag_x"] + tag["tag_width"] <= 448
    assert tag["tag_y"] >= 0 and tag["tag_y"] + tag["tag_height"] <= 448


EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>&amp;{{ 7*7 }}"


@pytest.mark.parametrize("render", [trace_html, trace_fragment])
def test_markup_in_data_and_model_text_is_shown_and_never_run(render):
    text = f"<think>{EVIL} <tool_call>{EVIL}</tool_call></think><answer>{EVIL}</answer>"
    page = Page(render(make_trace(text, question=EVIL, expected=EVIL, title=EVIL)))
    assert page.all("script") == []
    assert len(page.all("img")) == 1
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    expected = 6 + (render is trace_html)  # question, thought, call, answer, expected, heading; the page's title
    assert page.text.count(EVIL) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no tags at all",
        "<answer>",
        "</think><think>",
        "<tool_call><answer></tool_call>x</answer>",
        "<tool_call>[1, 2</tool_call>" * 50,
        "<tool_call><tool_call>[1, 1, 90, 90]</tool_call></tool_call>",
        "<think>a</think><answer>b</answer> then <tool_call>[0, 0, 99, 99]</tool_call> and more",
    ],
)
def test_whole_response_is_shown_whatever_its_shape(text):
    trace = make_trace(text)
    page = Page(trace_html(trace))
    for call in trace.response.tool_calls:
        assert call.text in page.text
    for stretch in re.split(r"<tool_call>.*?</tool_call>|</?think>|</?answer>", text):
        assert stretch.strip() in page.text
    assert len(page.all("span", "chip")) == len(trace.response.tool_calls)


def test_call_that_holds_the_answer_tag_is_shown_once():
    page = Page(trace_html(make_trace("a <tool_call>b <answer> c</tool_call> d </answer> tail")))
    assert page.text.count("b <answer> c") == 1
    assert page.text.count("</tool_call>") == 1  # the answer's own
    assert "tail" in page.text


def test_steps_put_together_are_the_response():
    trace = make_trace()
    again = "".join(
        step.text + (f"<tool_call>{step.call.text}</tool_call>" if step.call else "") for step in trace_steps(trace)
    )
    assert again == TEXT


def test_page_asks_for_nothing_from_outside():
    html = trace_html(make_trace(expected="a dog"))
    assert "http:" not in html.replace("http://www.w3.org/2000/svg", "")
    assert "https:" not in html and "url(" not in html and "@import" not in html
    assert all(attrs["src"].startswith("data:image/") for attrs in Page(html).all("img"))


def test_expected_answer_gets_a_mark_only_where_one_is_given():
    assert make_trace().verdict is None
    assert make_trace(expected=" A  CAT ").verdict is True
    assert make_trace(expected="a dog").verdict is False
    assert make_trace(expected="a dog", is_correct=True).verdict is True
    assert "right" not in Page(trace_html(make_trace())).text
    assert "✗ wrong" in Page(trace_html(make_trace(expected="a dog"))).text
    assert "Expected: a dog" in Page(trace_html(make_trace(expected="a dog"))).text


def test_conversation_is_one_page_with_a_section_each(tmp_path):
    path = tmp_path / "new" / "trace.html"
    save_trace(path, [make_trace(title="First"), make_trace(title="Follow-up")])
    page = Page(path.read_text(encoding="utf-8"))
    assert len(page.all("section")) == 2
    assert len(page.all("html")) == 1
    assert page.text.index("First") < page.text.index("Follow-up")
    assert [file.name for file in path.parent.iterdir()] == ["trace.html"]


def test_failed_write_keeps_the_old_page_and_leaves_no_rest(tmp_path, monkeypatch):
    path = tmp_path / "trace.html"
    path.write_text("old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(traces.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        save_trace(path, [make_trace()])
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


def test_text_that_utf8_cannot_hold_is_saved_all_the_same(tmp_path):
    save_trace(tmp_path / "trace.html", [make_trace("<think>\ud800 half</think>")])
    assert "half" in Page((tmp_path / "trace.html").read_text(encoding="utf-8")).text


def test_fragment_is_no_page_and_styles_only_itself():
    page = Page(trace_fragment(make_trace()))
    assert page.all("html") == page.all("body") == []
    rules = re.sub(r"@media[^{]*\{(.*?\})\s*\}", r"\1", traces.STYLE, flags=re.DOTALL)
    selectors = re.findall(r"([^{}]+)\{[^}]*\}", rules)
    assert len(selectors) > 20
    assert all(part.strip().startswith(".crop-trace") for selector in selectors for part in selector.split(","))


def test_large_pictures_are_shrunk_for_the_page():
    images = embedded_images(Page(trace_html(make_trace("no call", size=(5000, 2500)))))
    assert images[0].size == (1600, 800)


def test_crops_that_do_not_match_the_calls_are_refused():
    with pytest.raises(ValueError, match="0 crops were given for 4 calls: give one a call"):
        Trace("q", parse_response(TEXT), Image.new("RGB", (9, 9)), ())


def test_page_without_traces_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no trace was given"):
        save_trace(tmp_path / "trace.html", [])


def test_call_that_was_never_opened_swallows_no_text():
    text = "<think>a [1, 2, 3, 4]</tool_call> and so on</think><answer>b</answer>"
    call = ToolCall("", text.index("</tool_call>"), "malformed")
    page = Page(trace_html(Trace("q", parse_response(text, (call,)), Image.new("RGB", (64, 64)), (None,))))
    assert "and so on" in page.text
