"""A self-test: the jobs of asr_kd, one after the other, on two utterances of noise, as a user runs them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from asr_kd.ending import Stopped
from asr_kd.errors import UserError

RATE = 8000
TEXTS = ("one two", "two one")


def trial(device: str) -> list[dict[str, Any]]:
    """Run each step in a temporary folder; ends with the first that fails.

    Args:
        device: as of `train`.

    Returns:
        of each step its name, its seconds, and its `problem` in one line; None: it works.
    """
    done: list[dict[str, Any]] = []
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="asr-kd-doctor-"))
        except OSError as error:
            return [{"step": "temporary folder", "seconds": 0.0, "problem": error.strerror or str(error)}]
        stack.enter_context(_alone())
        for name, run in STEPS.items():
            began, problem = time.monotonic(), None
            try:
                with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                    run(Path(folder), device)
            except Stopped:
                raise
            except UserError as error:
                problem = str(error)
            except Exception as error:  # whatever breaks is the report
                problem = f"{type(error).__name__}: {' '.join(str(error).split())}"
            said = problem and problem.replace(folder, "…")
            done.append({"step": name, "seconds": round(time.monotonic() - began, 2), "problem": said})
            if problem:
                break
    return done


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Within, no training waits for other processes, also on a machine that was set up for `torchrun`."""
    world = os.environ.pop("WORLD_SIZE", None)
    try:
        yield
    finally:
        if world is not None:
            os.environ["WORLD_SIZE"] = world


def _prepare(folder: Path, _: str) -> None:
    import numpy as np
    import soundfile

    from asr_kd.decoding.prepare import prepare
    from asr_kd.shards.settings import PrepareSettings

    lines = []
    for number, text in enumerate(TEXTS):
        sound = np.random.default_rng(number).normal(0, 0.1, RATE)
        soundfile.write(folder / f"{number}.wav", sound, RATE)
        lines.append({"audio": f"{number}.wav", "text": text})
    (folder / "list.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prepare(PrepareSettings(manifest=str(folder / "list.jsonl"), output=str(folder / "audio")))


def _label(folder: Path, device: str) -> None:
    import torch

    from asr_kd.labeling.job import label
    from asr_kd.labeling.settings import LabelSettings
    from asr_kd.models.acoustic import build_model, save_checkpoint
    from asr_kd.shards.settings import UnitsSettings
    from asr_kd.shards.texts import train_units

    units = train_units(UnitsSettings(source=str(folder / "audio"), output=str(folder / "units"), kind="char", size=30))
    model, features = _shape()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        save_checkpoint(folder / "teacher", build_model(model, features.dimension, units.size), units, features, model)
    label(LabelSettings(
        teacher=str(folder / "teacher"), audio=str(folder / "audio"), output=str(folder / "targets"), device=device,
    ))  # fmt: skip


def _shape() -> tuple[Any, Any]:
    """Settings of a small network, and of its front end."""
    from asr_kd.audio.settings import FeatureSettings
    from asr_kd.models.settings import ModelSettings

    return ModelSettings(layers=1, size=8), FeatureSettings(sample_rate=RATE, mels=8)


def _read(folder: Path, _: str) -> None:
    from asr_kd.targets.store import read_target_shard

    found = [key for shard in sorted((folder / "targets").glob("*.tar")) for key, _ in read_target_shard(shard)[1]]
    if len(found) != len(TEXTS):
        raise UserError(f"{len(found)} of {len(TEXTS)} utterances have soft targets")


def _train(folder: Path, device: str) -> None:
    from asr_kd.distillation.settings import SourceSettings
    from asr_kd.training.settings import PhaseSettings, TrainSettings
    from asr_kd.training.trainer import train

    model, features = _shape()
    source = SourceSettings(audio=str(folder / "audio"), targets=str(folder / "targets"), soft=1.0)
    train(TrainSettings(
        output=str(folder / "student"), units=str(folder / "units"), development=str(folder / "audio"),
        phases=[PhaseSettings(sources=[source], passes=1)], model=model, features=features, device=device, tensorboard=False,
    ))  # fmt: skip


def _transcribe(folder: Path, device: str) -> None:
    from asr_kd.decoding.settings import TranscribeSettings
    from asr_kd.decoding.transcribe import transcribe_shards

    texts = folder / "texts.jsonl"
    transcribe_shards(TranscribeSettings(
        checkpoint=str(folder / "student"), audio=str(folder / "audio"), output=str(texts), device=device,
    ))  # fmt: skip
    if len(texts.read_text().splitlines()) != len(TEXTS):
        raise UserError("not all utterances have a text")


#: what a step does, by its name
STEPS: dict[str, Callable[[Path, str], None]] = {
    "prepare": _prepare, "label": _label, "read targets": _read, "train": _train, "transcribe": _transcribe,
}  # fmt: skip
