"""The labelling engine of a cluster: a pool of Ray actors, each with the teacher, and a driver that assigns shards to them.

The driver holds the leases, counts, and writes the report; the actors end with it. A dead actor is replaced and its shards
are assigned again: the output does not depend on which worker made it.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from asr_kd.allocator import keep_freed_memory
from asr_kd.config.base import Several, folders_of
from asr_kd.errors import UserError
from asr_kd.files import place
from asr_kd.labeling.hidden import quantiser_of
from asr_kd.labeling.job import Engine
from asr_kd.labeling.settings import LabelSettings
from asr_kd.labeling.shard import label_shard, load_shard
from asr_kd.models.acoustic import pick_device
from asr_kd.models.teachers import is_name, load_teacher
from asr_kd.progress import Progress
from asr_kd.shards.index import ShardInfo
from asr_kd.shards.pool import Pool, Work
from asr_kd.shards.ray_crew import RayCrew
from asr_kd.targets.store import TargetMetadata, read_metadata

#: shards that a worker has at a time: one being published, one in the network, one being decoded
IN_FLIGHT = 3


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
        self.teacher = load_teacher(self.settings.teacher, device, self.settings.precision)
        if self.teacher.fingerprint != self.fingerprint:
            raise UserError(
                f"{self.settings.teacher}: is teacher {self.teacher.fingerprint} on {socket.gethostname()} and "
                f"{self.fingerprint} for the driver; give all machines the same folder"
            )
        self.quantiser = quantiser_of(self.settings)
        return str(device)

    def do(self, info: ShardInfo) -> TargetMetadata:
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


class RayEngine(Engine):
    """A pool of `min_workers` to `max_workers` actors."""

    def __init__(self, settings: LabelSettings, *common: Any) -> None:
        # a worker has another working directory
        folders: dict[str, Any] = {name: _absolute(getattr(settings, name)) for name in ("teacher", "output")}
        absolute = Several(map(_absolute, folders_of(settings.audio)))
        folders["audio"] = absolute[0] if isinstance(settings.audio, str) else absolute
        super().__init__(settings.model_copy(update=folders), *common)
        self.pool = self._pool(self.settings)
        self.devices = self.pool.loaded

    def _pool(self, settings: LabelSettings) -> Pool[ShardInfo]:
        arguments = (settings, self.teacher.fingerprint, self.transcripts)
        crew = RayCrew(settings, Labeler, arguments, settings.worker_gpus, IN_FLIGHT)
        work: Work[ShardInfo] = Work(
            "label", lambda info: info.name, (place(settings.output),),
            deadly=lambda info, deaths: (
                f"{info.at(settings.audio)}: {deaths} workers died over this shard; see Ray's logs, lower "
                "batch_frames if memory was short, or prepare the audio without it"
            ),
            unable=lambda deaths: (
                f"{settings.teacher}: {deaths} workers died while they loaded this teacher; see Ray's logs, "
                "and if memory was short, give a worker more of a machine (worker_cpus, worker_gpus)"
            ),
            room=f"{settings.worker_cpus} CPUs and {settings.worker_gpus} GPUs",
        )  # fmt: skip
        return Pool(crew, work, self.progress, settings.min_workers, settings.max_workers, IN_FLIGHT)

    def __exit__(self, *_: object) -> None:
        self.pool.close()

    def workers(self, seconds: float) -> float:
        return self.pool.worked / seconds

    def run(self, free: Iterator[ShardInfo]) -> Iterator[tuple[ShardInfo, TargetMetadata]]:
        for info, metadata in self.pool.run(free):
            statistics = metadata.statistics
            self.progress.advance(statistics.utterances + len(metadata.quarantined), statistics.audio_seconds)
            yield info, metadata


def _absolute(path: str) -> str:
    return path if "://" in path or is_name(path) else os.path.abspath(path)
