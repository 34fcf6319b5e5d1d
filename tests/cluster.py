"""A Ray cluster of this machine, for tests."""

from __future__ import annotations

import fcntl
import secrets
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

#: Ray keeps the first one that a process has
TOKEN = secrets.token_hex(32)


@contextmanager
def local_cluster(hook: Callable[[], None], gpus: int = 0) -> Iterator[str]:
    """Ray with two CPUs, and GPUs that are not there; each worker runs `hook` first. Yields its address."""
    import ray

    # one at a time: two that start in the same moment take each other's ports
    with open(Path(tempfile.gettempdir(), "asr-kd-tests-ray"), "w") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.flock(lock, fcntl.LOCK_EX)
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # workers that give way to all else would keep the tests waiting
        patch.setenv("RAY_AUTH_TOKEN", TOKEN)
        for attempt in range(3):  # Ray gives itself 30 seconds to start, which a busy machine may not have
            try:
                context = ray.init(
                    address="local", num_cpus=2, num_gpus=gpus, include_dashboard=False, log_to_driver=False,
                    object_store_memory=100 * 2**20, runtime_env={"worker_process_setup_hook": hook},
                )  # fmt: skip
                break
            except Exception:
                ray.shutdown()
                if attempt == 2:
                    raise
        yield context.address_info["gcs_address"]
        ray.shutdown()
