"""The page of web_demo.py: picture and question in; thinking, boxes, crops and answer as they come.

Every text of a user or the model goes through the traces' templates, which escape it.
"""

from __future__ import annotations

import re
import tempfile
import threading
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import component_meta
from PIL.Image import Image

from config import WebConfig
from conversation import load_image, refuse_reserved
from crop_tool import ToolCall
from inference import InferenceResult, QwenVLInference, Stream
from response_format import parse_response
from streaming import CallResult, TextPiece
from traces import STYLE, Trace, TraceStep, html_environment, picture_data, reasoning_steps, step_data, steps_after

LONGEST_QUESTION = 2000  # characters
PACE = 0.05  # seconds between two updates of the text, at least
# A value's parts are joined in the browser, so that only the part that changed is sent. Nothing of a value is ever
# taken for a template: what stands in `${...}` here is code, what it gives is not.
JOINED = "${value.join('')}"

NOTHING = ['<div class="crop-trace"><div class="flow">']  # the browser closes them
TAGS = re.compile(r"\n?</?(?:think|answer)>\n?")  # the page says in other ways what they say

TEMPLATES = """
{%- macro shown(it) -%}
{%- from "picture.html" import picture -%}
<div class="crop-trace">{{ picture(it) }}</div>
{%- endmacro -%}
{%- macro step(it) -%}{%- from "flow.html" import stretch -%}{{ stretch(it) }}{%- endmacro -%}
{%- macro end(answer, after, notes) -%}
{%- from "flow.html" import flow -%}
<div class="crop-trace">
{%- if answer %}<h3>Answer</h3><p class="answer">{{ answer }}</p>{% endif -%}
{%- if after %}<h3>In and after the answer</h3>{{ flow(after) }}{% endif -%}
{%- for note in notes %}<p class="note">{{ note }}</p>{% endfor -%}
</div>
{%- endmacro -%}
"""

PAGE_STYLE = """
.gradio-container { max-width:72rem !important; width:100%; margin:0 auto !important; }
#head, #shown, #thinking, #end, :is(#head, #shown, #thinking, #end) > * { padding:0; margin:0; }
#head h1 { font-size:1.5rem; margin:.5rem 0 .1rem; } #head p { margin:0; opacity:.75; }
#shown .crop-trace, #thinking .crop-trace, #end .crop-trace { padding:0; margin:0; max-width:none; background:none; }
#shown .crop-trace { contain:inline-size; } #shown .picture { margin:0 auto; }
#thinking .flow { min-height:9rem; border-radius:10px; padding:1rem 1.2rem; }
#thinking .flow:empty::before { color:var(--soft);
  content:"What the model thinks appears here, and beside it what it looks at."; }
#thinking .chip { margin:0 .25rem; } #thinking figure img { min-width:100%; }
#columns { gap:1.75rem; }
#end .answer { font-size:1.5rem; font-weight:600; line-height:1.3; }
#end h3 { margin:.2rem 0 .1rem; }
#end .note { margin:.5rem 0 0; padding:.5rem .8rem; border-left:3px solid var(--bad); background:var(--bad-paper);
  border-radius:4px; color:var(--ink); }
#save { align-self:flex-start; width:auto; flex-grow:0; }
"""


class Allowance:
    """How often each client may do something: so many times in any `period` of seconds."""

    def __init__(self, times: int, period: float = 60.0) -> None:
        self.times, self.period = times, period
        self.taken: dict[str, deque[float]] = defaultdict(deque)
        self.lock = threading.Lock()

    def wait(self, client: str, now: float | None = None) -> float:
        """Seconds until the client may; 0: now, and this time is counted."""
        now = time.monotonic() if now is None else now
        with self.lock:
            for other in [name for name, times in self.taken.items() if times[-1] <= now - self.period]:
                del self.taken[other]
            times = self.taken[client]
            while times and times[0] <= now - self.period:
                times.popleft()
            if len(times) >= self.times:
                return times[0] + self.period - now
            times.append(now)
            return 0.0


component_meta.create_or_modify_pyi = lambda *_: None  # it would write a stub of the class beside this file


