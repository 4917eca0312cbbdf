"""No file runs what it reads, no page runs what it shows: rules over the source, and every page with hostile text."""

import ast
import json
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from test_rollout_pages import crafted
from test_traces import make_trace

import evaluate
from benchmark_data import read_questions
from config import EvaluationConfig
from conversation import Example
from crop_tool import Box, ToolCall
from data_sheet import sheet_html
from measures import Answer, measure
from rollout_pages import rollouts_html
from token_view import as_html
from traces import trace_fragment, trace_html

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("*.py"), *ROOT.glob("benchmarks/*.py")])

# ---------------------------------------------------------------------------------------------- the source

RUNS_TEXT = {"eval", "exec", "compile", "__import__"}
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "jsonpickle"}
SHELLS = {"os.system", "os.popen", "subprocess.getoutput", "subprocess.getstatusoutput", "pty.spawn"}
# Keyword -> the only value that it may have.
ONLY = {"trust_remote_code": False, "shell": False, "allow_pickle": False, "use_safetensors": True, "autoescape": True}
MARKUP = {"traces.py": 2, "data_sheet.py": 1, "evaluate.py": 1}  # what a page takes as it is: our own style and script


def dangers(source: str) -> Iterator[str]:
    """What a file does that could run text of data, of a model or of a checkpoint."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"imports {name}" for name in names if name.partition(".")[0] in PICKLES)
        elif isinstance(node, ast.Call):
            yield from dangers_of_call(ast.unparse(node.func), {item.arg: item.value for item in node.keywords})
        elif isinstance(node, ast.Dict):  # of keywords, passed on with **
            given = {key.value: value for key, value in zip(node.keys, node.values, strict=True) if is_text(key)}
            yield from wrong_values(given)


def dangers_of_call(name: str, given: dict[str | None, ast.AST]) -> Iterator[str]:
    if name in RUNS_TEXT | SHELLS:
        yield f"calls {name}"
    if name == "torch.load" and not is_constant(given.get("weights_only"), True):
        yield "calls torch.load without weights_only=True"
    if name.startswith("yaml.") and name.endswith("load") and name != "yaml.safe_load":
        yield f"calls {name}"
    if name.startswith("Auto") and name.endswith(".from_pretrained") and "trust_remote_code" not in given:
        yield f"calls {name} without trust_remote_code=False"
    if name.endswith("Environment") and "autoescape" not in given:
        yield f"calls {name} without autoescape=True"
    yield from wrong_values(given)


def wrong_values(given: dict) -> Iterator[str]:
    for keyword, value in ONLY.items():
        if keyword in given and not is_constant(given[keyword], value):
            yield f"{keyword} is not {value}"


def is_constant(node: ast.AST | None, value: object) -> bool:
    return isinstance(node, ast.Constant) and node.value is value


def is_text(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_file_runs_what_it_reads(path):
    source = path.read_text(encoding="utf-8")
    assert list(dangers(source)) == []
    assert "|safe" not in source.replace(" ", "")
    assert source.count("Markup(") == MARKUP.get(path.name, 0)


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("eval('1')", "calls eval"),
        ("def f(x):\n    exec(x)", "calls exec"),
        ("from pickle import loads", "imports pickle"),
        ("import a, joblib.numpy_pickle", "imports joblib.numpy_pickle"),
        ("torch.load(f)", "calls torch.load without weights_only=True"),
        ("torch.load(f, weights_only=False)", "calls torch.load without weights_only=True"),
        ("torch.load(f, weights_only=flag)", "calls torch.load without weights_only=True"),
        ("AutoModel.from_pretrained(p)", "calls AutoModel.from_pretrained without trust_remote_code=False"),
        ("f(trust_remote_code=True)", "trust_remote_code is not False"),
        ("settings = {'trust_remote_code': True}", "trust_remote_code is not False"),
        ("yaml.load(f)", "calls yaml.load"),
        ("yaml.unsafe_load(f)", "calls yaml.unsafe_load"),
        ("subprocess.run(c, shell=True)", "shell is not False"),
        ("os.system(c)", "calls os.system"),
        ("jinja2.Environment()", "calls jinja2.Environment without autoescape=True"),
        ("np.load(f, allow_pickle=True)", "allow_pickle is not False"),
    ],
)
def test_the_rules_find_what_they_are_for(source, found):
    assert list(dangers(source)) == [found]


def test_what_only_looks_dangerous_is_let_through():
    source = "model.eval()\nre.compile(x)\ntorch.load(f, weights_only=True)\nrun(c, shell=False)\nyaml.safe_load(f)"
    assert list(dangers(source)) == []


# ------------------------------------------------------------------------------------------------ the pages

HARMLESS = "a plain text"
HOSTILE = [
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "'><svg onload=alert(1)>",
    "</script><script>alert(1)</script>",
    "</style><script>alert(1)</script>",
    "--></title></textarea><iframe src=javascript:alert(1)>",
    '" onmouseover="alert(1)" x="',
    "' onfocus=alert(1) autofocus='",
    "javascript:alert(1)",
    "{{ 7*7 }}{% for x in range(9) %}<b>{% endfor %}",
    "&lt;script&gt;alert(1)&lt;/script&gt;",
    "<scr\0ipt>alert(1)</scr\0ipt>\ud800",
]


class Skeleton(HTMLParser):
    """What a page does: its tags with the names of their attributes, and what its scripts and addresses are."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list = []
        self.inside, self.text = "", ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.parts.append((tag, [name for name, _ in attrs]))
        # What an address or a style says must not come from data either; pictures are compared by their kind alone.
        for name, value in attrs:
            if name in ("src", "href", "style", "content", "action"):
                self.parts.append((name, (value or "").partition(",")[0]))

    def handle_data(self, data):
        if self.inside in ("script", "style"):
            self.parts.append(data)
        else:
            self.text += data

    def handle_endtag(self, tag):
        self.inside = ""
        self.parts.append(("/", tag))

    def handle_comment(self, data):
        self.parts.append(("comment", data))


