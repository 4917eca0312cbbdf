"""The web page over HTTP: what it answers, what it refuses, and that it gives nothing of the machine away."""

from __future__ import annotations

import os
import re
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.parse
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest
from gradio_client import Client, handle_file
from gradio_client.client import Job
from PIL import Image
from web_server import SCRIPT, Served, free_port, serving

import demo_world
import web_demo
from config import SettingsError, WebConfig
from web_page import LONGEST_QUESTION, Allowance

ROOT = Path(web_demo.__file__).parent
QUESTION = "Which stripes are on the red square?"
SHOWN, THINKING, END, SAVE = range(4)  # what the page's `ask` gives


@pytest.fixture(scope="module")
def server(base_folder):
    with serving(str(base_folder), max_upload_mb=1) as served:
        yield served


@pytest.fixture(autouse=True)
def as_it_was(request):
    yield
    if "server" in request.fixturenames:
        server = request.getfixturevalue("server")
        server.script, server.pause = SCRIPT, 0.0


@pytest.fixture(scope="module")
def client(server):
    return Client(server.url, verbose=False, analytics_enabled=False)


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "picture.png"
    Image.fromarray(demo_world.draw_picture(3, 0).pixels).save(path)
    return path


def updates(job: Job) -> list[list]:
    """The values that the page was given, update by update; None where one stays as it is."""
    return [
        [value.get("value") if isinstance(value, dict) else value for value in output[: SAVE + 1]]
        for output in job.outputs()
    ]


def ask(client: Client, picture: Path | str, question: str = QUESTION) -> list:
    """What the page shows at the end."""
    job = client.submit(handle_file(picture), question, api_name="/ask")
    job.result(timeout=60)
    return [
        next((value for value in reversed(values) if value is not None), None)
        for values in zip(*updates(job), strict=True)
    ]


def raw(server: Served, picture: dict | None, question: object = QUESTION) -> str:
    """`ask` by hand, with any values: everything that the server sends back."""
    start = httpx.post(f"{server.url}gradio_api/call/ask", json={"data": [picture, question]})
    assert start.status_code == 200, start.text
    with httpx.stream("GET", f"{server.url}gradio_api/call/ask/{start.json()['event_id']}", timeout=60) as reply:
        return reply.read().decode()


def named(path: object) -> dict:
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


def test_an_answer_comes_with_boxes_crops_and_a_trace(server, client, picture):
    shown = ask(client, picture)
    assert len(re.findall('class="box"', shown[SHOWN])) == 1
    thinking = "".join(shown[THINKING])
    assert thinking.count("<img") == 1
    assert re.findall(r"<b style=[^>]*>(\d)</b>", thinking) == ["1", "2"]
    assert "inverted" in thinking
    assert thinking.index("<img") < thinking.index("shows &amp; tells")
    assert "rising" in shown[END]
    assert "rising" in Path(shown[SAVE]).read_text()


def test_text_and_boxes_appear_as_they_are_written(server, client, picture):
    server.pause = 0.02
    job = client.submit(handle_file(picture), QUESTION, api_name="/ask")
    job.result(timeout=60)
    texts = ["".join(values[THINKING]) for values in updates(job) if values[THINKING]]
    words = [len(re.sub("<[^>]+>", "", text)) for text in texts]
    assert len(set(words)) > 5
    assert words[0] < words[-1] / 2
    assert [text.count("<img") for text in texts][:: len(texts) - 1] == [0, 1]
    boxes = [values[SHOWN].count('class="box"') for values in updates(job) if values[SHOWN]]
    assert boxes == [0, 1, 1], "before the first call, and after each of the two"


HOSTILE = "<script>hacked=1</script><img src=x onerror=hacked=1>${hacked=1}{{hacked}}`"


def test_text_of_model_and_user_is_escaped_everywhere(server, client, picture):
    body = f"<tool_call>{HOSTILE}</tool_call>"
    server.script = f"<think>\n{HOSTILE} {body}</think>\n\n<answer>{HOSTILE}</answer> {body}{HOSTILE}<|im_end|>"
    shown = ask(client, picture, HOSTILE)
    page = Path(shown[SAVE]).read_text()
    for html in ("".join(shown[THINKING]), shown[END], shown[SHOWN], page):
        assert "<script" not in html
        assert "<img src=x" not in html
    assert page.count("&lt;script&gt;") == 7, "question, thought, call, answer, it again, second call, rest"
    assert "&lt;script&gt;" in shown[END]
    refused = ask(client, picture, HOSTILE + "<|image_pad|>")
    assert "reserved token" in refused[END]


