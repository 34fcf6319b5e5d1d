"""A teacher of another program beside ours: combined, and where none can be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from asr_kd.distillation.answers import answer, foreigners
from asr_kd.errors import UserError
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import build_model, infer, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.models.teachers import load_teacher
from asr_kd.plan.job import plan
from asr_kd.plan.settings import PlanSettings
from asr_kd.selection.job import select
from asr_kd.selection.pair import pair
from asr_kd.selection.settings import PairSettings, SelectionSettings
from asr_kd.shards.chosen import Chosen
from asr_kd.targets.store import read_target_shard
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from tests import outside
from tests.labeling.conftest import utterance, write_audio

#: features whose frames are those of the teacher from outside
FEATURES = {"sample_rate": 16000, "mels": 16, "hop_ms": 20, "window_ms": 25, "stack": 1}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(outside.write_wave(tmp_path_factory.mktemp("foreign")))


@pytest.fixture(scope="module")
def ours(foreign: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A teacher of ours with its units and its frames."""
    import torch

    from asr_kd.audio.settings import FeatureSettings

    torch.manual_seed(0)
    features, settings = FeatureSettings(**FEATURES), ModelSettings(kind="blstm", layers=1, size=8)
    units = load_teacher(foreign).units
    model = build_model(settings, features.dimension, units.size)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(3.0)
    folder = tmp_path_factory.mktemp("ours")
    save_checkpoint(folder, model, units, features, settings)
    return str(folder)


@pytest.fixture(scope="module")
def heard(tmp_path_factory: pytest.TempPathFactory) -> Path:
    utterances = [utterance(f"u{number}", 0.6 + 0.13 * (number % 4), number) for number in range(6)]
    return write_audio(tmp_path_factory.mktemp("heard"), [utterances])


