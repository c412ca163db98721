"""An S3 API server (moto) on loopback in a separate process, for tests."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

BUCKET = "activations"


@dataclass(frozen=True, kw_only=True)
class S3Server:
    """A running server.

    Attributes:
        endpoint: URL, `http://127.0.0.1:<port>`.
        bucket: name of the bucket it holds.
        environment: variables under which obstore finds it.
    """

    endpoint: str
    bucket: str
    environment: dict[str, str]


@contextmanager
def s3_server() -> Iterator[S3Server]:
    """A server with one empty bucket; the process ends with the block."""
    process = subprocess.Popen(
        [sys.executable, os.path.abspath(__file__)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        endpoint = f"http://127.0.0.1:{int(process.stdout.readline())}"
        request = urllib.request.Request(f"{endpoint}/{BUCKET}", method="PUT")
        urllib.request.urlopen(request, timeout=30).close()
        yield S3Server(endpoint=endpoint, bucket=BUCKET, environment=_environment(endpoint))
    finally:
        process.stdin.close()
        process.wait(timeout=30)
        process.stdout.close()


def _environment(endpoint: str) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ALLOW_HTTP": "true",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "NO_PROXY": "127.0.0.1",
    }


def _serve() -> None:
    """Serves on a free port, prints the port on stdout, and exits when stdin is closed."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
    from werkzeug.serving import make_server

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = DomainDispatcherApplication(create_backend_app)
    lock = threading.Lock()

    # Conditional writes are atomic in S3; moto checks and then writes, so one request is served at a time.
    def one_at_a_time(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        with lock:
            return app(environ, start_response)

    server = make_server("127.0.0.1", 0, one_at_a_time, threaded=True, request_handler=MotoRequestHandler)
    print(server.server_address[1], flush=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    _serve()