@pytest.mark.parametrize(
    "path", ["/etc/passwd", "{root}/README.md", "{root}/web_demo.py", "{model}/config.json", "{base}/x"]
)
def test_no_file_of_the_machine_is_served_or_read(server, base_folder, tmp_path, path):
    (tmp_path / "x").write_text("secret")
    path = path.format(root=ROOT, model=base_folder, base=tmp_path)
    for prefix in ("gradio_api/file=", "file=", "gradio_api/file/", "gradio_api/stream/", "static/", "assets/"):
        for written in (path, urllib.parse.quote(path, safe=""), "../../../../.." + path, "%2e%2e/" * 9 + path[1:]):
            reply = httpx.get(f"{server.url}{prefix}{written}")
            assert reply.status_code in (307, 400, 401, 403, 404, 405), (reply.status_code, prefix, written)
    reply = raw(server, named(path))
    assert "event: error" in reply
    assert "event: generating" not in reply
    assert not re.search("root:x:|secret|unreadable", reply)


def test_no_address_is_fetched_for_a_client(server):
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

    inner = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=inner.serve_forever, args=(0.01,), daemon=True).start()
    address = f"http://127.0.0.1:{inner.server_port}/picture.png"
    assert "Addresses are not fetched" in raw(server, named(address))
    for value in ({"path": None, "url": address}, {**named("x.png"), "url": address}):
        assert "rising" not in raw(server, value)
    inner.shutdown()
    inner.server_close()
    assert asked == []


def test_too_large_a_request_is_refused_before_it_is_read(server):
    upload = f"{server.url}gradio_api/upload"
    assert httpx.post(upload, files={"files": ("a.png", b"0" * (3 * 2**20))}).status_code == 413
    assert httpx.post(upload, files={"files": ("a.png", b"0" * (2**20 + 1))}).status_code in (400, 413)
    assert httpx.post(upload, content=iter([b"0" * 9])).status_code == 411
    assert httpx.post(f"{server.url}gradio_api/queue/join", content=b"0" * (3 * 2**20)).status_code == 413
    assert httpx.post(upload, files={"files": ("a.png", b"0")}).status_code == 200


