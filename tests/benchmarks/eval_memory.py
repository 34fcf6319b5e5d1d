"""Memory of an evaluation that grows: hours that are scored, and hours of scores that are summed up. Audio is generated; a shard stands for many."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from tables import print_rows

from asr_kd.audio.settings import FeatureSettings
from asr_kd.evaluation.job import evaluate
from asr_kd.evaluation.parts import Costs, Part, Shard, write_part
from asr_kd.evaluation.score import System
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.sharing import DECIDING, Work
from asr_kd.evaluation.wer import align, counts_of
from asr_kd.files import claim_folder, place
from asr_kd.models.acoustic import build_model, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.settings import UnitsSettings
from asr_kd.shards.tarset import Sample, read_index, write_index, write_shard
from asr_kd.shards.texts import train_units

UTTERANCES, SECONDS, RATE = 100, 12.0, 8000
#: shards whose scores differ; the others repeat them
BODIES = 20
VOCABULARY = [f"{a}{b}{c}" for a in ("ka", "lo", "mi", "re", "su") for b in ("ta", "no", "vi") for c in ("n", "s", "r")]


def make(root: Path) -> None:
    """A shard of twenty minutes of noise with texts, and two untrained systems."""
    rng, noise = random.Random(0), np.random.default_rng(0)
    samples = []
    for number in range(UTTERANCES):
        sound = io.BytesIO()
        soundfile.write(sound, noise.normal(0, 0.1, int(SECONDS * RATE)), RATE, format="FLAC")
        fields = {"text": " ".join(rng.choices(VOCABULARY, k=30)), "seconds": SECONDS, "speaker": f"s{number % 10}"}
        samples.append(Sample(f"u{number:03d}", sound.getvalue(), "flac", fields))
    (root / "one").mkdir()
    write_index(root / "one", [write_shard(root / "one" / "shard-0000000.tar", samples)])
    (root / "text.txt").write_text("\n".join(sample.fields["text"] for sample in samples))
    units = train_units(UnitsSettings(source=str(root / "text.txt"), output=str(root / "units"), kind="char", size=40))
    features = FeatureSettings(sample_rate=RATE)
    for seed, (name, size) in enumerate([("teacher", 160), ("student", 96)]):
        torch.manual_seed(seed)
        model = ModelSettings(layers=2, size=size)
        save_checkpoint(root / name, build_model(model, features.dimension, units.size), units, features, model)


def settings_of(root: Path, folder: Path, workers: int) -> EvalSettings:
    return EvalSettings(
        systems={name: str(root / name) for name in ("teacher", "student")}, audio=str(folder / "audio"),
        output=str(folder / "report"), teacher="teacher", baseline="teacher", device="cpu", workers=workers,
    )  # fmt: skip


def audio_set(root: Path, folder: Path, hours: float) -> int:
    """A set of as many hours, the same shard under many names; returns its number of shards."""
    (info,) = read_index(root / "one")
    count = round(hours * 3600 / info.seconds)
    (folder / "audio").mkdir(parents=True)
    names = [f"shard-{number:07d}.tar" for number in range(count)]
    for name in names:
        os.link(root / "one" / info.name, folder / "audio" / name)
    write_index(folder / "audio", (replace(info, name=name) for name in names))
    return count


def write_scores(settings: EvalSettings) -> None:
    """Parts of all shards, as they would be for systems that make some errors."""
    systems = [System(name, place(path), load_checkpoint(path)) for name, path in settings.systems.items()]
    shards = [Shard("audio", str(settings.audio), info) for info in read_index(str(settings.audio))]
    work, rng = Work(settings, systems, shards, Path(settings.output)), random.Random(0)
    claim_folder(work.output, "eval", settings.model_dump(include={"systems", "audio", *DECIDING}))
    (work.output / "parts" / "audio").mkdir(parents=True)
    costs = dict.fromkeys(settings.systems, Costs(shards[0].info.seconds, 1.0, 1.0, 1.0))
    bodies = []
    for shard in shards[:BODIES]:
        lines = [line(rng, system.name, shard, number) for system in systems for number in range(UTTERANCES)]
        bodies.append("".join(json.dumps(one) + "\n" for one in lines).encode())
    for number, shard in enumerate(shards):
        first = shards[number % BODIES].info.name
        body = bodies[number % BODIES].replace(first.encode(), shard.info.name.encode())
        part = Part(UTTERANCES, shard.info.seconds, {}, body)
        write_part(shard.part(work.output), work.made_of(shard), part, costs)


def line(rng: random.Random, system: str, shard: Shard, number: int) -> dict[str, Any]:
    """A line of scores with an error in ten words."""
    words = rng.choices(VOCABULARY, k=30)
    heard = [rng.choice(VOCABULARY) if rng.random() < 0.1 else word for word in words]
    reference, hypothesis = " ".join(words), " ".join(heard)
    counts = counts_of(align(reference, hypothesis))
    return {
        "system": system, "set": shard.set, "shard": shard.info.name, "key": f"u{number:03d}",
        "speaker": f"s{number % 10}", "seconds": SECONDS, "fields": {"snr": number % 7},
        "reference": reference, "hypothesis": hypothesis, "reference_scored": reference, "hypothesis_scored": hypothesis,
        "words": counts.words, "substitutions": counts.substitutions, "deletions": counts.deletions,
        "insertions": counts.insertions, "errors": counts.errors, "characters": len(reference),
        "character_errors": 4 * counts.errors, "same_as_teacher": False,
        "times": [[word, 0.4 * place, 0.4 * place + 0.3, round(rng.random(), 4)] for place, word in enumerate(heard)],
    }  # fmt: skip


def measured(root: Path, folder: Path, what: str, workers: int) -> dict[str, Any]:
    """Peak memory of a fresh process that does the job, and its seconds; its worker processes are not in it."""
    command = [sys.executable, __file__, "--root", str(root), "--folder", str(folder), "--workers", str(workers)]
    if what == "summing up":
        subprocess.run([*command, "--write"], check=True)
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # as the command does
    )  # fmt: skip
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--scored", type=float, nargs="*", default=[1, 4, 16], help="hours that are scored")
    parser.add_argument("--summed", type=float, nargs="*", default=[10, 100, 1000], help="hours of scores summed up")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder:
        settings = settings_of(arguments.root, arguments.folder, arguments.workers)
        if arguments.write:
            write_scores(settings)
            return
        began = time.perf_counter()
        evaluate(settings)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        print(json.dumps({"seconds": round(time.perf_counter() - began), "peak MB": round(peak / 1024)}))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        with contextlib.redirect_stdout(sys.stderr):
            make(root)
        for what, hours in [
            *(("scoring", one) for one in arguments.scored),
            *(("summing up", one) for one in arguments.summed),
        ]:
            folder = root / f"{what}-{hours}"
            shards = audio_set(root, folder, hours)
            took = measured(root, folder, what, arguments.workers)
            rows.append({"step": what, "hours": hours, "shards": shards, "utterances": shards * UTTERANCES, **took})
    print_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
