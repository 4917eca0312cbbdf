"""How good is a model, and do its crops help? Asks a set of questions and writes figures and a page of answers.

    python evaluate.py --model_path outputs/grpo/final_model --data data/test.jsonl --image_base_path data/images \\
        --ablate_crops none,blank,random

`--data` is a JSONL of this project, or the folder of V*Bench, HR-Bench, TextVQA or ScienceQA (benchmark_data.py says
which files). Answers go to answers.jsonl in `--output` as they come; the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark_data import Question, QuestionSet, read_questions
from command_line import CommandParser, add_flags
from config import ABLATIONS, EvaluationConfig, SettingsError, build, require
from crop_tool import CropContract, cut_crop
from judge import Judge
from measures import (
    Answer,
    Measured,
    as_text,
    by_category,
    crop_gain,
    gain_rows,
    measure,
    reference_boxes,
    summarize,
    table_rows,
)
from memory_model import is_out_of_memory
from model_utils import weights_digest
from patience import OutageError
from rewards import CORRECT_AT
from traces import Trace, trace_fragment, write_whole

if TYPE_CHECKING:
    from generation import CropEngine, Rollout
    from sampling import SamplingParams

ANSWERS, RESULTS, REPORT = "answers.jsonl", "results.json", "report.html"
ROUNDS = 8  # batches that one call of the engine gets, so that places which fall free are filled again
MAX_PIXELS = 2**28  # of original images held at a time
# Settings that decide what is answered; a file of answers belongs to one choice of them.
DIGESTED = {"model": "model (other weights)", "data": "data (other questions: the file, or --limit)"}
DECISIVE = ("samples", "temperature", "top_p", "top_k", "max_new_tokens", "max_crops", "seed", "dtype")


# ------------------------------------------------------------------------------------------------- asking


def ask(
    engine: CropEngine,
    questions: Sequence[Question],
    sampling: SamplingParams,
    samples: int = 1,
    done: Collection[tuple[str, str, int]] = (),
    faults: list[str] | None = None,
    progress: bool = False,
) -> Iterator[Answer]:
    """`samples` answers to each question, as they come; those whose key is in `done` are not asked again.

    An answer does not depend on what is asked beside it, or on how often the run was stopped. A question whose image
    cannot be read is left out and named in `faults`; without such a list it raises ValueError.
    """
    from tqdm.auto import tqdm

    faulty = len(faults or ())
    open_ = [
        (number, question, [k for k in range(samples) if (sampling.crops, question.name, k) not in done])
        for number, question in enumerate(questions)
    ]
    open_ = [item for item in open_ if item[2]]
    with tqdm(total=sum(len(item[2]) for item in open_), desc=f"crops {sampling.crops}", disable=not progress) as bar:
        for part in _parts(engine, open_, samples, faults):
            prompts = [prompt for *_, prompt in part]
            numbers = [number * samples + k for number, _, wanted, _ in part for k in wanted]
            started = time.perf_counter()
            rollouts = iter(
                engine.generate(
                    prompts, sampling, [len(item[2]) for item in part], on_finish=bar.update, numbers=numbers
                )
            )
            seconds = (time.perf_counter() - started) / len(numbers)
            for _, question, wanted, prompt in part:
                for sample in wanted:
                    size = prompt.original.size
                    yield _answer(question, sampling.crops, sample, next(rollouts), seconds, size)
    if progress and faults and len(faults) > faulty:
        print(f"{len(faults) - faulty} questions were left out, the first: {faults[faulty]}", file=sys.stderr)


def _parts(engine: CropEngine, items: list[tuple], samples: int, faults: list[str] | None) -> Iterator[list[tuple]]:
    """The items with their prompts, in parts that fit the engine and the memory."""
    batch = engine.batch_size
    most = 1 if batch == 1 else max(1, ROUNDS * batch // samples)  # one by one, an answer's seconds are its latency
    part, pixels = [], 0
    for number, question, wanted in items:
        try:
            prompt = engine.renderer.prompt(question.text, question.load())
        except ValueError as error:
            if faults is None:
                raise
            faults.append(f"{question.name}: {error}")
            continue
        part.append((number, question, wanted, prompt))
        pixels += prompt.original.width * prompt.original.height
        if len(part) >= most or pixels >= MAX_PIXELS:
            yield part
            part, pixels = [], 0
    if part:
        yield part


def _answer(question: Question, crops: str, sample: int, rollout: Rollout, seconds: float, size: tuple) -> Answer:
    sampled = sum(rollout.sampled_mask)
    inserted = len(rollout.completion_ids) - sampled
    calls, text = rollout.tool_calls, rollout.text.encode("utf-8", "replace").decode()
    return Answer(
        question.name, crops, sample, text, calls, rollout.finish_reason, sampled, inserted, round(seconds, 4), size
    )


# --------------------------------------------------------------------------------------- the file of answers


def run_settings(config: EvaluationConfig, questions: QuestionSet) -> dict[str, Any]:
    """What the answers depend on."""
    values = {name: getattr(config, name) for name in DECISIVE}
    weights = weights_digest(config.model_path)
    return {"model": weights or config.model_path, "data": questions.digest(), **values}


def read_answers(path: Path, settings: dict[str, Any]) -> tuple[list[Answer], CropContract | None]:
    """The answers of an earlier run with these settings; a line that was cut off at the end is dropped from the file.

    Raises:
        SettingsError: for a file of other settings, naming them, or one that is broken inside.
    """
    if not path.is_file():
        return [], None
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    lines = content[:whole].splitlines()
    anew = "give another --output, or --resume false to start anew"
    if not lines:
        return [], None
    try:
        header, *rows = map(json.loads, lines)
        before, contract = header["settings"], CropContract(**header["contract"])
        answers = [Answer.from_json(row) for row in rows]
    except (ValueError, TypeError, LookupError) as error:
        raise SettingsError(f"{path} is no file of answers ({type(error).__name__}: {error}): {anew}") from None
    differing = [name for name in settings if before.get(name) != settings[name]]
    if differing:
        said = {name: f"{name} ({before.get(name)} -> {settings[name]})" for name in differing}
        said |= {name: text for name, text in DIGESTED.items() if name in said}
        changed = ", ".join(said.values())
        raise SettingsError(f"{path} has answers of other settings: {changed}. So {anew}")
    return answers, contract


# ------------------------------------------------------------------------------------------------ results


def evaluate(config: EvaluationConfig, progress: bool = False) -> dict[str, Any]:
    """Ask, measure, and write answers.jsonl, results.json and report.html; returns the results.

    Raises:
        SettingsError: for data that cannot be read, or an output folder with answers of other settings.
    """
    known = read_questions(config.data, config.image_base_path, config.answer_key, config.split).limited(config.limit)
    folder = Path(config.output)
    require(not folder.is_file(), f"output is {folder}, which is a file: give a folder")
    folder.mkdir(parents=True, exist_ok=True)
    settings, path = run_settings(config, known), folder / ANSWERS
    if not config.resume:
        path.unlink(missing_ok=True)
    answers, contract = read_answers(path, settings)
    modes = {"real": "real"} | {name: ABLATIONS[name] for name in config.ablations}
    faults = list(known.faults)
    done = {answer.key for answer in answers}
    wanted = {
        (mode, question.name, k)
        for mode in modes.values()
        for question in known.questions
        for k in range(config.samples)
    }
    if not wanted <= done:
        if progress and done:
            print(f"{path} has {len(done & wanted)} of {len(wanted)} answers: going on")
        contract = _ask_all(config, known, settings, list(modes.values()), done, faults, path, progress)
        answers, _ = read_answers(path, settings)
    answers = [answer for answer in answers if answer.key in wanted]
    if not answers:
        raise SettingsError(f"no question could be asked: {'; '.join(faults[:3])}")
    judge = Judge(config) if config.judge_url else None
    measured = measure({question.name: question for question in known.questions}, answers, contract, judge)
    results = summary(config, known, measured, modes, faults)
    if judge is not None:
        results["judge"] = judge.report()
    write_whole(folder / RESULTS, (json.dumps(results, indent=2) + "\n").encode())
    write_whole(folder / REPORT, page(results, chosen_traces(measured, contract, config.traces)).encode())
    return results


def _ask_all(
    config: EvaluationConfig,
    known: QuestionSet,
    settings: dict[str, Any],
    modes: Sequence[str],
    done: Collection[tuple[str, str, int]],
    faults: list[str],
    path: Path,
    progress: bool,
) -> CropContract:
    from inference import QwenVLInference

    inference = QwenVLInference(config)
    contract = inference.renderer.contract
    with open(path, "a", encoding="utf-8") as file:
        if file.tell() == 0:
            print(json.dumps({"settings": settings, "contract": asdict(contract)}), file=file, flush=True)
        for mode in modes:
            sampling = replace(inference.sampling, crops=mode)
            found = faults if mode == modes[0] else []  # the same questions fail each time
            for answer in ask(inference.engine, known.questions, sampling, config.samples, done, found, progress):
                print(json.dumps(answer.to_json()), file=file, flush=True)
    return contract


def summary(
    config: EvaluationConfig,
    known: QuestionSet,
    measured: Sequence[Measured],
    modes: dict[str, str],
    faults: Sequence[str],
) -> dict[str, Any]:
    """All figures, by kind of crops and by category, and the crop gain against each ablation."""
    by_name = {name: [item for item in measured if item.answer.crops == mode] for name, mode in modes.items()}
    real = by_name["real"]
    shown = {name: {"all": summarize(items), "categories": by_category(items)} for name, items in by_name.items()}
    gains = {}
    for name in config.ablations:
        parts = by_category(real, lambda items, other=by_name[name]: crop_gain(items, other))
        gains[name] = {"all": crop_gain(real, by_name[name]), "categories": parts}
    return {
        "data": known.kind,
        "settings": asdict(config),
        "left_out": list(faults),
        "crops": shown,
        "crop_gain": gains,
    }


def describe(results: dict[str, Any]) -> str:
    """The results for the terminal."""
    settings = results["settings"]
    count = f"{settings['samples']} answers" if settings["samples"] > 1 else "one answer"
    head = f"{results['data']} {settings['data']}, {count} a question, {settings['model_path']}"
    lines = [head, "", as_text(table_rows(results))]
    if results["crop_gain"]:
        lines += ["", as_text(gain_rows(results))]
    if results["left_out"]:
        lines += ["", f"{len(results['left_out'])} left out, e.g. {results['left_out'][0]}"]
    if "judge" in results:
        lines += ["", "judge: " + ", ".join(f"{name} {count}" for name, count in results["judge"].items())]
    return "\n".join(lines)


# --------------------------------------------------------------------------------------------- the page


def trace_of(item: Measured, contract: CropContract) -> Trace:
    """An answer as data of a trace page, its crops cut again as the model saw them."""
    question, answer, image = item.question, item.answer, item.question.load()
    crops = tuple(
        cut_crop(image, call.box, contract) if call.is_executed and answer.crops == "real" else None
        for call in answer.calls
    )
    title = f"{question.name}{f' ({question.category})' if question.category else ''}"
    return Trace(
        question.text,
        answer.response,
        image,
        crops,
        expected=" / ".join(dict.fromkeys(question.answers)),
        title=title,
        reference_boxes=reference_boxes(question, answer.image_size, contract),
        is_correct=item.figures["accuracy"] >= CORRECT_AT,
    )


def chosen_traces(measured: Sequence[Measured], contract: CropContract, count: int) -> dict[str, list[Trace]]:
    """The worst and the best answers with real crops: by accuracy, then by the overlap with the annotation."""

    def rank(item: Measured) -> tuple[float, float]:
        iou = item.figures["iou"]
        return item.figures["accuracy"], 0.0 if math.isnan(iou) else iou

    real = sorted((item for item in measured if item.answer.crops == "real"), key=rank)
    count = min(count, len(real) // 2)
    chosen = {"worst": real[:count], "best": real[::-1][:count]}
    return {name: [trace_of(item, contract) for item in items] for name, items in chosen.items()}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Evaluation: {{ results.data }}</title><style>
:root { color-scheme: light dark; }
body { margin: 0 auto; max-width: 60rem; padding: 1rem; font: 16px/1.5 system-ui, sans-serif; }
table { border-collapse: collapse; margin: 1rem 0; font-size: .9rem; font-variant-numeric: tabular-nums; }
td, th { padding: .2rem .7rem; text-align: right; border-bottom: 1px solid #8884; white-space: pre; }
td:first-child, th:first-child { text-align: left; }
body .crop-trace { margin: 0; background: none; } .wide { overflow-x: auto; } p, li { overflow-wrap: anywhere; }
</style></head><body>
<h1>Evaluation: {{ results.data }}</h1><p>{{ results.settings.model_path }} on {{ results.settings.data }}</p>
<div class="wide">
<table>{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}</table>
{% if gains %}<table>{% for row in gains %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>{% endfor %}
</table>{% endif %}</div>
{% if results.left_out %}<details><summary>{{ results.left_out | length }} left out</summary><ul>
{% for fault in results.left_out[:100] %}<li>{{ fault }}</li>{% endfor %}</ul></details>{% endif %}
{% for name, items in fragments.items() if items %}<h2>The {{ name }}</h2>{% for item in items %}{{ item }}{% endfor %}
{% endfor %}</body></html>
"""