def bomb(side: int) -> bytes:
    """A small PNG that claims to be `side` pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(2**20))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (bomb(30_000), "exceeds limit"),
        (b"no picture", "unreadable image (picture.png): cannot identify"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "unreadable image (picture.png)"),
    ],
    ids=["bomb", "text", "svg"],
)
def test_what_is_no_picture_is_refused_in_a_sentence(client, tmp_path, data, message):
    (tmp_path / "picture.png").write_bytes(data)
    end = ask(client, tmp_path / "picture.png")[END]
    assert message in end
    assert "/" not in re.sub("</?[^>]+>", "", end).replace("PIL", ""), "a path of the server is told"


def test_questions_that_cannot_be_asked_are_refused_in_a_sentence(server, client, picture):
    assert "Write a question first." in ask(client, picture, " ")[END]
    assert f"{LONGEST_QUESTION} are allowed" in ask(client, picture, "a" * (LONGEST_QUESTION + 1))[END]
    assert "Upload a picture first." in raw(server, None)
    assert "Write a question first." in raw(server, None, ["no text"]) or "Upload" in raw(server, None, ["no text"])


def test_too_many_questions_are_told_when_to_try_again(base_folder, picture):
    with serving(str(base_folder), questions_per_minute=2) as served:
        client = Client(served.url, verbose=False, analytics_enabled=False)
        answers = [ask(client, picture)[END] for _ in range(2)]
        assert all("rising" in answer for answer in answers)
        upload = httpx.post(f"{served.url}gradio_api/upload", files={"files": ("a.png", b"0")})
        assert upload.status_code == 429
        assert 0 < int(upload.headers["Retry-After"]) <= 60
        assert "try again in" in upload.text
        served.steps = 0
        uploaded = {"path": str(next(_cached(served, "picture.png"))), "meta": {"_type": "gradio.FileData"}}
        assert re.search(r"Too many questions: try again in \d+ seconds", raw(served, uploaded))
        assert served.steps == 0


def test_no_more_than_max_queue_questions_wait(base_folder, picture):
    with serving(str(base_folder), max_queue=1) as served:
        client = Client(served.url, verbose=False, analytics_enabled=False)
        served.pause = 0.05
        first = client.submit(handle_file(picture), QUESTION, api_name="/ask")
        _until(lambda: served.steps > 0)
        second = client.submit(handle_file(picture), QUESTION, api_name="/ask")
        time.sleep(0.5)
        with pytest.raises(Exception, match=r"(?i)queue is full"):
            client.predict(handle_file(picture), QUESTION, api_name="/ask")
        served.pause = 0.0
        assert first.result(timeout=60)
        assert second.result(timeout=60)


def _cached(served: Served, name: str):
    return Path(os.environ["GRADIO_TEMP_DIR"]).rglob(name)


def test_an_allowance_counts_each_client_by_itself_and_forgets():
    allowance = Allowance(2, period=10)
    assert [allowance.wait("a", now) for now in (0, 1, 2)] == [0, 0, 8]
    assert allowance.wait("b", 2) == 0
    assert allowance.wait("a", 10) == 0, "the first has expired"
    assert allowance.wait("a", 10.5) == pytest.approx(0.5)
    assert allowance.wait("c", 40) == 0
    assert set(allowance.taken) == {"c"}, "what has expired takes no memory"


def test_a_question_that_is_stopped_ends_its_work(server, client, picture):
    server.pause, server.steps = 0.05, 0
    job = client.submit(handle_file(picture), QUESTION, api_name="/ask")
    _until(lambda: server.steps > 3)
    job.cancel()
    time.sleep(0.5)
    done = server.steps
    time.sleep(0.5)
    assert server.steps == done
    server.pause = 0.0
    assert "rising" in ask(client, picture)[END], "and the next one is answered"


def _until(condition) -> None:
    for _ in range(200):
        if condition():
            return
        time.sleep(0.05)
    pytest.fail("it never came")


def test_it_listens_on_this_machine_alone(server):
    port = urllib.parse.urlsplit(server.url).port
    with socket.socket() as other, pytest.raises(ConnectionRefusedError):
        other.connect(("127.0.0.2", port))  # reaches what listens on all addresses


def test_nothing_is_sent_to_any_other_host(base_folder, picture, monkeypatch):
    reached, connect = set(), socket.socket.connect

    def noted(self, address):
        reached.add(address[0] if isinstance(address, tuple) else address)
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")
    with serving(str(base_folder)) as served:
        ask(Client(served.url, verbose=False, analytics_enabled=False), picture)
    assert {address for address in reached if address not in ("127.0.0.1", "localhost", "::1")} == set()


def test_uploads_and_traces_are_gone_when_it_ends(base_folder, picture):
    with serving(str(base_folder)) as served:
        ask(Client(served.url, verbose=False, analytics_enabled=False), picture)
        folder = Path(os.environ["GRADIO_TEMP_DIR"])
        assert {path.name for path in folder.rglob("*.*")} >= {"picture.png", "answer.html"}
    assert not folder.exists()


def test_the_command_serves_until_it_is_ended_and_leaves_nothing(base_folder, tmp_path, picture):
    command = [sys.executable, "web_demo.py", "--model_path", str(base_folder), "--port", str(free_port())]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        url = process.stdout.readline().split()[0]
        ask(Client(url, verbose=False, analytics_enabled=False), picture)
        assert list(tmp_path.glob("web_demo-*"))
        process.terminate()
        assert process.wait(30) == 0
    assert not list(tmp_path.glob("web_demo-*"))


def test_a_port_that_is_taken_is_named(base_folder, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SystemExit) as stop:
            web_demo.main(["--model_path", str(base_folder), "--port", str(port)])
    assert stop.value.code == 2
    assert f"port {port} of 127.0.0.1 is not free" in capsys.readouterr().err


def test_a_host_that_is_none_here_is_named():
    with pytest.raises(SettingsError, match=r"port 7860 of host\.invalid cannot be listened on: "):
        web_demo._require_free("host.invalid", 7860)


def test_without_gradio_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "web_page", raising=False)
    with pytest.raises(SystemExit) as stop:
        web_demo.main(["--model_path", "somewhere"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.endswith("pip install -r requirements-web.txt\n")


@pytest.mark.parametrize("setting", [{"port": 0}, {"max_upload_mb": 0}, {"max_queue": 0}, {"questions_per_minute": 0}])
def test_settings_that_cannot_be_are_refused(setting):
    with pytest.raises(SettingsError, match=f"{next(iter(setting))} is 0, but it must be"):
        WebConfig(**setting)
