"""Workers on a Ray cluster: actors, which end with the process that started them."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from asr_kd.errors import UserError
from asr_kd.shards.pool import LOST, Crew, Worker

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError:
    raise UserError("engine: ray is not installed; run `pip install 'asr-kd[ray]'`") from None

#: seconds to wait for an answer from a cluster's address
PATIENCE = 10.0


class RaySettings(Protocol):
    """Settings of a job with this engine."""

    @property
    def ray_address(self) -> str | None: ...
    @property
    def worker_cpus(self) -> int: ...


class RayCrew(Crew):
    """Actors of a cluster, which is connected to when the first is started.

    Ray manages the machines: a worker without room waits, which tells Ray's autoscaler to add a machine. A UserError when the
    cluster does not answer, or Ray on this machine has no room for one worker.

    Args:
        kind, arguments: of the workers; an argument is sent to each machine once.
        gpus: share of a GPU that a worker takes up.
        at_once: calls of a worker that run side by side; more wait there for their turn.
    """

    def __init__(
        self, settings: RaySettings, kind: type[Worker], arguments: tuple[Any, ...], gpus: float = 0.0, at_once: int = 1
    ) -> None:
        self._settings, self._kind, self._arguments = settings, kind, arguments
        self._gpus, self._at_once = gpus, at_once
        self._make: Any = None
        self._mine = False

    def start(self) -> tuple[Any, Any]:
        if self._make is None:
            self._mine = _connect(self._settings, self._gpus)
            arguments = [ray.put(one) for one in self._arguments]
            actor = ray.remote(self._kind).options(
                num_cpus=self._settings.worker_cpus, num_gpus=self._gpus, max_concurrency=self._at_once
            )
            self._make = lambda: actor.remote(*arguments)
        worker = self._make()
        return worker, worker.load.remote()

    def give(self, worker: Any, item: Any) -> Any:
        return worker.do.remote(item)

    def over(self, calls: Sequence[Any], seconds: float) -> Iterator[tuple[Any, Any]]:
        ray.wait(list(calls), timeout=seconds)
        for call in ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]:
            try:
                result = ray.get(call)
            except RayTaskError as error:
                if isinstance(error.cause, UserError | OSError):
                    raise error.cause from None  # as from a worker of this machine, without Ray's traceback
                raise
            except RayError:
                result = LOST
            yield call, result

    def end(self, worker: Any) -> None:
        with contextlib.suppress(RayError):
            ray.kill(worker)

    def close(self) -> None:
        if self._mine:
            ray.shutdown()


def _connect(settings: RaySettings, gpus: float) -> bool:
    """Connect to the cluster, if not connected; returns whether we must disconnect at the end."""
    if ray.is_initialized():
        return False
    address = settings.ray_address or os.environ.get("RAY_ADDRESS") or "local"
    if address not in ("local", "auto"):
        _, _, server = address.rpartition("://")
        host, _, port = server.rpartition(":")
        try:  # Ray itself would try for many minutes
            socket.create_connection((host, int(port)), PATIENCE).close()
        except (OSError, ValueError, OverflowError) as error:
            raise UserError(
                f"ray_address: nobody answers at {address} ({error}); check it, or start Ray there"
            ) from None
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # send no usage statistics
    asked_to_end = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:  # Ray raises many types, a bare Exception among them
        raise UserError(
            f"ray_address: no connection to Ray at {address} ({error}); check it, start Ray there, or set "
            "RAY_AUTH_MODE=token where the cluster wants a token"
        ) from None
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, asked_to_end)  # Ray's handler would print a stack and end the process at once
    if address == "local":
        there = ray.cluster_resources()
        for kind, wanted in (("CPU", settings.worker_cpus), ("GPU", gpus)):
            if wanted > there.get(kind, 0):
                ray.shutdown()
                raise UserError(
                    f"worker_{kind.lower()}s: a worker wants {wanted}, this machine has {there.get(kind, 0):g}; "
                    "lower it, or set ray_address to a cluster"
                )
    return True
