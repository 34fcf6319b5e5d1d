from __future__ import annotations

import contextlib
import http.client
import os
import socket
import struct
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from asr_kd.objects import ObjectPath

# No test depends on how fast a machine is, or on how busy; where CI is set, every run tries the same examples.
hypothesis.settings.register_profile(
    "anywhere",
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
    derandomize=bool(os.environ.get("CI")),
    database=None if os.environ.get("CI") else hypothesis.settings.default.database,
)
hypothesis.settings.load_profile("anywhere")

#: what `make quick` leaves out (as `slow`), by the beginning of its name below this folder: whole jobs, processes, clusters, disks that fail
SLOW = (
    "evaluation/test_browser", "evaluation/test_faults", "evaluation/test_job", "evaluation/test_sharing",
    "export/test_job.py::test_the_same", "export/test_streaming.py::test_a_minute", "export/test_streaming.py::test_a_long",
    "labeling/", "models/outside/test_huggingface", "pipelines/", "test_end_to_end", "test_fuzz", "test_pipeline", "test_readmes.py::test_what_is_shown", "test_stores", "training/distributed/", "training/test_feed",
    "training/test_codistillation.py::test_two", "training/test_families", "training/test_codistillation.py::test_whoever", "training/test_mutual.py::test_two",
    "training/test_features.py::test_two", "training/test_generated.py::test_two", "training/test_generated.py::test_processes", "training/test_self.py::test_two", "training/test_relations.py::test_two",
    "training/test_knowledge", "training/test_quantised.py::test_processes", "training/test_processes", "training/test_stored", "training/test_trainer", "shards/test_prepare.py::test_killed", "shards/test_pool.py::test_processes", "shards/test_cut_sources", "shards/test_cutting.py::test_killed", "shards/test_cutting.py::test_workers",
    "shards/test_ranges.py::test_memory", "shards/test_ray_crew", "shards/test_sharing", "shards/test_stream",
)  # fmt: skip
NEEDS = "is not installed; `pip install -r requirements-dev.lock` does it"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if f"{item.path.relative_to(Path(__file__).parent)}::{item.name}".startswith(SLOW):
            item.add_marker(pytest.mark.slow)


#: an S3 server that answers one request at a time (so that its conditional puts are atomic) until its input ends
SERVER = """
import sys, threading
from moto.server import DomainDispatcherApplication, ThreadedMotoServer
alone, call = threading.Lock(), DomainDispatcherApplication.__call__
def one_by_one(*arguments):
    with alone:
        return call(*arguments)
DomainDispatcherApplication.__call__ = one_by_one
server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
"""
#: what goes wrong with a request: a status is answered, or the server will `cut` the upload, `cut the answer` or `lose the
#: answer`; where it is a function, this is called when the request was done, and the answer is lost
Fault = int | str | Callable[[], None] | None


@dataclass
class S3:
    """A bucket on a real S3 server, seen through a proxy on the loopback that can fail.

    Attributes:
        fault: (method, path) → what goes wrong with this request; None: nothing.
        requests: method and path of all so far.
    """

    url: str
    fault: Callable[[str, str], Fault] = lambda *_: None
    requests: list[tuple[str, str]] = field(default_factory=list)

    def failing(self, count: int, fault: Fault, method: str = "", name: str = "") -> None:
        """Let this go wrong with the next `count` requests of this method for a path that holds `name`."""
        left = iter(range(count))

        def chosen(asked: str, path: str) -> Fault:
            return fault if asked.startswith(method) and name in path and next(left, None) is not None else None

        self.fault = chosen

    def upload(self, folder: Path | str, name: str) -> str:
        """Copy a local folder into the bucket; returns its URL."""
        for path in sorted(Path(folder).rglob("*")):
            if path.is_file():
                (ObjectPath.parse(self.url) / f"{name}/{path.relative_to(folder)}").write(path.read_bytes())
        return f"{self.url}/{name}"

    def content(self, url: str) -> dict[str, bytes]:
        """Every object of a folder of the bucket, also those below."""
        import s3fs

        store = s3fs.S3FileSystem(use_listings_cache=False)
        return {path.removeprefix(url.removeprefix("s3://") + "/"): store.cat_file(path) for path in store.find(url)}


@pytest.fixture(scope="session")
def s3_port() -> Iterator[int]:
    pytest.importorskip("moto.server", reason=f"moto, an S3 server, {NEEDS}")
    with subprocess.Popen(
        [sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as process:  # fmt: skip
        assert process.stdout and process.stdin
        yield int(process.stdout.readline())
        process.stdin.close()


@pytest.fixture
def s3(s3_port: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[S3]:
    """An empty bucket; this process and its children find it by `s3.url`."""
    s3fs = pytest.importorskip("s3fs", reason=f"s3fs {NEEDS}")
    bucket = f"b{uuid.uuid4().hex}"
    s3 = S3(f"s3://{bucket}")
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", s3_port)) as connection:
        connection.request("PUT", f"/{bucket}")
        assert connection.getresponse().status == 200
    server = ThreadingHTTPServer(("127.0.0.1", 0), _proxy(s3, s3_port))
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client was killed
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "testing")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    s3fs.S3FileSystem.clear_instance_cache()
    yield s3
    s3fs.S3FileSystem.clear_instance_cache()
    server.shutdown()
    server.server_close()
    thread.join()


def _proxy(s3: S3, port: int) -> type[BaseHTTPRequestHandler]:
    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            s3.requests.append((self.command, self.path))
            fault = s3.fault(self.command, self.path)
            length = int(self.headers.get("Content-Length", 0))
            if fault == "cut":
                self.rfile.read(length // 2)
                return self.reset()
            body = self.rfile.read(length)
            if len(body) < length:  # the client is gone
                return self.reset()
            if isinstance(fault, int):
                return self.answer(fault, {}, b"<Error><Code>Trouble</Code><Message>out of order</Message></Error>")
            with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port)) as connection:
                connection.request(self.command, self.path, body, dict(self.headers))
                response = connection.getresponse()
                data = response.read()
            if callable(fault):
                fault()
            if callable(fault) or fault == "lose the answer":
                return self.reset()
            if fault == "cut the answer":
                self.answer(response.status, dict(response.headers), data[: len(data) // 2], len(data))
                return self.reset()
            return self.answer(response.status, dict(response.headers), data)

        def answer(self, status: int, headers: dict[str, str], body: bytes, length: int | None = None) -> None:
            self.send_response(status)
            for name, value in headers.items():
                if name.lower() not in ("connection", "content-length", "date", "server", "transfer-encoding"):
                    self.send_header(name, value)
            of_head = headers.get("Content-Length", "0") if self.command == "HEAD" else None
            self.send_header("Content-Length", of_head or str(len(body) if length is None else length))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def reset(self) -> None:
            self.wfile.flush()
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True

        do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

        def log_message(self, format: str, *arguments: Any) -> None:
            pass

    return Proxy


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests are tried again at once."""
    monkeypatch.setattr("asr_kd.objects.PAUSE", 0.001)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of how many utterances torch has made the features, batch by batch."""
    from asr_kd.audio.batched import BatchedFrontend  # imports torch, which few tests need

    found: list[int] = []
    real = BatchedFrontend.forward

    def forward(self: Any, waveforms: Any, lengths: Any) -> Any:
        found.append(len(lengths))
        return real(self, waveforms, lengths)

    monkeypatch.setattr(BatchedFrontend, "forward", forward)
    return found
