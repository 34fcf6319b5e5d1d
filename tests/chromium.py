"""A headless Chromium that tests talk to over its DevTools protocol, through pipes (no port, no package), and a server of what it looks at."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import http.server
import json
import os
import select
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
#: seconds that a busy machine may take for anything
PATIENCE = 300.0
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--mute-audio", "--remote-debugging-pipe",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)  # fmt: skip


class Page:
    """A page of a Chromium; `call` is a method of the DevTools protocol."""

    def __init__(self, commands: int, answers: int) -> None:
        self._commands, self._answers, self._number = os.fdopen(commands, "wb", 0), os.fdopen(answers, "rb", 0), 0
        self._session: str | None = None
        self._rest = b""
        self._loaded = False
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The answer of a method; AssertionError when it is an error."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        self._commands.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._number:
                assert "error" not in answer, answer
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._answers], [], [], PATIENCE)[0], "Chromium says nothing"
            read = self._answers.read(1 << 16)
            assert read, "Chromium has ended"
            self._rest += read
        text, _, self._rest = self._rest.partition(b"\0")
        message = json.loads(text)
        self._loaded |= message.get("method") == "Page.loadEventFired"
        return message

    def evaluate(self, script: str) -> Any:
        """What an expression of JavaScript is, or the promise of it, as a JSON value."""
        found = self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def wait(self, script: str) -> Any:
        """The value of an expression once it is true."""
        end = time.monotonic() + PATIENCE
        while not (value := self.evaluate(script)):
            assert time.monotonic() < end, (
                f"{script} does not become true; the page says: {self.evaluate('document.body.innerText')}"
            )
            time.sleep(0.05)
        return value

    def open(self, url: str) -> None:
        """Go to a page, and wait until it is loaded."""
        self._loaded = False
        self.call("Page.navigate", url=url)
        while not self._loaded:
            self._read()

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file in an input."""
        document = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=document, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def press(self, key: str) -> None:
        """Press a key: Tab, Enter, Space."""
        code, text = {"Tab": (9, ""), "Enter": (13, "\r"), "Space": (32, " ")}[key]
        one = {"key": text if key == "Space" else key, "code": key, "windowsVirtualKeyCode": code}
        self.call("Input.dispatchKeyEvent", type="keyDown", text=text, **one)
        self.call("Input.dispatchKeyEvent", type="keyUp", **one)


@contextlib.contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a folder on a server of this machine, and what is asked of that."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *arguments: Any) -> None:
            asked.append(self.path)

        def end_headers(self) -> None:
            self.send_header("Cache-Control", "no-store")
            super().end_headers()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder)))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextlib.contextmanager
def chromium(folder: Path, *flags: str) -> Iterator[Page]:
    """A page of a new Chromium with further flags, which keeps its things in `folder`."""
    theirs_in, ours_out = os.pipe()
    ours_in, theirs_out = os.pipe()
    # it reads commands on 3 and answers on 4; numbers above are in nobody's way
    high = [fcntl.fcntl(handle, fcntl.F_DUPFD, 10) for handle in (theirs_in, theirs_out)]
    shell = ["bash", "-c", f'exec "$@" 3<&{high[0]} 4>&{high[1]}', "bash"]
    command = [*shell, str(CHROMIUM), *FLAGS, f"--user-data-dir={folder / 'profile'}", *flags]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, pass_fds=high, **quiet) as process:
        for handle in (theirs_in, theirs_out, *high):
            os.close(handle)
        try:
            yield Page(ours_out, ours_in)
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
