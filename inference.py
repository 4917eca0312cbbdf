"""Ask a trained model about an image; it looks at crops while it thinks.

python inference.py --model_path outputs/grpo/final_model --image_path test_image.jpg --question "What is he holding?"
"""

from __future__ import annotations

import json
import sys
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import CommandParser, add_flags
from config import InferenceConfig, SettingsError, build, require_apart
from conversation import Prompt, Renderer, load_image, refuse_reserved
from crop_tool import CALL_CLOSE, ToolCall
from memory_model import is_out_of_memory
from patience import OutageError
from response_format import parse_response
from streaming import CallResult, ResponseReader, TextPiece
from traces import Trace, save_trace, trace_fragment, write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

    from generation import CropEngine
    from rollouts import Rollout
    from vllm_generation import VLLMEngine


@dataclass(frozen=True)
class InferenceResult:
    """One answer. In a notebook it shows itself: image, numbered boxes, and each crop where it entered.

    tool_calls: with boxes in pixels of the ORIGINAL image. text: the response as the model wrote it.
    crops: one a call, as the model saw it; None where none was shown.
    finish_reason: `stop`, or `length` where `max_new_tokens` ended it.
    """

    question: str
    think_content: str
    answer_content: str
    tool_calls: list[ToolCall]
    crops: list[Image | None]
    text: str
    finish_reason: str
    image: Image = field(repr=False)
    rollout: Rollout = field(repr=False)
    prompt: Prompt = field(repr=False)
    earlier: InferenceResult | None = field(default=None, repr=False)

    def trace(self) -> Trace:
        """The answer as data of a trace page."""
        calls = self.rollout.tool_calls
        response = parse_response(self.text, calls)
        return Trace(self.question, response, self.image, tuple(_crops_by_call(self.prompt, self.rollout)))

    def traces(self) -> list[Trace]:
        """This answer's trace behind those of the questions before it."""
        return [*(self.earlier.traces() if self.earlier else []), self.trace()]

    def save_trace(self, path: str | Path) -> None:
        """Write a self-contained HTML page of the conversation up to this answer."""
        save_trace(path, self.traces())

    def _repr_html_(self) -> str:
        return trace_fragment(self.trace())

    def to_dict(self) -> dict[str, Any]:
        """Everything but pixels, ready for JSON."""
        return {
            "question": self.question,
            "think_content": self.think_content,
            "answer_content": self.answer_content,
            "tool_calls": [
                {"text": call.text, "outcome": call.outcome, "box": call.box.as_list() if call.box else None}
                for call in self.tool_calls
            ],
            "response": self.text,
            "finish_reason": self.finish_reason,
            "new_tokens": sum(self.rollout.sampled_mask),
        }


Stream = Generator[TextPiece | CallResult | InferenceResult, None, None]


def _crops_by_call(prompt: Prompt, rollout: Rollout) -> list[Image | None]:
    crops = iter(rollout.images[len(prompt.images) :])
    return [next(crops) if call.is_executed else None for call in rollout.tool_calls]


def load_engine(config: InferenceConfig) -> CropEngine | VLLMEngine:
    """The trained model on our engine, or on vLLM."""
    if config.backend == "vllm":
        from vllm_generation import inference_engine

        return inference_engine(config)
    from generation import CropEngine
    from model_utils import load_for_inference

    loaded = load_for_inference(config)
    renderer = Renderer(loaded.processor, loaded.contract)
    return CropEngine(loaded.model, renderer, config.batch_size, config.max_batch_tokens, config.cuda_graphs)