class Upload(gr.Image):
    """A picture as it was uploaded: Gradio neither opens it nor fetches one from an address that a client names."""

    is_template = True  # for the browser it is an Image

    def preprocess(self, payload: Any) -> str | None:
        return payload.path if payload else None

    async def async_move_resource_to_block_cache(self, url_or_file_path: str | Path | None) -> str | None:
        if str(url_or_file_path).lower().startswith(("http:", "https:")):
            raise gr.Error("Addresses are not fetched: upload the picture.")
        return await super().async_move_resource_to_block_cache(url_or_file_path)


@dataclass
class View:
    """An answer in the making, as the page shows it."""

    image: Image
    question: str
    text: str = ""
    calls: list[ToolCall] = field(default_factory=list)
    crops: list[Image | None] = field(default_factory=list)
    rendered: list[str] = field(default_factory=list)  # of the steps that a call ended

    @cached_property
    def _macros(self) -> Any:
        return html_environment().from_string(TEMPLATES).module

    def add(self, news: TextPiece | CallResult) -> None:
        if isinstance(news, TextPiece):
            self.text += news.text
        else:
            self.calls.append(news.call)
            self.crops.append(news.crop)

    def trace(self) -> Trace:
        response = parse_response(self.text, tuple(self.calls))
        return Trace(self.question, response, self.image, tuple(self.crops))

    def picture(self) -> str:
        return str(self._macros.shown(picture_data(self.trace())))

    def thinking(self) -> list[str]:
        """The steps before the answer. Those that a call ended stay as they are."""
        *ended, last = reasoning_steps(self.trace())
        self.rendered += [self._step(step) for step in ended[len(self.rendered) :]]
        return [*NOTHING, *self.rendered, self._step(last)]

    def _step(self, step: TraceStep) -> str:
        return str(self._macros.step(step_data(replace(step, text=TAGS.sub("", step.text)))))

    def end(self, *notes: str) -> str:
        trace = self.trace()
        after = [step_data(step) for step in steps_after(trace)]
        return str(self._macros.end(trace.response.answer_content, after, notes))


def note(text: str) -> str:
    """A remark in place of an answer."""
    return str(html_environment().from_string(TEMPLATES).module.end("", [], [text]))


