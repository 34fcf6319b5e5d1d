"""Training of networks that run on rounded weights, and of thin ones that begin as full ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings, VerifySettings
from asr_kd.labeling.verify import verify
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.models.rounded import rounded
from asr_kd.training import phase
from asr_kd.training.development import score_development
from asr_kd.training.scoring import LATENT
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from tests.training.test_processes import METHODS, launched

Job = Callable[..., TrainSettings]
KINDS: dict[str, dict[str, Any]] = {
    "lstm": {}, "projected": {"projection": 6}, "low rank": {"rank": 4}, "blstm": {"kind": "blstm", "delay_frames": 0},
    "conv": {"kind": "conv", "delay_frames": 0}, "conformer": {"kind": "conformer", "delay_frames": 0, "heads": 2},
    "separable": {"kind": "separable"}, "chunked conformer": {"kind": "chunked_conformer", "delay_frames": 0, "heads": 2},
    "emformer": {"kind": "emformer", "delay_frames": 0, "heads": 2},
}  # fmt: skip


def small(bits: int | None = 4, **changes: Any) -> dict[str, Any]:
    return {"layers": 2, "size": 12, "delay_frames": 2, "bits": bits, **changes}


def files(run: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(run)): path.read_bytes() for path in run.rglob("*.safetensors")}
    return {name: content for name, content in found.items() if "rank-" not in name}


def state(run: Path, prefix: str) -> dict[str, torch.Tensor]:
    tensors = safetensors.torch.load_file(run / "last" / "state.safetensors")
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@pytest.fixture
def full(job: Job, tmp_path: Path) -> str:
    """A run whose network is of float32 and has neither projection nor rank."""
    train(job(output=str(tmp_path / "full"), phase={"passes": 6}, model=small(None)))
    return str(tmp_path / "full")


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_scored_is_what_is_stored(job: Job, kind: str) -> None:
    settings = job(model=small(**KINDS[kind]), phase={"passes": 4}, calibrate_blank=False, ema_decay=0.5)
    train(settings)
    run = Path(settings.output)
    best = load_checkpoint(run)
    assert best.settings == settings.model and best.training["step"] > 0
    again = score_development(settings, best)
    assert (again.wer, again.loss) == (best.training["development_wer"], best.training["development_loss"])
    latent = safetensors.torch.load_file(run / LATENT)
    named = best.model.named_parameters()
    matrices = {name for name, weight in named if weight.dim() > 1 and not name.endswith("bias")}
    for name, weight in best.model.state_dict().items():
        assert torch.equal(weight, rounded(latent[name], 4) if name in matrices else latent[name])
    assert any((latent[name] != best.model.state_dict()[name]).any() for name in matrices)
    # what is trained and averaged are float weights
    for prefix in ("model.", "average.module."):
        held = state(run, prefix)
        assert held["output.weight"].dtype == torch.float32
        assert not torch.equal(rounded(held["output.weight"], 4), held["output.weight"])


def test_it_learns(job: Job) -> None:
    settings = job(model=small(2), phase={"passes": 30, "learning_rate": 0.03}, evaluate_every=30)
    train(settings)
    training = load_checkpoint(settings.output).training
    assert training["development_wer"] < 0.5 and training["development_loss"] < 0.5


def test_all_weights_move(job: Job) -> None:
    settings = job(model=small(2, dropout=0.0), weight_decay=0.0, phase={"passes": 3})
    train(settings)
    moved = state(Path(settings.output), "optimizer.")
    means = [value.abs().max().item() for name, value in moved.items() if name.endswith("exp_avg")]
    assert len(means) == len(list(load_checkpoint(settings.output).model.parameters())) and min(means) > 0


def test_stopped_at_any_step_it_goes_on_to_the_same_bits(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stopped_at_every_step: Callable[..., None]
) -> None:
    """Over two phases: the second begins at the float weights of the best checkpoint."""
    settings = job(model=small(2), ema_decay=0.5, phase={"passes": 1})
    settings = settings.model_copy(update={"phases": settings.phases * 2})
    run, begun = Path(settings.output), []
    restore = torch.nn.Module.load_state_dict

    def restored(self: torch.nn.Module, weights: Any, *more: Any, **named: Any) -> Any:
        begun.append({name: value.clone() for name, value in weights.items()})
        return restore(self, weights, *more, **named)

    with monkeypatch.context() as watched:
        watched.setattr(torch.nn.Module, "load_state_dict", restored)
        train(settings)
    from_best = [one for one in begun if "output.weight" in one]
    assert len(from_best) == 1 and not torch.equal(
        rounded(from_best[0]["output.weight"], 2), from_best[0]["output.weight"]
    )
    expected = files(run)
    assert str(LATENT) in expected
    run.rename(tmp_path / "whole")

    stopped_at_every_step(settings)
    assert files(run) == expected


@pytest.mark.parametrize("method", [{}, METHODS["blocks"]], ids=["ddp", "blocks"])
def test_processes_train_it_together_and_one_may_die(job: Job, tmp_path: Path, method: dict[str, Any]) -> None:
    settings = job(
        model=small(4, projection=6), lanes=2, distributed=method, ema_decay=0.5, phase={"passes": 2}, batch_frames=60, bucket_utterances=3,
    )  # fmt: skip
    whole = launched(settings, tmp_path, 2)
    expected = files(whole)
    best = load_checkpoint(whole)
    assert best.settings.bits == 4
    whole.rename(tmp_path / "whole")
    assert files(launched(settings, tmp_path, 2, "dies")) == expected


def test_carried_chunks(job: Job) -> None:
    settings = job(model=small(4), phase={"passes": 2, "chunks": {"frames": 5, "carry": True}})
    train(settings)
    assert load_checkpoint(settings.output).settings.bits == 4


def test_it_starts_other_trainings_and_teaches(job: Job, tmp_path: Path, audio: str) -> None:
    first = job(model=small(4), phase={"passes": 6}, output=str(tmp_path / "first"), calibrate_blank=False)
    train(first)
    quantised = load_checkpoint(first.output)
    for bits in (4, None):  # at the same bits, and as float weights
        settings = job(
            model=small(bits), init=first.output, calibrate_blank=False, output=str(tmp_path / f"next-{bits}"),
            source={"targets": None, "teacher": first.output}, phase={"passes": 1, "learning_rate": 1e-12},
        )  # fmt: skip
        train(settings)
        start = load_checkpoint(settings.output).training["started_from"]
        assert start["loss"] == pytest.approx(quantised.training["development_loss"], rel=1e-6)
    wanted = LabelSettings(teacher=first.output, audio=audio, output=str(tmp_path / "targets"), device="cpu")
    label(wanted)
    checked = VerifySettings(teacher=first.output, audio=audio, targets=wanted.output, device="cpu")
    assert verify(checked) is not False
    learner = job(source={"targets": wanted.output}, phase={"passes": 1}, output=str(tmp_path / "student"))
    train(learner)
    assert load_checkpoint(learner.output)


BESIDE: dict[str, dict[str, Any]] = {
    "mutual": {"mutual": {}}, "branches": {"branches": {}}, "heads": {"heads": [{"layer": "layer.1", "soft": 1.0}]},
    "average": {"targets": None, "teacher": "average", "ctc": 1.0}, "cycle": {"targets": None, "teacher": "cycle", "ctc": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("kind", BESIDE)
def test_what_stands_beside_it_or_answers(job: Job, kind: str) -> None:
    settings = job(
        model=small(4), source=BESIDE[kind], phase={"passes": 1}, ema_decay=0.5, cycles=2, calibrate_blank=False
    )
    train(settings)
    best = load_checkpoint(settings.output)
    again = score_development(settings, best)
    assert (again.wer, again.loss) == (best.training["development_wer"], best.training["development_loss"])


def test_a_full_network_is_rounded_in_training(job: Job, full: str) -> None:
    settings = job(model=small(4), init=full, phase={"passes": 8})
    train(settings)
    found = load_checkpoint(settings.output).training
    assert found["development_loss"] < found["started_from"]["loss"]


@pytest.mark.parametrize("thin", [{"rank": 24}, {"rank": 3}, {"projection": 4}, {"projection": 4, "bits": 8}])
def test_a_full_network_is_thinned_and_goes_on(job: Job, full: str, thin: dict[str, int]) -> None:
    settings = job(model=small(None) | thin, init=full, phase={"passes": 8}, calibrate_blank=False)
    train(settings)
    found = load_checkpoint(settings.output)
    assert (found.settings.rank, found.settings.projection) == (thin.get("rank"), thin.get("projection"))
    start = found.training["started_from"]["loss"]
    if thin == {"rank": 24}:
        scored = score_development(settings, load_checkpoint(full))
        assert start == pytest.approx(scored.loss, rel=1e-4)
    assert found.training["development_loss"] <= start


@pytest.mark.parametrize(
    "other", [{"kind": "conv", "delay_frames": 0}, {"size": 13, "rank": 3}, {"layers": 3, "projection": 4}]
)
def test_another_network_is_refused(job: Job, full: str, other: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"init: .* is another network than this run's model; use the same model settings"
    ):
        train(job(model=small(None) | other, init=full))


@pytest.mark.parametrize(
    ("start", "own", "message"),
    [
        ({"conditioned": [1]}, {"conditioned": [1], "projection": 6}, "is conditioned, and cannot be thinned to a projection"),
        ({"kind": "conformer", "delay_frames": 0, "heads": 2}, {"kind": "conformer", "delay_frames": 0, "heads": 3}, r"has 2 heads of attention.* 3; set model\.heads=2"),
    ],
)  # fmt: skip
def test_another_function_of_the_same_weights_is_refused(
    job: Job, tmp_path: Path, start: dict[str, Any], own: dict[str, Any], message: str
) -> None:
    train(job(output=str(tmp_path / "start"), phase={"passes": 1}, model=small(None, **start)))
    with pytest.raises(UserError, match=message):
        train(job(model=small(None, **own), init=str(tmp_path / "start")))


def test_damaged_weights_behind_the_best_are_named(job: Job, tmp_path: Path) -> None:
    two = job(model=small(), phase={"passes": 1}).model_dump()
    settings = TrainSettings.model_validate(two | {"phases": two["phases"] * 2})
    real = phase.run_phase

    def damaged(learner: Any, stream: Any, units: Any, metrics: Any, run: Path, stop_asked: Any) -> None:
        real(learner, stream, units, metrics, run, stop_asked)
        (run / LATENT).write_bytes(b"cut")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("asr_kd.training.trainer.run_phase", damaged)
        patch.setattr("asr_kd.training.trainer.score", lambda *_: None)
        with pytest.raises(UserError, match=r"last/latent\.safetensors: cannot be read"):
            train(settings)


def test_a_mean_of_rounded_checkpoints_is_refused(job: Job) -> None:
    with pytest.raises(
        ValueError, match="average takes checkpoints, and those of a model with bits are rounded already"
    ):
        job(model=small(4), average={"last": 2})