class QwenVLInference:
    """Loads a trained model once and answers questions with it."""

    def __init__(self, config: InferenceConfig | None = None) -> None:
        from rollouts import SamplingParams

        self.config = config or InferenceConfig()
        self.engine = load_engine(self.config)
        self.renderer = self.engine.renderer
        self.sampling = SamplingParams(
            max_new_tokens=self.config.max_new_tokens,
            temperature=self.config.temperature,
            top_p=self.config.top_p,
            top_k=self.config.top_k,
            max_crops=self.config.max_crops,
            seed=self.config.seed,
            crops="real" if self.config.execute_crops else "off",
        )

    def generate(self, image: str | Path | Image, question: str) -> InferenceResult:
        """Answer one question about an image (PIL, path, URL or data URI).

        Raises:
            ValueError: for an image that cannot be read, an empty question, or one with the model's image tokens in it.
            SettingsError: for a question that does not fit `max_batch_tokens`.
        """
        return self.batch_generate([image], [question])[0]

    def batch_generate(
        self, images: Sequence[str | Path | Image], questions: Sequence[str], progress: bool = False
    ) -> list[InferenceResult]:
        """Answer many questions, one image each (any sizes), in order; `progress` shows a bar."""
        if len(images) != len(questions):
            raise ValueError(
                f"{len(images)} images and {len(questions)} questions were given: give one image a question"
            )
        prompts = [self._prompt(image, question) for image, question in zip(images, questions, strict=True)]
        return self._answer(prompts, questions, [None] * len(prompts), progress)

    def follow_up(self, result: InferenceResult, question: str) -> InferenceResult:
        """A further question after `result`, with its image and crops still in view."""
        return self._answer([self._follow_up_prompt(result, question)], [question], [result], progress=False)[0]

    def stream(self, image: str | Path | Image, question: str) -> Stream:
        """`generate`, told as it comes: pieces of text, the result of each call, and last the whole answer.

        The pieces joined are `result.text`, the calls' results are `result.tool_calls` with `result.crops`, and the
        answer is that of `generate`. No piece ends inside a character or a tag. Ours gives pieces of a token or two,
        vLLM one for each stretch between calls. Closing the stream ends the work.

        Raises:
            ValueError, SettingsError: as `generate`, before the first piece.
        """
        return self._stream(self._prompt(image, question), question)

    def stream_follow_up(self, result: InferenceResult, question: str) -> Stream:
        """`follow_up`, told as it comes; see `stream`."""
        return self._stream(self._follow_up_prompt(result, question), question, result)

    def _prompt(self, image: str | Path | Image, question: str) -> Prompt:
        check_question(question)
        return self.renderer.prompt(question, load_image(image))

    def _follow_up_prompt(self, result: InferenceResult, question: str) -> Prompt:
        check_question(question)
        return self.renderer.follow_up(result.prompt, result.rollout.completion_ids, result.rollout.images, question)

    def _stream(self, prompt: Prompt, question: str, earlier: InferenceResult | None = None) -> Stream:
        reader = None
        for response in self.engine.stream(prompt, self.sampling):
            reader = reader or ResponseReader(response, self.renderer.tokenizer, self.renderer.ids[CALL_CLOSE])
            for news in reader.news():
                if isinstance(news, TextPiece) or self.config.parse_tool_calls:
                    yield news
        yield self._result(prompt, question, self.engine.writer.rollout(response), earlier)

    def _answer(self, prompts: list[Prompt], questions: Sequence[str], earlier: list, progress: bool) -> list:
        from tqdm.auto import tqdm

        with tqdm(total=len(prompts), desc="answers", disable=not progress) as bar:
            rollouts = self.engine.generate(prompts, self.sampling, on_finish=bar.update)
        return [self._result(*parts) for parts in zip(prompts, questions, rollouts, earlier, strict=True)]

    def _result(
        self, prompt: Prompt, question: str, rollout: Rollout, earlier: InferenceResult | None
    ) -> InferenceResult:
        parsed = parse_response(rollout.text, rollout.tool_calls)
        wanted = self.config.parse_tool_calls
        return InferenceResult(
            question=question,
            think_content=parsed.think_content,
            answer_content=parsed.answer_content,
            tool_calls=list(parsed.tool_calls) if wanted else [],
            crops=_crops_by_call(prompt, rollout) if wanted else [],
            text=rollout.text,
            finish_reason=rollout.finish_reason,
            image=prompt.original,
            rollout=rollout,
            prompt=prompt,
            earlier=earlier,
        )


