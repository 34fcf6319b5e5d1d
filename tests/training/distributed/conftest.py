from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

Together = Callable[[int, Callable[..., dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Together:
    """Run a function of a test file in so many processes that form one job; comes back what it returned in each."""

    def run(world: int, function: Callable[..., dict[str, Any]]) -> list[dict[str, Any]]:
        folder = tmp_path_factory.mktemp("job")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        file = function.__code__.co_filename
        command = [sys.executable, str(Path(__file__).with_name("process.py")), file, function.__name__, str(folder)]
        common = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        errors = [folder / f"{rank}.txt" for rank in range(world)]
        running = []
        for rank, log in enumerate(errors):
            with log.open("w") as file_handle:
                environment = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
                running.append(subprocess.Popen(command, env=environment, stderr=file_handle))
        while any(one.poll() is None for one in running) and not any(one.poll() for one in running):
            time.sleep(0.02)
        for one in running:  # where one has failed, the others would wait for it
            one.kill()
            one.wait()
        assert not any(one.returncode for one in running), "\n".join(log.read_text() for log in errors)
        return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(world)]

    return run
