"""What training an arm costs against the baseline, step by step, and how much memory it needs."""

from __future__ import annotations

import itertools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch.optim.swa_utils import AveragedModel

from asr_kd.config.load import build
from asr_kd.distillation.answers import OWN, answerers
from asr_kd.distillation.knowledge import Pupil
from asr_kd.errors import UserError
from asr_kd.files import hash_json, read_json, write_json
from asr_kd.models.acoustic import build_model, load_checkpoint
from asr_kd.training.batches import PhaseStream
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import Learner, follow, make_optimizer, step
from asr_kd.training.weights import with_weights
from asr_kd.units import load_units

ROUNDS, STEPS = 5, 8  # turns of each arm, and steps in a turn
HOURS = 0.2  # of audio, by the training whose memory is measured


class Timed:
    """The training of an arm, a few steps at a time: batches from the stream, loss, update and moving average."""

    def __init__(self, settings: TrainSettings) -> None:
        settings, units = with_weights(settings)[0], load_units(settings.units)
        self.stream = PhaseStream(settings, 0, units)
        asked = {name for source in settings.phases[0].sources for name in source.teachers}
        teachers = {name: load_checkpoint(name) for name in sorted(asked - OWN)}
        torch.manual_seed(settings.seed)
        student = build_model(settings.model, settings.features.dimension, units.size)
        pupil = Pupil(student, [kind for lesson in self.stream.lessons for kind in lesson.kinds])
        self.learner = Learner(settings, pupil, make_optimizer(pupil, settings), Exchange(pupil, Ranks()))
        if settings.ema_decay:
            self.learner.average = AveragedModel(pupil)
        if settings.teacher_decay is not None:
            self.learner.taught_by = AveragedModel(pupil)
        self.learner.teachers = answerers(teachers, self.learner.taught_by or self.learner.average)

    def seconds(self, turn: int) -> float:
        """What the steps of a turn take for a second of audio, with the making of their batches."""
        batches = self.stream.batches(self.stream.start(), turn)
        next(batches)  # opening the stream stays out of it
        began, heard = time.perf_counter(), 0.0
        for batch in itertools.islice(batches, STEPS):
            assert batch is not None
            step(self.learner, batch, self.stream.lessons, 1e-4)
            follow(self.learner, 1)
            heard += batch.seconds
        return (time.perf_counter() - began) / heard


def ratios(settings: Mapping[str, TrainSettings], baseline: str) -> dict[str, float]:
    """Time that each arm needs for the same audio, in units of the baseline's: the median over turns."""
    arms = {name: Timed(one) for name, one in settings.items()}
    taken: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(ROUNDS + 1):  # the first pays for what is set up once
        for name, arm in arms.items():
            taken[name].append(arm.seconds(turn))
    return {
        name: statistics.median(one / base for one, base in zip(own[1:], taken[baseline][1:], strict=True))
        for name, own in taken.items()
    }


def peak_memory(settings: Mapping[str, Any]) -> int:
    """Bytes that a process of `asr-kd train` has resident at most, in a short training.

    Raises:
        UserError: when the training fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        phase = {**settings["phases"][0], "passes": None, "hours": HOURS}
        values = {**settings, "output": f"{folder}/run", "evaluate_every": 10**6, "phases": [phase]}
        file = Path(folder) / "settings.yaml"
        file.write_text(yaml.safe_dump(values), encoding="utf-8")
        command = [sys.executable, "-m", "asr_kd.cli", "train", str(file)]
        with open(Path(folder) / "log", "w+", encoding="utf-8") as log:
            started = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
            _, status, used = os.wait4(started.pid, 0)
            started.returncode = os.waitstatus_to_exitcode(status)
            if started.returncode:
                log.seek(0)
                raise UserError(
                    f"{settings['output']}: a short training of it failed: {log.read().strip().splitlines()[-1]}"
                )
    return used.ru_maxrss * 1024


def measure_costs(file: Path, settings: Mapping[str, Any], baseline: str) -> dict[str, dict[str, float]]:
    """`ratio` (time for the same audio) and `memory` (bytes) of each arm, from `file` or measured now beside the baseline.

    Args:
        file: JSON that keeps what was measured.
        settings: of `train`, by the name of the arm.
        baseline: one of them.
    """
    known: dict[str, Any] = read_json(file) if file.exists() else {}
    marks = {name: hash_json(one) for name, one in settings.items()}
    due = [name for name in settings if known.get(name, {}).get("of") != marks[name]]
    torch.set_num_threads(1)
    for name in due:
        print(f"cost of {name}", flush=True)
        both = {one: build(TrainSettings, settings[one], one) for one in dict.fromkeys([baseline, name])}
        known[name] = {"of": marks[name], "ratio": ratios(both, baseline)[name], "memory": peak_memory(settings[name])}
        write_json(file, known)
    return {name: {key: known[name][key] for key in ("ratio", "memory")} for name in settings}
