"""Self-distillation in the real loop: heads on lower layers, views that agree, the run's own average and last cycle as teachers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from asr_kd.distillation import guard
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests.training.test_processes import assert_a_death_changes_nothing

Job = Callable[..., TrainSettings]

HEADS = {"ctc": 0.5, "heads": [{"layer": "layer.1", "ctc": 0.3, "soft": 0.5, "top": {"start": 0.0, "end": 0.5}}]}


def state(run: Path) -> bytes:
    return (run / "last" / "state.safetensors").read_bytes()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return safetensors.torch.load_file(run / "last" / "state.safetensors")


def rows(run: Path) -> list[dict[str, Any]]:
    return [row for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in rows(run)]


def test_a_head_is_learned_and_left_behind(job: Job) -> None:
    train(job(source=HEADS, phase={"passes": 20}))
    run = Path(job().output)
    assert losses(run)[-1] < 0.5 * losses(run)[0]
    assert {name for name in weights(run) if name.startswith("model.beside")} == {
        "model.beside.heads:layer-1.weight", "model.beside.heads:layer-1.bias",
    }  # fmt: skip
    assert not any("head" in name for name in load_checkpoint(run).model.state_dict())


def test_a_head_without_weight_to_speak_of_changes_nothing(job: Job, tmp_path: Path) -> None:
    train(job(output=str(tmp_path / "without")))
    train(job(output=str(tmp_path / "with"), source={"heads": [{"layer": "layer.1", "ctc": 1e-30, "top": 1e-30}]}))
    without = weights(tmp_path / "without")
    for name, value in weights(tmp_path / "with").items():
        if name.startswith("model.") and "beside" not in name:
            torch.testing.assert_close(value, without[name])


def test_a_head_is_resumed_to_the_same_bits(job: Job, tmp_path: Path, resumed: Callable[..., None]) -> None:
    train(job(source=HEADS, output=str(tmp_path / "whole")))
    resumed(job(source=HEADS, output=str(tmp_path / "run")), 4)
    assert state(tmp_path / "run") == state(tmp_path / "whole")


@pytest.mark.parametrize("missing", ["prior", "uniform"])
def test_a_head_alone_learns_with_any_policy_for_missing_mass(job: Job, missing: str) -> None:
    settings = job(source={"soft": 0.0, "heads": [{"layer": "layer.1", "soft": 1.0}]}, missing_mass=missing)
    train(settings)
    assert losses(Path(settings.output))[-1] < losses(Path(settings.output))[0]


CONDITIONED = {"layers": 2, "size": 12, "delay_frames": 2, "conditioned": [1]}
SHARED = {"ctc": 0.5, "heads": [{"layer": "layer.1", "ctc": 0.5, "shared": True}]}


def test_a_conditioned_network_learns_through_its_one_output_layer(
    job: Job, tmp_path: Path, resumed: Callable[..., None]
) -> None:
    settings = job(model=CONDITIONED, source=SHARED, ema_decay=0.5, output=str(tmp_path / "whole"), phase={"passes": 5})
    train(settings)
    assert losses(tmp_path / "whole")[-1] < 0.8 * losses(tmp_path / "whole")[0]
    assert weights(tmp_path / "whole")["model.condition.project.weight"].any()
    assert not any("beside" in name for name in weights(tmp_path / "whole"))
    assert "condition.project.weight" in load_checkpoint(tmp_path / "whole").model.state_dict()
    resumed(settings.model_copy(update={"output": str(tmp_path / "run")}), 4)
    assert state(tmp_path / "run") == state(tmp_path / "whole")


def test_a_head_cannot_share_the_output_layer_of_a_network_that_is_not_conditioned(job: Job) -> None:
    with pytest.raises(
        ValueError, match=r"layer\.1 shares the output layer, but .* name its number in model\.conditioned"
    ):
        job(source=SHARED)


MASKS = {"time_masks": 2, "mel_masks": 1, "stretch": 0.2}
VIEWS = {"ctc": 0.5, "views": {"weight": {"start": 0.0, "end": 0.5, "until": 0.3}}, "augment": MASKS}


def test_a_batch_holds_every_utterance_twice_with_other_masks(job: Job, units: Units) -> None:
    plain, doubled = (
        PhaseStream(
            job(source={"ctc": 0.5, "augment": MASKS, "batch_frames": frames, **source}, phase={"passes": 1}), 0, units
        )
        for frames, source in ((50, {}), (100, {"views": {}}))
    )
    batches = [list(filter(None, stream.batches(stream.start(), 0))) for stream in (plain, doubled)]
    for one, two in zip(*batches, strict=True):
        assert (one.seconds, one.after) == (two.seconds, two.after)
        assert two.frames == 2 * one.frames and torch.equal(two.lengths, one.lengths.repeat(2))
        for name, part in one.parts.items():
            values = two.parts[name].values
            assert torch.equal(values, part.values if part.whole else torch.cat([part.values] * 2))
        first, second = two.features.chunk(2)
        assert torch.equal(first, one.features)
        both = (first != 0) & (second != 0)
        assert torch.equal(first[both], second[both]) and not torch.equal(first, second)


def test_views_are_learned_and_resumed_to_the_same_bits(job: Job, tmp_path: Path, resumed: Callable[..., None]) -> None:
    train(job(source=VIEWS, output=str(tmp_path / "whole")))
    resumed(job(source=VIEWS, output=str(tmp_path / "run")), 4)
    assert state(tmp_path / "run") == state(tmp_path / "whole")


def test_views_of_chunks_are_refused(job: Job) -> None:
    with pytest.raises(ValueError, match="chunks cannot learn from views, which needs whole utterances"):
        job(source={"views": {}, "augment": {"time_masks": 1}}, phase={"chunks": {"frames": 5}})


#: momentum pseudo-labels: the average's greedy text, with a guard
PSEUDO = {
    "targets": None, "teacher": "average", "ctc": 1.0, "soft": 0.5, "sequences": {"temperature": 1e-3}, "guard": 1.0,
    "augment": {"time_masks": 1},
}  # fmt: skip


def test_answers_of_an_average_that_falls_silent_are_left_out_and_counted(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed: Callable[..., None]
) -> None:
    """CTC says the blank everywhere before it says anything."""
    monkeypatch.setattr(guard, "FIRST", 1)
    settings = job(source=PSEUDO, ema_decay=0.9, teacher_decay=0.5, output=str(tmp_path / "whole"), phase={"passes": 4})
    train(settings)
    left = [row["answers_left_out"] for row in rows(tmp_path / "whole")]
    assert left[0] == 0 < left[-1] <= len(left) and left == sorted(left)
    assert all(map(math.isfinite, losses(tmp_path / "whole")))
    assert not {"taught_by.module.output.bias", "average.module.output.bias"} - weights(tmp_path / "whole").keys()
    resumed(settings.model_copy(update={"output": str(tmp_path / "run")}), 6)
    assert state(tmp_path / "run") == state(tmp_path / "whole")


def test_a_batch_of_which_nothing_is_learned_has_a_loss_of_0(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard.Watch, "allows", lambda *_: False)
    train(job(source={"targets": None, "teacher": "average", "guard": 0.5}, ema_decay=0.5, phase={"passes": 1}))
    assert set(losses(Path(job().output))) == {0.0}


def test_a_decay_of_its_own_that_is_the_same_teaches_the_same(job: Job, tmp_path: Path) -> None:
    source = {"targets": None, "teacher": "average", "ctc": 1.0, "guard": 0.1}
    for name, decay in (("one", None), ("two", 0.8)):
        train(job(source=source, ema_decay=0.8, teacher_decay=decay, output=str(tmp_path / name), phase={"passes": 1}))
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert {name.partition(".")[0] for name in two.keys() - one.keys()} == {"taught_by"}


CYCLES: dict[str, Any] = {"cycles": 2, "evaluate_every": 1000}


def test_from_the_second_cycle_on_the_first_one_s_best_teaches(
    job: Job, tmp_path: Path, resumed: Callable[..., None]
) -> None:
    taught = {"targets": None, "ctc": 1.0, "teacher": "cycle", "soft": 1.0}
    train(job(**CYCLES, source=taught, output=str(tmp_path / "whole")))
    train(job(**CYCLES, source={"targets": None, "ctc": 1.0, "soft": 0.0}, output=str(tmp_path / "alone")))
    first = [row["loss"] for row in rows(tmp_path / "whole") if row["cycle"] == 0]
    assert losses(tmp_path / "alone")[: len(first)] == first  # in the first cycle nobody answers
    assert losses(tmp_path / "alone")[len(first)] < losses(tmp_path / "whole")[len(first)]
    settings = job(**CYCLES, source=taught, output=str(tmp_path / "run"))

    def stopped(after: int) -> dict[str, torch.Tensor]:
        resumed(settings, after, finish=False)
        return weights(tmp_path / "run")

    assert not any(name.startswith("cycle.") for name in stopped(1))
    held, best = stopped(len(first) - 2), load_checkpoint(tmp_path / "run").model.state_dict()
    assert all(torch.equal(held[f"cycle.{name}"], weight) for name, weight in best.items())
    train(settings)
    assert state(tmp_path / "run") == state(tmp_path / "whole")


def test_who_answers_must_be_there(job: Job) -> None:
    source = {"targets": None, "teacher": "cycle"}
    with pytest.raises(ValueError, match="teacher: cycle needs cycles of 2 or more"):
        job(source=source)
    with pytest.raises(ValueError, match=r"teacher_decay is of teacher: average; no source has it"):
        job(teacher_decay=0.5)


def test_two_processes_of_which_one_dies(job: Job, tmp_path: Path) -> None:
    """Two views, a head through the shared output layer, and the average with a decay and a guard, all together."""
    source = {**VIEWS, **SHARED, "targets": None, "teacher": "average", "soft": 0.5, "guard": 0.5}
    settings = job(
        model=CONDITIONED, source=source, lanes=2, teacher_decay=0.5,
        phase={"passes": 3}, batch_frames=120, bucket_utterances=3,
    )  # fmt: skip
    assert_a_death_changes_nothing(settings, tmp_path)


def test_what_a_head_learns_of_the_text_it_learns_where_nobody_answers(job: Job, tmp_path: Path) -> None:
    head = {"heads": [{"layer": "layer.1", "ctc": 1.0, "soft": 1.0}]}
    train(job(output=str(tmp_path / "run"), source={"targets": None, "teacher": "cycle", "soft": 0.0} | head, **CYCLES))
    assert all(row["loss"] > 0.1 for row in rows(tmp_path / "run"))
