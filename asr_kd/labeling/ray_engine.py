"""The labelling engine of a cluster: a pool of Ray actors, each with the teacher, and a driver that assigns shards to them.

The driver holds the leases, counts, and writes the report; the actors end with it. A dead actor is replaced and its shards
are assigned again: the output does not depend on which worker made it.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from asr_kd.allocator import keep_freed_memory
from asr_kd.errors import UserError
from asr_kd.files import place
from asr_kd.labeling.hidden import quantiser_of
from asr_kd.labeling.job import Engine
from asr_kd.labeling.settings import LabelSettings
from asr_kd.labeling.shard import label_shard, load_shard
from asr_kd.models.acoustic import load_checkpoint, pick_device
from asr_kd.progress import Progress
from asr_kd.shards.index import ShardInfo
from asr_kd.targets.store import TargetMetadata, read_metadata

try:
    import ray
    from ray.exceptions import RayError, RayTaskError
except ImportError:
    raise UserError("engine: ray is not installed; run `pip install 'asr-kd[ray]'`") from None

#: shards that a worker has at a time: one being published, one in the network, one being decoded
IN_FLIGHT = 3
#: workers that may die over one shard, or over loading the teacher, before the job fails
ATTEMPTS = 3
#: seconds between updates of the progress when nothing happens
TICK = 5.0
#: seconds to wait for an answer from a cluster's address
PATIENCE = 10.0


class Labeler:
    """The actor: a teacher, checked by its fingerprint, and up to `IN_FLIGHT` calls: one decodes, one runs the network."""

    def __init__(self, settings: LabelSettings, fingerprint: str, transcripts: dict[str, str] | None) -> None:
        self.settings, self.fingerprint, self.transcripts = settings, fingerprint, transcripts
        self.decoding, self.network = threading.Lock(), threading.Lock()
        self.behind = ThreadPoolExecutor(1)

    def load(self) -> str:
        """Load the teacher; returns the device that it is on."""
        keep_freed_memory()
        torch.set_num_threads(self.settings.threads)
        device = pick_device(self.settings.device)
        if self.settings.worker_gpus and self.settings.device == "auto" and device.type == "cpu":
            raise UserError(
                f"worker_gpus: PyTorch sees no GPU on {socket.gethostname()}, where a worker was given one; fix its "
                "driver, or set worker_gpus=0"
            )
        self.teacher = load_checkpoint(self.settings.teacher, device)
        if self.teacher.fingerprint != self.fingerprint:
            raise UserError(
                f"{self.settings.teacher}: is teacher {self.teacher.fingerprint} on {socket.gethostname()} and "
                f"{self.fingerprint} for the driver; give all machines the same folder"
            )
        self.quantiser = quantiser_of(self.settings)
        return str(device)

    def label(self, info: ShardInfo) -> TargetMetadata:
        """Label a shard and return what was published."""
        path = place(self.settings.output) / info.name
        if path.exists():  # made by a worker that died before it returned
            return read_metadata(path)
        with self.decoding:
            loaded = load_shard(self.settings, self.teacher, self.transcripts, info)
        with self.network:
            unseen = Progress("label", None, "", show=False)  # the driver counts whole shards
            published = label_shard(self.settings, self.teacher, loaded, unseen, self.behind, None, self.quantiser)
        return published.result()[1]


@dataclass(eq=False)
class _Worker:
    """The driver's side of an actor.

    Attributes:
        loading: the call that loads the teacher.
        since: when it was ready; None before.
        shards: its calls under way.
        suspect: whether its only shard is one that other workers died over.
    """

    actor: Any
    loading: Any
    since: float | None = None
    shards: dict[Any, ShardInfo] = field(default_factory=dict)
    suspect: bool = False
    ended: bool = False


class RayEngine(Engine):
    """A pool of `min_workers` to `max_workers` workers: it grows while shards wait, and ends idle workers.

    Ray manages the machines: a worker without room waits, which tells Ray's autoscaler to add a machine. A UserError when the
    cluster does not answer, or Ray on this machine has no room for one worker.
    """

    def __init__(self, settings: LabelSettings, *common: Any) -> None:
        # a worker has another working directory
        folders = {name: _absolute(getattr(settings, name)) for name in ("teacher", "audio", "output")}
        super().__init__(settings.model_copy(update=folders), *common)
        self._workers: list[_Worker] = []
        self._strikes: Counter[str] = Counter()
        self._failed_starts = 0
        self._worked = 0.0
        self._make: Callable[[], Any] | None = None
        self._mine = False

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            self._end(worker)
        if self._mine:
            ray.shutdown()

    def workers(self, seconds: float) -> float:
        return self._worked / seconds

    def run(self, free: Iterator[ShardInfo]) -> Iterator[tuple[ShardInfo, TargetMetadata]]:
        """As of `Engine`; a worker's UserError is raised here, and one when a shard, or the teacher, kills `ATTEMPTS` workers."""
        again: list[ShardInfo] = []  # of workers that died; each goes to a worker alone, to find the one that kills
        following = next(free, None)
        while following or again or any(worker.shards for worker in self._workers):
            for room in range(IN_FLIGHT):  # the least busy first
                for worker in self._workers:
                    if worker.since is None or worker.suspect or len(worker.shards) != room:
                        continue
                    if again and not worker.shards:
                        self._give(worker, again.pop(), suspect=True)
                    elif following:
                        self._give(worker, following)
                        following = next(free, None)
            self._resize(bool(following or again))
            yield from self._finished(again)

    def _finished(self, again: list[ShardInfo]) -> Iterator[tuple[ShardInfo, TargetMetadata]]:
        """Wait for results and yield the finished shards; shards to do again are added to `again`."""
        waiting = {ref: worker for worker in self._workers for ref in worker.shards}
        waiting |= {worker.loading: worker for worker in self._workers if worker.since is None and not worker.ended}
        ray.wait(list(waiting), timeout=TICK)
        for ref in ray.wait(list(waiting), num_returns=len(waiting), timeout=0)[0]:
            worker = waiting[ref]
            info = worker.shards.pop(ref, None)
            try:
                result = ray.get(ref)
            except RayTaskError as error:
                if isinstance(error.cause, UserError | OSError):
                    raise error.cause from None  # as from the local engine, without Ray's traceback
                raise
            except RayError:
                self._lose(worker, info, again)
                continue
            if info is None:
                worker.since, self._failed_starts = time.perf_counter(), 0
                self.devices.add(result)
            else:
                worker.suspect = False
                self._strikes.pop(info.name, None)
                statistics = result.statistics
                self.progress.advance(statistics.utterances + len(result.quarantined), statistics.audio_seconds)
                yield info, result
        self._workers = [worker for worker in self._workers if worker.shards or not worker.ended]
        ready = sum(worker.since is not None for worker in self._workers)
        room = f"{self.settings.worker_cpus} CPUs and {self.settings.worker_gpus} GPUs"
        self.progress.advance(0, note=f"workers: {ready}" if ready else f"waiting for a worker with {room}")

    def _lose(self, worker: _Worker, info: ShardInfo | None, again: list[ShardInfo]) -> None:
        """Count the shard, or the start, at which a worker died; `_resize` replaces it."""
        if not worker.ended:
            self._end(worker)
            print("label: a worker was lost; its shards are given out again", file=sys.stderr)
        if info is None:
            self._failed_starts += 1
            if self._failed_starts == ATTEMPTS:
                raise UserError(
                    f"{self.settings.teacher}: {ATTEMPTS} workers died while they loaded this teacher; see Ray's logs, "
                    "and if memory was short, give a worker more of a machine (worker_cpus, worker_gpus)"
                )
            return
        output = place(self.settings.output)  # an object store has no incomplete files
        for torn in output.glob(f".{info.name}.*.tmp") if isinstance(output, Path) else ():
            torn.unlink(missing_ok=True)
        self._strikes[info.name] += 1
        if self._strikes[info.name] == ATTEMPTS:
            raise UserError(
                f"{self.settings.audio}/{info.name}: {ATTEMPTS} workers died over this shard; see Ray's logs, lower "
                "batch_frames if memory was short, or prepare the audio without it"
            )
        again.append(info)

    def _give(self, worker: _Worker, info: ShardInfo, suspect: bool = False) -> None:
        worker.suspect = suspect
        worker.shards[worker.actor.label.remote(info)] = info

    def _resize(self, queued: bool) -> None:
        """While shards are queued ask for more workers, at most doubling those that are ready; else end idle ones."""
        settings = self.settings
        ready = sum(worker.since is not None for worker in self._workers)
        # workers without room do no harm: they wait, and end with the queue
        most = min(settings.max_workers or math.inf, ready + max(settings.min_workers, ready)) if queued else 0
        while len(self._workers) < max(settings.min_workers, most):
            actor = self._start()
            self._workers.append(_Worker(actor, actor.load.remote()))
        for worker in [] if queued else sorted(self._workers, key=lambda worker: worker.since is not None):
            if not worker.shards and len(self._workers) > settings.min_workers:
                self._end(worker)
                self._workers.remove(worker)

    def _start(self) -> Any:
        if self._make is None:
            self._mine = _connect(self.settings)
            settings = self.settings
            transcripts = ray.put(self.transcripts)
            actor = ray.remote(Labeler).options(
                num_cpus=settings.worker_cpus, num_gpus=settings.worker_gpus, max_concurrency=IN_FLIGHT
            )
            self._make = lambda: actor.remote(settings, self.teacher.fingerprint, transcripts)
        return self._make()

    def _end(self, worker: _Worker) -> None:
        if worker.since is not None:
            self._worked += time.perf_counter() - worker.since
        worker.since, worker.ended = None, True
        with contextlib.suppress(RayError):
            ray.kill(worker.actor)


def _absolute(path: str) -> str:
    return path if "://" in path else os.path.abspath(path)


def _connect(settings: LabelSettings) -> bool:
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
        for kind, wanted in (("CPU", settings.worker_cpus), ("GPU", settings.worker_gpus)):
            if wanted > there.get(kind, 0):
                ray.shutdown()
                raise UserError(
                    f"worker_{kind.lower()}s: a worker wants {wanted}, this machine has {there.get(kind, 0):g}; "
                    "lower it, or set ray_address to a cluster"
                )
    return True
