"""How much memory a system takes: the high-water mark of a process that does nothing but run it."""

from __future__ import annotations

import gc
import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import numpy as np
import torch

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.decoding.decoder import make_decoder
from asr_kd.errors import AudioError
from asr_kd.evaluation.parts import Shard
from asr_kd.evaluation.score import System
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.files import Place
from asr_kd.models.acoustic import Checkpoint, build_model, infer, load_checkpoint, pick_device
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.stream import batches_by_length, serve_parent
from asr_kd.shards.tarset import Sample, read_checked

#: utterances that a system is run on, and frames of the rehearsal
UTTERANCES, FRAMES = 64, 50


def peak_memory(settings: EvalSettings, system: System, shard: Shard) -> dict[str, int | None]:
    """Run a system over the first utterances of a shard, in a process of its own.

    Returns:
        in bytes: `peak_memory_bytes`, what weights, features, activations, posteriors and decoder add to the process at
        their height; null where it was killed or there is no shared memory for it, or where the system does not tell (not Linux). `peak_device_bytes`, what was
        allocated on a GPU at most; null without one.
    """
    # forked for each system from a server that has imported this module and run nothing: a fork of this process would hide
    # what it takes in the memory that is free here, and a spawned one would import torch each time
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    try:
        pools = ProcessPoolExecutor(1, context, serve_parent)
    except (OSError, ImportError):  # no semaphores: /dev/shm is full, or not there
        return {"peak_memory_bytes": None, "peak_device_bytes": None}
    with pools as pool:
        try:
            found = system.checkpoint  # its settings alone are sent: what it takes begins with loading it
            mine = dict(os.environ)  # the server's is of the time when it began
            return pool.submit(_measure, mine, settings, system.folder, found.settings, found.features, shard).result()
        except BrokenProcessPool:
            return {"peak_memory_bytes": None, "peak_device_bytes": None}


def _measure(
    environment: dict[str, str],
    settings: EvalSettings,
    folder: Place,
    model: ModelSettings,
    features: FeatureSettings,
    shard: Shard,
) -> dict[str, int | None]:
    os.environ.update(environment)
    torch.set_num_threads(settings.threads)
    device = pick_device(settings.device)
    samples = list(itertools.islice(read_checked(shard.folder, shard.info), UTTERANCES))
    _rehearse(model, features, device)
    gc.collect()
    before = _start_mark()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    _run(settings, load_checkpoint(folder, device), samples)
    return {
        "peak_memory_bytes": None if before is None else max(0, _status("VmHWM") - before),
        "peak_device_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
    }


@torch.inference_mode()
def _rehearse(model: ModelSettings, features: FeatureSettings, device: torch.device) -> None:
    """Run a tiny network of the same kind: what libraries set up when they are first used is no system's own."""
    tiny = build_model(model.model_copy(update={"layers": 1, "size": 8, "heads": 1}), features.dimension, 8)
    frames = torch.zeros(1, FRAMES, features.dimension, device=device)
    tiny.to(device).eval()(frames, torch.tensor([FRAMES]))
    Frontend(features).compute(np.zeros(features.sample_rate, np.float32))


def _start_mark() -> int | None:
    """Begin a new high-water mark of this process's memory; bytes that it takes now."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _status("VmRSS")
    except OSError:
        return None


def _status(key: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def _run(settings: EvalSettings, checkpoint: Checkpoint, samples: list[Sample]) -> None:
    frontend, decoder = Frontend(checkpoint.features), make_decoder(settings, checkpoint)
    features = []
    for sample in samples:
        try:
            waveform, _ = decode(sample.audio, sample.key, checkpoint.features.sample_rate, settings.max_seconds)
            features.append(frontend.compute(waveform))
        except AudioError:
            continue  # the report lists it
    for places in batches_by_length([len(item) for item in features], settings.batch_frames):
        for log_probs in infer(checkpoint, [features[place] for place in places]):
            decoder(log_probs)
