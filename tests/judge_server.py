"""A real HTTP server on this machine in the place of a judging model; the `serve` fixture starts and stops it."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server(ThreadingHTTPServer):
    """A local endpoint; `behave(handler, body)` writes one response."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behave: Callable, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.behave, self.seen, self.running, self.most = behave, [], 0, 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def start(self) -> Server:
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def die(self) -> None:
        """From now on connections are refused; those that are open end without a word."""
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that does not wait for the end is what these tests are about


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        with self.server.lock:
            self.server.seen.append((self.path, dict(self.headers), body))
            self.server.running += 1
            self.server.most = max(self.server.most, self.server.running)
        try:
            self.server.behave(self, body)
        finally:
            with self.server.lock:
                self.server.running -= 1

    do_GET = do_POST

    def send(self, content: bytes, status: int = 200, **headers: str):
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


def completion(text, **usage) -> bytes:
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": text}}], **usage}).encode()


def knowing(handler: Handler, body: dict) -> None:
    """A judge that knows synonyms."""
    claim = json.loads(body["messages"][1]["content"])
    right = {claim["expected"], claim["answer"]} <= {"sofa", "couch"}
    handler.send(completion("Right." if right else "wrong", usage={"total_tokens": 50}))
