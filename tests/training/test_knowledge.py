"""The contract of a kind of knowledge: one that brings a trained part is a file and a field, and everything goes on as before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from asr_kd.distillation.settings import SourceSettings
from asr_kd.errors import UserError
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.training.settings import PhaseSettings, TrainSettings
from asr_kd.training.trainer import train
from tests.distillation.entropy import Entropy, EntropySettings
from tests.training.test_processes import METHODS, launched

Job = Callable[..., TrainSettings]


class Source(SourceSettings):
    entropy: EntropySettings | None = None


class Phase(PhaseSettings):
    sources: list[Source]  # type: ignore[assignment]


class Run(TrainSettings):
    phases: list[Phase]  # type: ignore[assignment]


def run_of(job: Job, sources: list[dict[str, Any]], **changes: Any) -> Run:
    plain = job(**changes).model_dump()
    targets = {name: plain["phases"][0]["sources"][0][name] for name in ("audio", "targets")}
    phase = plain["phases"][0] | {"sources": [targets | source for source in sources]}
    return Run.model_validate(plain | {"phases": [phase, phase]})


#: one source learns it beside soft targets, the other has no use for its part
MIXED = [{"soft": 1.0, "entropy": {"weight": 0.5}}, {"targets": None, "ctc": 1.0}]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "last" / "state.safetensors")


def files(run: Path) -> dict[str, bytes]:
    """What it has published, less what the second process alone must know."""
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.safetensors")}
    return {name: content for name, content in found.items() if "rank-" not in name}


def test_it_is_learned_alone_and_the_student_leaves_without_its_part(job: Job) -> None:
    settings = run_of(job, [{"targets": None, "entropy": {}}], phase={"passes": 10})
    train(settings)
    run = Path(settings.output)
    lines = [line for line in (run / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    losses = [float(line.split('"loss": ')[1].split(",")[0]) for line in lines]
    assert sum(losses[-5:]) < 0.3 * sum(losses[:5])
    assert {name for name in weights(run) if "beside" in name and name.startswith("model.")} == {
        "model.beside.entropy.weight", "model.beside.entropy.bias",
    }  # fmt: skip
    assert not any("beside" in name or "entropy" in name for name in load_checkpoint(run).model.state_dict())


def test_a_kind_that_brings_a_part_leaves_the_student_s_draws_alone(job: Job, tmp_path: Path) -> None:
    """With no weight to speak of, the student learns what it would have learned without."""
    with_it = run_of(job, [{"soft": 1.0, "entropy": {"weight": 1e-30}}], output=str(tmp_path / "with"))
    without = run_of(job, [{"soft": 1.0}], output=str(tmp_path / "without"))
    train(with_it)
    train(without)
    theirs = weights(tmp_path / "without")
    for name, value in weights(tmp_path / "with").items():
        if name.startswith("model.") and "beside" not in name:
            torch.testing.assert_close(value, theirs[name])


def test_stopped_at_any_step_it_goes_on_to_the_same_bits(
    job: Job, tmp_path: Path, stopped_at_every_step: Callable[..., None]
) -> None:
    settings = run_of(job, MIXED, ema_decay=0.5, phase={"passes": 1})
    run = Path(settings.output)
    train(settings)
    expected = files(run)
    assert "best/beside.safetensors" in expected  # where the second phase goes on from
    run.rename(tmp_path / "whole")

    stopped_at_every_step(settings)
    assert files(run) == expected


@pytest.mark.parametrize("method", [{}, *METHODS.values()], ids=["ddp", *METHODS])
def test_processes_train_it_together_and_one_may_die(job: Job, tmp_path: Path, method: dict[str, Any]) -> None:
    settings = run_of(
        job, MIXED, lanes=2, distributed=method, ema_decay=0.5,
        phase={"passes": 1}, batch_frames=60, bucket_utterances=3,
    )  # fmt: skip
    whole = launched(settings, tmp_path, 2)
    expected = files(whole)
    assert weights(whole)["model.beside.entropy.weight"].abs().sum() > 0
    whole.rename(tmp_path / "whole")
    died = launched(settings, tmp_path, 2, "dies")
    assert files(died) == expected


def test_carried_chunks_are_refused(job: Job) -> None:
    settings = run_of(job, [{"soft": 1.0, "entropy": {}}], phase={"chunks": {"frames": 5, "carry": True}})
    with pytest.raises(UserError, match=r"chunks\.carry: hears the student alone"):
        train(settings)


def test_a_layer_that_the_network_lacks_is_named(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Entropy, "taps", ("layer.9",))
    with pytest.raises(UserError, match=r"entropy: the network has no layer\.9; it has layer\.1, layer\.2"):
        train(run_of(job, MIXED))