def page(results: dict[str, Any], traces: dict[str, list[Trace]]) -> str:
    """A self-contained page: the figures, and the traces by their heading. All text is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    fragments = {name: [Markup(trace_fragment(trace)) for trace in items] for name, items in traces.items()}
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    return template.render(results=results, rows=table_rows(results), gains=gain_rows(results), fragments=fragments)


# ------------------------------------------------------------------------------------------------ command


def _parser() -> CommandParser:
    parser = CommandParser(
        description=(__doc__ or "").split("\n")[0],
        epilog="The judge's key is read from the environment variable JUDGE_API_KEY alone.",
    )
    unread = ("execute_crops", "parse_tool_calls")  # --ablate_crops none is what withholds crops here
    add_flags(parser, EvaluationConfig, "evaluation", unread)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    try:
        config = build(EvaluationConfig, vars(parser.parse_args(argv)))
        results = evaluate(config, progress=True)
    except (SettingsError, ValueError) as error:
        parser.exit(2, f"evaluate.py: {error}\n")
    except (OutageError, OSError, RuntimeError, MemoryError, KeyboardInterrupt) as error:
        reason = str(error)  # of an OSError: a full disk, a folder that is not ours
        if isinstance(error, KeyboardInterrupt):
            reason = "stopped by Ctrl-C"
        elif is_out_of_memory(error):
            reason = f"out of memory: --batch_size {max(1, config.batch_size // 2)}, or a bound by --max_batch_tokens"
        elif isinstance(error, RuntimeError):
            raise
        kept = Path(config.output, ANSWERS)
        rest = f". The answers so far are in {kept}: the same command goes on from there" if kept.is_file() else ""
        parser.exit(130 if isinstance(error, KeyboardInterrupt) else 1, f"evaluate.py: {reason}{rest}\n")
    print(f"\n{describe(results)}\n\nwrote {RESULTS}, {REPORT} and {ANSWERS} to {config.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