class Page:
    """The page and what happens on it."""

    def __init__(self, inference: QwenVLInference, config: WebConfig, folder: str | Path) -> None:
        """folder: for the traces to be saved; Gradio's own."""
        self.inference, self.folder = inference, folder
        self.allowance = Allowance(config.questions_per_minute)
        self.model = threading.Lock()  # a question that was stopped may still be in its last step
        self.blocks = self._build(config)

    def _build(self, config: WebConfig) -> gr.Blocks:
        with gr.Blocks(title="Thinking with crops", analytics_enabled=False, delete_cache=(600, 3600)) as blocks:
            gr.HTML(
                "<h1>Thinking with crops</h1><p>Ask about a picture: the model looks closer where it needs to.</p>",
                elem_id="head",
            )
            with gr.Row(equal_height=False, elem_id="columns"):
                with gr.Column(scale=5, min_width=320):
                    self.upload = Upload(
                        label="Picture", sources=["upload", "clipboard"], type="filepath", height=420, buttons=[]
                    )
                    self.shown = gr.HTML(visible=False, elem_id="shown")
                    self.question = gr.Textbox(
                        label="Question", placeholder="What is written on the sign?", max_length=LONGEST_QUESTION
                    )
                    with gr.Row():
                        self.ask = gr.Button("Ask", variant="primary")
                        self.stop = gr.Button("Stop", visible=False)
                        self.again = gr.Button("Another picture", visible=False)
                with gr.Column(scale=6, min_width=320):
                    self.thinking = gr.HTML(NOTHING, html_template=JOINED, elem_id="thinking")
                    self.end = gr.HTML("", elem_id="end")
                    self.save = gr.DownloadButton("Save as a page", visible=False, size="sm", elem_id="save")
            changed = [self.shown, self.thinking, self.end, self.save, self.upload, self.ask, self.stop, self.again]
            asked = gr.on(
                [self.ask.click, self.question.submit],
                self.answer,
                [self.upload, self.question],
                changed,
                api_name="ask",
                show_progress="hidden",
                concurrency_limit=1,
                trigger_mode="once",
            )
            private = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
            self.stop.click(self._at_rest, None, changed, cancels=[asked], **private)
            self.again.click(self._cleared, None, changed, **private)
            self.upload.clear(self._cleared, None, changed, **private)
        return blocks.queue(max_size=config.max_queue, default_concurrency_limit=1)

    def _at_rest(self) -> dict:
        return {self.ask: gr.update(visible=True), self.stop: gr.update(visible=False)}

    def _cleared(self) -> dict:
        hidden = {item: gr.update(visible=False) for item in (self.shown, self.save, self.again, self.stop)}
        fresh = {self.upload: gr.update(value=None, visible=True), self.ask: gr.update(visible=True)}
        return {**hidden, **fresh, self.thinking: NOTHING, self.end: ""}

    def answer(self, path: str | None, question: str, request: gr.Request) -> Iterator[dict]:
        """What changes on the page, as it changes."""
        try:
            image = self._checked(path, question, request.client.host)
        except ValueError as error:
            yield {self.end: note(str(error)), self.save: gr.update(visible=False), **self._at_rest()}
            return
        view = View(image, question)
        yield {
            self.upload: gr.update(visible="hidden"),
            self.shown: gr.update(value=view.picture(), visible=True),
            self.thinking: view.thinking(),
            self.end: "",
            self.save: gr.update(visible=False),
            self.ask: gr.update(visible=False),
            self.stop: gr.update(visible=True),
            self.again: gr.update(visible=False),
        }
        stream = self.inference.stream(image, question)
        try:
            yield from self._follow(stream, view)
        except ValueError as error:  # a question that does not fit
            yield {self.end: note(str(error)), self.again: gr.update(visible=True), **self._at_rest()}
        finally:
            with self.model:
                stream.close()

    def _checked(self, path: str | None, question: str, client: str) -> Image:
        """The picture.

        Raises:
            ValueError: for what cannot be asked, or not so soon.
        """
        if not path:
            raise ValueError("Upload a picture first.")
        if not isinstance(question, str) or not question.strip():
            raise ValueError("Write a question first.")
        if len(question) > LONGEST_QUESTION:
            raise ValueError(f"The question has {len(question)} characters: {LONGEST_QUESTION} are allowed.")
        refuse_reserved(question, "the question")
        wait = self.allowance.wait(client)
        if wait:
            raise ValueError(f"Too many questions: try again in {wait:.0f} seconds.")
        try:
            return load_image(path)
        except ValueError as error:  # without the server's folders
            raise ValueError(str(error).replace(path, f"({Path(path).name})")) from None

    def _follow(self, stream: Stream, view: View) -> Iterator[dict]:
        told = 0.0
        while True:
            with self.model:
                news = next(stream)
            if isinstance(news, InferenceResult):
                break
            view.add(news)
            if isinstance(news, CallResult):
                yield {self.shown: view.picture(), self.thinking: view.thinking()}
            elif time.monotonic() - told >= PACE:
                told = time.monotonic()
                yield {self.thinking: view.thinking(), self.end: view.end()}
        cut = news.finish_reason == "length"
        notes = ["The answer was cut off: it reached the longest length allowed here."] if cut else []
        if not cut and not news.answer_content:
            notes = ["The model wrote no answer."]
        yield {
            self.thinking: view.thinking(),
            self.end: view.end(*notes),
            self.save: gr.update(value=self._saved(news), visible=True),
            self.again: gr.update(visible=True),
            **self._at_rest(),
        }

    def _saved(self, result: InferenceResult) -> str:
        path = Path(tempfile.mkdtemp(dir=self.folder), "answer.html")
        result.save_trace(path)
        return str(path)


def theme() -> gr.themes.Base:
    """Fonts of the reader's machine: the page asks no other host for anything."""
    return gr.themes.Default(
        primary_hue="orange",
        neutral_hue="slate",
        font=["system-ui", "sans-serif"],
        font_mono=["ui-monospace", "monospace"],
    )


def style() -> str:
    return STYLE + PAGE_STYLE
