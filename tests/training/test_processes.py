"""Training by several processes that torchrun starts, on this machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from asr_kd.errors import UserError
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.training.distributed.ranks import Ranks
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import _train, train

Job = Callable[..., TrainSettings]

# a message that is lost ends in a restart, as it would for a user, and not in half an hour of waiting; a process that hangs says where
BEGIN = """
import faulthandler
from datetime import timedelta
from asr_kd.training.distributed import ranks
faulthandler.dump_traceback_later(700)
ranks.PATIENCE = timedelta(seconds=200)
"""

# the second process dies in the middle of its seventh step, the first time
JOB = """
import os, pkgutil, signal, sys
from asr_kd.training import phase, trainer
real, steps = phase.step, 0
def step(*arguments):
    global steps
    steps += 1
    if sys.argv[2] == "dies" and os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and steps == 7:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments)
phase.step = step
trainer.train(pkgutil.resolve_name(sys.argv[3]).model_validate_json(sys.argv[1]))
"""

METHODS: dict[str, dict[str, Any]] = {
    "compressed": {"compression": "threshold", "threshold": {"warmup_steps": 2, "density": 0.1}},
    "blocks": {"method": "bmuf", "bmuf": {"block_steps": 2, "warmup_steps": 3}},
}


def launched(settings: TrainSettings, folder: Path, processes: int, how: str = "lives", job: str = JOB) -> Path:
    script = folder / "job.py"
    script.write_text(BEGIN + job)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={processes}",
        "--max-restarts=1",
    ]
    with open(folder / "said", "w+") as said:
        process = subprocess.Popen(
            [*command, str(script), settings.model_dump_json(), how, f"{type(settings).__module__}:{type(settings).__name__}"],
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.DEVNULL, stderr=said,
        )  # fmt: skip
        try:
            status = process.wait(800)
        except subprocess.TimeoutExpired:
            subprocess.run(
                ["ps", "-eLo", "pid,ppid,stat,wchan:24,comm"], stdout=said
            )  # a process that hangs while it ends says nothing itself
            process.send_signal(signal.SIGABRT)
            status = process.wait()
            subprocess.run(["pkill", "-KILL", "-f", str(script)])  # its processes live in sessions of their own
        said.seek(0)
        assert not status, said.read()[-12000:]
    return Path(settings.output)


def assert_a_death_changes_nothing(settings: TrainSettings, folder: Path) -> None:
    """The same job of two processes ends in the same bits whether both live or one dies and is started again."""
    found = {}
    for how in ("lives", "dies"):
        (folder / how).mkdir()
        run = launched(settings.model_copy(update={"output": str(folder / how / "run")}), folder / how, 2, how)
        found[how] = (run / "last" / "state.safetensors").read_bytes()
    assert found["lives"] == found["dies"]


@pytest.mark.parametrize("method", METHODS)
def test_a_process_that_dies_is_started_again_and_changes_nothing(job: Job, tmp_path: Path, method: str) -> None:
    settings = job(
        lanes=2, evaluate_every=3, ema_decay=0.5, distributed=METHODS[method],
        phase={"passes": 3}, batch_frames=60, bucket_utterances=3,
    )  # fmt: skip
    whole = launched(settings, tmp_path, 2)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    sent = [line["bytes_sent"] for line in lines if "bytes_sent" in line]
    assert sent == sorted(sent) and sent[-1] > 0
    heard = [line["audio_hours"] for line in lines if "audio_hours" in line]
    assert heard == sorted(heard) and heard[-1] == pytest.approx(sum_of_hours(settings) * 3, rel=0.1)
    state = (whole / "last" / "state.safetensors").read_bytes()
    best = load_checkpoint(whole).fingerprint
    assert list((whole / "last").glob("rank-*.safetensors"))
    whole.rename(tmp_path / "whole")
    died = launched(settings, tmp_path, 2, "dies")
    assert (died / "last" / "state.safetensors").read_bytes() == state
    assert load_checkpoint(died).fingerprint == best


@pytest.mark.parametrize("method", METHODS)
def test_one_that_dies_before_the_first_scores_too(job: Job, tmp_path: Path, method: str) -> None:
    settings = job(
        lanes=2,
        evaluate_every=1000,
        distributed=METHODS[method],
        phase={"passes": 3},
        batch_frames=60,
        bucket_utterances=3,
    )
    assert_a_death_changes_nothing(settings, tmp_path)


def sum_of_hours(settings: TrainSettings) -> float:
    from asr_kd.shards.tarset import read_index

    return sum(info.seconds for info in read_index(settings.phases[0].sources[0].audio)) / 3600


def test_one_process_goes_on_where_several_were(job: Job, tmp_path: Path) -> None:
    settings = job(lanes=2, evaluate_every=3, phase={"passes": 3}, batch_frames=60, bucket_utterances=3)
    run = launched(settings, tmp_path, 2)
    state = run / "last" / "state.safetensors"
    tensors = safetensors.torch.load_file(state)
    with safetensors.safe_open(str(state), framework="pt") as file:
        position = json.loads(file.metadata()["position"])
    assert position["finished"] and position["world"] == 2
    # as if stopped by the last save before its end
    position |= {"finished": False, "phase": 0, "cycle": 0}
    safetensors.torch.save_file(tensors, state, {"position": json.dumps(position)})
    train(settings)
    with safetensors.safe_open(str(state), framework="pt") as file:
        after = json.loads(file.metadata()["position"])
    assert after["finished"] and after["world"] == 1 and after["step"] == position["step"]
    assert not list((run / "last").glob("rank-*.safetensors"))
    weights = safetensors.torch.load_file(state)
    assert all(torch.isfinite(value).all() for name, value in weights.items() if name.startswith("model."))


def test_lanes_must_go_round(job: Job) -> None:
    with pytest.raises(UserError, match=r"lanes: 3 is not a multiple of 2 processes; set lanes=2"):
        _train(job(lanes=3), Ranks(0, 2))
    carried = job(lanes=2, phase={"chunks": {"frames": 5, "carry": True}})
    with pytest.raises(UserError, match=r"chunks\.carry: takes another number of steps in each process"):
        _train(carried, Ranks(0, 2))