@pytest.fixture(scope="module")
def targets(foreign: str, ours: str, heard: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Of both teachers, the one from outside first, with hidden states."""
    folders = []
    for teacher in (foreign, ours):
        folders.append(str(tmp_path_factory.mktemp("labelled") / "targets"))
        hidden = {"mode": "hidden", "taps": ["layer.1"], "keep": "frames", "k": 32, "mass": 1.0}
        given = {"teacher": teacher, "audio": str(heard), "output": folders[-1], "device": "cpu"}
        label(LabelSettings.model_validate(given | hidden))
    return folders


def asked(targets: list[str], audio: Path, output: Path, source: dict[str, object], **more: object) -> TrainSettings:
    given = {"audio": str(audio), "soft": 1.0, "ctc": 0.0} | source
    return TrainSettings.model_validate(
        {
            "output": str(output), "units": targets[0], "development": str(audio), "features": FEATURES,
            "model": {"kind": "lstm", "layers": 1, "size": 16}, "device": "cpu", "batch_frames": 400, "lanes": 1,
            "phases": [{"passes": 2, "learning_rate": 0.01, "sources": [given]}],
        } | more
    )  # fmt: skip


@pytest.mark.parametrize("mode", ["mean", "log_mean", "confidence", "surest"])
def test_it_answers_in_the_step_together_with_one_of_ours(
    foreign: str, ours: str, targets: list[str], heard: Path, tmp_path: Path, mode: str
) -> None:
    """As the two say it of each utterance alone, frame by frame."""
    combined = {"mode": mode} | ({} if mode == "surest" else {"weights": [1.0, 3.0]})
    settings = asked(targets, heard, tmp_path, {"teacher": [foreign, ours], "combine": combined})
    teachers = {name: load_teacher(name) for name in (foreign, ours)}
    stream = PhaseStream(settings, 0, teachers[ours].units, foreigners(teachers))
    batch = next(one for one in stream.batches(stream.start(), 0) if one is not None)
    said = answer({name: one.model for name, one in teachers.items()}, batch, stream.lessons[0])
    order = said["soft.units"].values.argsort(-1)
    found = said["soft.probs"].values.gather(-1, order).split(batch.lengths.tolist())
    sounds = batch.parts["sound"].values.split(batch.parts["sound"].lengths.tolist())
    assert batch.clean is not None
    for row, (frames, sound) in enumerate(zip(found, sounds, strict=True)):
        count = len(frames)
        logs = [
            infer(teachers[foreign], [sound.numpy()[:, None]])[0],
            infer(teachers[ours], [batch.clean[row, :count].numpy()])[0],
        ]
        at = np.minimum(np.arange(count), len(logs[0]) - 1)
        one, other = np.exp(logs[0][at].astype(np.float64)), np.exp(logs[1].astype(np.float64))
        sure = [np.exp((probs * np.log(probs)).sum(1, keepdims=True)) for probs in (one, other)]
        wanted = {
            "mean": one + 3 * other,
            "log_mean": (one * other**3) ** 0.25,
            "confidence": sure[0] * one + 3 * sure[1] * other,
            "surest": np.where(sure[0] > sure[1], one, other),
        }[mode]
        assert np.abs(frames.numpy() - wanted / wanted.sum(1, keepdims=True)).max() < 1e-4


@pytest.mark.parametrize("where", ["stored", "in the step"])
def test_a_student_learns_from_it_and_from_one_of_ours(
    foreign: str, ours: str, targets: list[str], heard: Path, tmp_path: Path, where: str
) -> None:
    """From what both say together, and from their hidden states side by side."""
    source: dict[str, object] = {"targets": targets} if where == "stored" else {"teacher": [foreign, ours]}
    source |= {"combine": {"mode": "log_mean"}, "features": [{"student": "layer.1", "teacher": "layer.1"}]}
    train(asked(targets, heard, tmp_path / "run", source))
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert losses[-1] < losses[0]


REFUSED = [
    ({"source": {"teacher": ["{foreign}", "{ours}"], "combine": {"weights": "development"}}}, "combine.weights: the checkpoint {foreign} has no development WER; give weights as numbers"),
    ({"source": {"teacher": ["hf:some/model", "{ours}"], "combine": {"weights": "development"}}}, "combine.weights: the checkpoint hf:some/model has no development WER"),
    ({"source": {"targets": ["{targets[0]}", "{targets[1]}"], "combine": {"weights": "development"}}}, "combine.weights: {targets[0]}/report.json does not say how the teacher .* did"),
    ({"source": {"teacher": {"run": "{foreign}", "every": 2}}}, "teacher.run: {foreign} is a model from outside, and no run that shares .*: teacher: {foreign}"),
    ({"source": {"teacher": {"run": "torchaudio:HUBERT_ASR_LARGE", "every": 2}}}, "teacher.run: torchaudio:HUBERT_ASR_LARGE is a model from outside"),
    ({"init": "{foreign}"}, "init: {foreign} is a model from outside, .*leave out init, and learn from it as a teacher"),
    ({"init": "hf:some/model@v1"}, "init: hf:some/model@v1 is a model from outside"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "said"), REFUSED)
def test_where_none_can_be(
    foreign: str, ours: str, targets: list[str], heard: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    names = {"foreign": foreign, "ours": ours, "targets": targets}
    given = json.loads(_filled(json.dumps({"source": {"targets": targets[0]}} | changes), names))
    with pytest.raises(UserError, match=_filled(said, names)) as refused:
        train(asked(targets, heard, tmp_path / "run", given.pop("source"), **given))
    assert "\n" not in str(refused.value) and not (tmp_path / "run").exists()


def _filled(text: str, names: dict[str, object]) -> str:
    for name, value in names.items():
        for place, one in (
            [(f"{{{name}[{at}]}}", one) for at, one in enumerate(value)]
            if isinstance(value, list)
            else [(f"{{{name}}}", value)]
        ):
            text = text.replace(place, str(one))
    return text


def test_its_targets_choose_pair_and_plan(targets: list[str], heard: Path, tmp_path: Path) -> None:
    listed = str(tmp_path / "list.jsonl")
    select(SelectionSettings(audio=str(heard), targets=targets[0], output=listed, share=0.5, by="confidence"))
    lines = [json.loads(line) for line in Path(listed).read_text().splitlines()]
    kept = [line["confidence"] for line in lines if line["kept"]]
    assert 0 < len(kept) < 6 and min(kept) >= max(line["confidence"] for line in lines if not line["kept"])
    assert Chosen(listed, str(heard)).shards.samples == len(kept)

    pairs = str(tmp_path / "pairs.jsonl")
    far = write_audio(
        tmp_path / "far", [[utterance(f"u{number}", 0.6 + 0.13 * (number % 4), number) for number in range(6)]]
    )
    pair(PairSettings(heard=str(heard), audio=str(far), output=pairs))
    train(asked(targets, far, tmp_path / "paired", {"targets": targets[0], "pairs": pairs}))
    assert (tmp_path / "paired" / "best" / "checkpoint.json").exists()

    found = plan(PlanSettings(hours=1000.0, audio=str(heard), targets=targets[0], student=str(tmp_path / "paired")))
    stored = sum(path.stat().st_size for path in Path(targets[0]).glob("*.tar"))
    metadata, pairs_of = read_target_shard(Path(targets[0]) / "shard-000000.tar")
    hours = metadata.statistics.audio_seconds / 3600
    assert found.target_bytes == pytest.approx(stored / hours * 1000, rel=0.01) and len(list(pairs_of)) == 6
    assert found.train_device_hours and found.label_device_hours > 0
