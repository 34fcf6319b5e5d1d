"""Memory that a checkpoint takes beside its libraries: python tests/benchmarks/system_memory.py AUDIO CHECKPOINT … [key=value …] [--json]

Each runs in a fresh process over the first utterances of the largest shard, with these settings of `eval`. What
libraries set up when they are first used is loaded before the mark, by a tiny network of the same kind; from there on the
high-water mark of the process counts (Linux): weights, features, activations, posteriors, decoder.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from tables import print_rows

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.config.load import build, override
from asr_kd.decoding.decoder import make_decoder
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.files import place
from asr_kd.models.acoustic import build_model, infer_batches, load_checkpoint, pick_device
from asr_kd.shards.tarset import read_checked, read_index

UTTERANCES = 64


def measured(settings: EvalSettings, folder: str) -> dict[str, float | None]:
    """Megabytes at the height, of the process and of a GPU."""
    torch.set_num_threads(settings.threads)
    device, audio = pick_device(settings.device), str(settings.audio)
    shard = max(read_index(audio), key=lambda one: one.samples)
    samples = list(itertools.islice(read_checked(audio, shard), UTTERANCES))
    known = load_checkpoint(place(folder))
    kind, features = known.settings, known.features
    del known
    with torch.inference_mode():
        tiny = build_model(kind.model_copy(update={"layers": 1, "size": 8, "heads": 1}), features.dimension, 8)
        tiny.to(device).eval()(torch.zeros(1, 50, features.dimension, device=device), torch.tensor([50]))
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins anew
    before = status("VmRSS")
    checkpoint = load_checkpoint(place(folder), device)
    frontend, decoder = Frontend(features), make_decoder(settings, checkpoint)
    inputs = [frontend.compute(decode(one.audio, one.key, features.sample_rate, 60.0)[0]) for one in samples]
    for _, answers in infer_batches(checkpoint, inputs, settings.batch_frames):
        for log_probs in answers:
            decoder(log_probs)
    on_gpu = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else None
    return {"peak MB": round(status("VmHWM") - before, 1), "GPU MB": on_gpu}


def status(key: str) -> float:
    """A line of the process's status, in megabytes."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1]) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="+", metavar="AUDIO CHECKPOINT … key=value …")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    audio, *folders = [word for word in arguments.words if "=" not in word]
    assignments = [word for word in arguments.words if "=" in word]
    values = {"systems": dict(zip(folders, folders, strict=True)), "audio": audio, "output": "-"}
    settings, rows = build(EvalSettings, override(values, assignments), "command line"), []
    for folder in folders:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            rows.append({"checkpoint": folder, **pool.submit(measured, settings, folder).result()})
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
