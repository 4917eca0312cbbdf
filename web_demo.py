"""A web page to ask a trained model about pictures, and to watch it think and look.

    pip install -r requirements-web.txt
    python web_demo.py --model_path outputs/grpo/final_model

It listens on this machine alone, serves no file of it, asks no other host for anything, and bounds the size of uploads,
the length of the queue and the questions of each client.
"""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import tempfile
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from command_line import CommandParser, add_flags
from config import SettingsError, WebConfig, build

if TYPE_CHECKING:
    from collections.abc import Iterator

    from inference import QwenVLInference
    from web_page import Allowance

MARGIN = 2**20  # bytes that a request may have over its picture
OWN_FLAGS = ("parse_tool_calls", "batch_size")  # of InferenceConfig; the page decides them


class Bounds:
    """Refuses requests that are too large, or uploads that come too often, before anything of them is read."""

    def __init__(self, app: Any, largest: int, uploads: Allowance) -> None:
        """largest: bytes of a request."""
        self.app, self.largest, self.uploads = app, largest, uploads

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["method"] != "GET" else None
        if refusal is None:
            await self.app(scope, receive, send)
            return
        from starlette.responses import PlainTextResponse

        status, text, headers = refusal
        await PlainTextResponse(text, status, headers)(scope, receive, send)

    def _refusal(self, scope: dict) -> tuple[int, str, dict[str, str]] | None:
        headers = dict(scope["headers"])
        length = headers.get(b"content-length", b"")
        if b"transfer-encoding" in headers:
            return 411, "Say how long the request is (Content-Length).", {}
        if length.isdigit() and int(length) > self.largest:
            return 413, f"At most {self.largest // 2**20} MB may be sent.", {}
        if scope["path"].endswith("/upload"):
            wait = self.uploads.wait(scope["client"][0])
            if wait:
                return 429, f"Too many uploads: try again in {wait:.0f} seconds.", {"Retry-After": f"{wait:.0f}"}
        return None


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    """Variables of the environment, set for the time of the context."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def import_page() -> Any:
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported
    try:
        import web_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise SettingsError("the web page needs Gradio: pip install -r requirements-web.txt") from None
    return web_page


@contextmanager
def served(inference: QwenVLInference, config: WebConfig) -> Iterator[str]:
    """Serve the page as long as the context lasts; gives its address. Uploads and traces are deleted with it."""
    with (
        tempfile.TemporaryDirectory(prefix="web_demo-") as folder,
        # A user's own settings of Gradio must open no paths.
        _environment(GRADIO_TEMP_DIR=folder, GRADIO_ALLOWED_PATHS="", GRADIO_ANALYTICS_ENABLED="False"),
    ):
        web_page = import_page()
        from starlette.middleware import Middleware

        _require_free(config.host, config.port)
        page = web_page.Page(inference, config, folder)
        largest = config.max_upload_mb * 2**20
        bounds = Middleware(Bounds, largest=largest + MARGIN, uploads=web_page.Allowance(config.questions_per_minute))
        _, local, public = page.blocks.launch(
            server_name=config.host,
            server_port=config.port,
            share=config.share,
            max_file_size=largest,
            allowed_paths=[],
            app_kwargs={"middleware": [bounds], "docs_url": None, "redoc_url": None},
            theme=web_page.theme(),
            css=web_page.style(),
            footer_links=[],
            state_session_capacity=100,  # each keeps the pictures of its page
            prevent_thread_lock=True,
            inbrowser=False,
            quiet=True,
            show_error=False,
            enable_monitoring=False,
            run_history=False,
            mcp_server=False,
            ssr_mode=False,
            pwa=False,
        )
        try:
            yield public or local
        finally:
            page.blocks.close(verbose=False)


def _require_free(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            is_taken = error.errno == errno.EADDRINUSE
            reason = "is not free: give --port" if is_taken else f"cannot be listened on: {error.strerror}"
            raise SettingsError(f"port {port} of {host} {reason}") from None


def _parser() -> CommandParser:
    parser = CommandParser(description=(__doc__ or "").split("\n")[0])
    add_flags(parser, WebConfig, "model, sampling and server", omit=OWN_FLAGS)
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    try:
        config = build(WebConfig, vars(parser.parse_args(argv)))
        import_page()
        from inference import QwenVLInference

        with served(QwenVLInference(config), config) as address:
            print(f"{address} (Ctrl-C ends it)", flush=True)
            if config.share or config.host not in ("127.0.0.1", "localhost", "::1"):
                print("Anyone who reaches this address can ask; there is no password.", flush=True)
            signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C, so that what was uploaded is deleted
            threading.Event().wait()
    except (SettingsError, ValueError) as error:
        parser.exit(2, f"web_demo.py: {error}\n")
    except KeyboardInterrupt:
        print()


if __name__ == "__main__":
    main(sys.argv[1:])