def in_a_call(text: str) -> str:
    """The free words of an annotated call, which hold no braces."""
    return text.translate({ord("{"): "(", ord("}"): ")"})


def trace_of(text: str):
    response = f"<think>{text} <tool_call>{text}</tool_call></think>\n\n<answer>{text}</answer> {text}"
    return make_trace(response, question=text, expected=text, title=text)


def page_of_answers(text: str) -> str:
    return trace_html(trace_of(text), trace_of(text))


def notebook_cell(text: str) -> str:
    return trace_fragment(trace_of(text))


def contact_sheet(text: str) -> str:
    row = {
        "line": 1,
        "entry": 0,
        "image_path": text,
        "question": text,
        "response": f"{text} {{Crop {in_a_call(text)} [1, 2, 3, 4]}}",
    }
    picture = Image.new("RGB", (40, 30))
    faults = [f"{text}: {text}", ""]
    rows = [{**row, "fault": fault} for fault in faults]
    return sheet_html(text, rows, faults, lambda path: picture, text)


@pytest.fixture
def token_page(renderer):
    picture = Image.new("RGB", (120, 90))

    def page(text: str) -> str:
        text = text.replace("\ud800", "")  # a fault of the data check
        answer = f"<think>{text} {{Crop {in_a_call(text)} [10, 10, 60, 60]}}</think>\n\n<answer>{text}</answer>"
        return as_html(renderer.encode(Example(1, 0, text, text, answer), picture), renderer)

    return page


@pytest.fixture
def report(contract, data_folder, tmp_path):
    def page(text: str) -> str:
        image = "images/" + sorted((data_folder / "images").iterdir())[0].name
        asked = text.replace("\ud800", "")  # a fault of the questions
        entries = [{"Q": f"{n} {asked}", "A3": f"<think>a</think><answer>{text}</answer>"} for n in range(4)]
        (tmp_path / "set.jsonl").write_text(json.dumps({"image_path": image, "category": text, "QnA": entries}))
        known = read_questions(tmp_path / "set.jsonl", data_folder)
        said = f"<think>{text}<tool_call>{text}</tool_call></think><answer>{text}</answer>"
        call = ToolCall(text, said.index("<tool_call>"), "exact", Box(0, 0, 64, 64))
        answers = [
            Answer(question.name, "real", 0, said, (call,), "stop", 9, 4, 0.1, (448, 448))
            for question in known.questions
        ]
        measured = measure({question.name: question for question in known.questions}, answers, contract)
        config = EvaluationConfig(data=text, model_path=text)
        results = evaluate.summary(config, known, measured, {"real": "real"}, [f"line 9: {text}"])
        return evaluate.page(results, evaluate.chosen_traces(measured, contract, 2))

    return page


@pytest.fixture
def kept_rollouts(tmp_path):
    def page(text: str) -> str:
        said = f"<think>{text} <tool_call>{text}</tool_call></think>\n\n<answer>{text}</answer> {text}"
        return rollouts_html(1, [[crafted(tmp_path, said, question=text)]], 1, str(tmp_path))

    return page


@pytest.mark.parametrize("hostile", HOSTILE)
@pytest.mark.parametrize(
    "page", [page_of_answers, notebook_cell, contact_sheet, "token_page", "report", "kept_rollouts"]
)
def test_hostile_text_adds_nothing_to_a_page_but_its_letters(page, hostile, request):
    render = request.getfixturevalue(page) if isinstance(page, str) else page
    expected, found = Skeleton(render(HARMLESS)), Skeleton(render(hostile))
    if page == "token_page":  # whose spans are as many as the text has tokens
        expected.parts, found.parts = (without_spans(item.parts) for item in (expected, found))
    assert found.parts == expected.parts
    assert not any(name.startswith("on") for part in found.parts if isinstance(part[1], list) for name in part[1])
    shown = hostile.replace("\0", "").replace("\ud800", "")
    assert shown in found.text.replace("\0", "").replace("\ufffd", "").replace("\ud800", "")


def without_spans(parts: list) -> list:
    spans = ("span", ["class"]), ("span", ["class", "title"]), ("/", "span")
    return [part for part in parts if part not in spans]