def check_question(question: str) -> None:
    if not isinstance(question, str) or not question.strip():
        raise ValueError(f"the question is {question!r}, but it must be text")
    refuse_reserved(question, "the question")


CUT_OFF = "The answer was cut off: raise --max_new_tokens."


def describe(result: InferenceResult) -> str:
    """An answer for the terminal."""
    lines = [f"Question: {result.question}"]
    if result.think_content:
        lines.append(f"Thinking: {result.think_content}")
    lines += [describe_call(number, call) for number, call in enumerate(result.tool_calls, start=1)]
    lines.append(f"Answer: {result.answer_content or '(none)'}")
    if result.finish_reason == "length":
        lines.append(CUT_OFF)
    return "\n".join(lines)


def describe_call(number: int, call: ToolCall) -> str:
    where = f"{call.box.as_list()} of the original image" if call.box else repr(call.text)
    return f"Crop {number}: {where} ({call.outcome})"


def print_stream(stream: Stream) -> InferenceResult:
    """Print an answer as it comes, each call's result on a line of its own; returns the whole of it."""
    for news in stream:
        if isinstance(news, TextPiece):
            print(news.text, end="", flush=True)
        elif isinstance(news, CallResult):
            print(f"\n[{describe_call(news.number, news.call)}]", flush=True)
    print(f"\n{CUT_OFF}" if news.finish_reason == "length" else "")
    return news


def _parser() -> CommandParser:
    parser = CommandParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--image_path", required=True, metavar="IMAGE", help="image file, URL or data URI")
    parser.add_argument(
        "--question",
        required=True,
        action="append",
        metavar="TEXT",
        help="the question; given again, a follow-up question",
    )
    parser.add_argument("--stream", action="store_true", help="print the response as it comes")
    parser.add_argument("--output_json", metavar="FILE", help="write the answers (one object, or a list) to this file")
    parser.add_argument("--save_trace", metavar="FILE", help="write a page that shows image, boxes, crops and answer")
    add_flags(parser, InferenceConfig, "model and sampling")
    return parser


def _converse(inference: QwenVLInference, image: Image, questions: list[str], streams: bool) -> list[InferenceResult]:
    """The answers to a question and its follow-ups, printed as they come where they are streamed."""
    results: list[InferenceResult] = []
    for question in questions:
        first = not results
        if streams:
            print(f"Question: {question}", flush=True)
            stream = inference.stream(image, question) if first else inference.stream_follow_up(results[-1], question)
            results.append(print_stream(stream))
        else:
            results.append(inference.generate(image, question) if first else inference.follow_up(results[-1], question))
    return results


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    flags = vars(parser.parse_args(argv))
    image_path, questions, streams, output_json, trace = (
        flags.pop(name) for name in ("image_path", "question", "stream", "output_json", "save_trace")
    )
    try:
        config = build(InferenceConfig, flags)
        for name, output in {"output_json": output_json, "save_trace": trace}.items():
            require_apart(name, output, image_path, "the image")
        image = load_image(image_path)
        for question in questions:
            check_question(question)
        inference = QwenVLInference(config)
        results = _converse(inference, image, questions, streams)
        if not streams:
            print("\n\n".join(describe(result) for result in results))
        if output_json:
            answers = [{"image_path": image_path, **result.to_dict()} for result in results]
            text = json.dumps(answers[0] if len(answers) == 1 else answers, indent=2, ensure_ascii=False)
            write_whole(output_json, f"{text}\n".encode("utf-8", "backslashreplace"))  # half a surrogate pair
            print(f"wrote {output_json}")
        if trace:
            results[-1].save_trace(trace)
            print(f"wrote {trace}")
    except (SettingsError, ValueError) as error:
        parser.exit(2, f"inference.py: {error}\n")
    except (OutageError, OSError) as error:  # the latter: a full disk, a file that cannot be written there
        parser.exit(1, f"inference.py: {error}\n")
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        parser.exit(1, "inference.py: out of memory: --dtype bfloat16, or fewer --max_new_tokens or --max_crops\n")


if __name__ == "__main__":
    main(sys.argv[1:])
