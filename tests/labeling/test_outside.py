"""End to end with a teacher of another program: label → targets → verify → train → eval → transcribe."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from asr_kd.audio.settings import FeatureSettings, SoundSettings
from asr_kd.decoding.settings import TranscribeSettings
from asr_kd.decoding.transcribe import transcribe_files, transcribe_shards
from asr_kd.distillation.answers import answer, foreigners
from asr_kd.errors import UserError
from asr_kd.evaluation.job import evaluate
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.labeling.job import label
from asr_kd.labeling.moments import moments
from asr_kd.labeling.settings import LabelSettings, MomentsSettings, VerifySettings
from asr_kd.labeling.verify import verify
from asr_kd.models.acoustic import infer
from asr_kd.models.teachers import load_teacher
from asr_kd.models.units import make_units
from asr_kd.shards.settings import UnitsSettings
from asr_kd.targets.inspect import inspect
from asr_kd.targets.settings import InspectSettings
from asr_kd.targets.store import metadata_of, read_target_shard
from asr_kd.training.batches import PhaseStream
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import load_units
from tests import outside
from tests.labeling.conftest import utterance, write_audio

#: a student whose frames are the teacher's own: no window, and no frame, is elsewhere
SAME_FRAMES = {"sample_rate": 16000, "mels": 16, "hop_ms": 20, "window_ms": 25, "stack": 1}


@pytest.fixture(scope="module")
def foreign(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return outside.write_wave(tmp_path_factory.mktemp("foreign"))


@pytest.fixture(scope="module")
def targets(foreign: Path, audio: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("labelled") / "targets"
    label(LabelSettings(teacher=str(foreign), audio=str(audio), output=str(output), mode="top_k", k=10, device="cpu"))
    return output


def student(targets: Path, audio: Path, output: Path, **changes: object) -> TrainSettings:
    source = {"audio": str(audio), "targets": str(targets), "soft": 1.0, "ctc": 0.0} | dict(changes.pop("source", {}))
    phase = {"passes": 2, "learning_rate": 0.01, "sources": [source]} | dict(changes.pop("phase", {}))
    values = {
        "output": str(output), "units": str(targets), "development": str(audio), "features": SAME_FRAMES,
        "model": {"kind": "lstm", "layers": 1, "size": 16}, "device": "cpu", "batch_frames": 400, "lanes": 1,
        "phases": [phase],
    }  # fmt: skip
    return TrainSettings.model_validate(values | changes)


def test_targets_say_what_the_teacher_says(foreign: Path, audio: Path, targets: Path) -> None:
    metadata, pairs = read_target_shard(targets / "shard-000000.tar")
    assert (metadata.frame_ms, metadata.heard, metadata.features.sample_rate) == (20, "sound", 16000)
    assert isinstance(metadata.features, SoundSettings)
    assert len(dict(pairs)) == 4
    assert metadata.teacher == load_teacher(str(foreign)).fingerprint
    columns = json.loads((targets / "vocabulary.json").read_text())
    units = load_units(targets)
    assert {one["token"]: one["piece"] for one in columns} == {
        "<pad>": "∅", "<s>": None, "</s>": None, "<unk>": "<unk>", "|": "▁", **{letter: letter.lower() for letter in outside.LETTERS}
    }  # fmt: skip
    assert units.decode(units.encode("QUITE the judge")) == "quite the judge"
    assert verify(VerifySettings(targets=str(targets), audio=str(audio), teacher=str(foreign), device="cpu"))


def test_labelling_again_gives_the_same_bytes(foreign: Path, audio: Path, targets: Path, tmp_path: Path) -> None:
    label(
        LabelSettings(
            teacher=str(foreign), audio=str(audio), output=str(tmp_path / "again"), mode="top_k", k=10, device="cpu",
            loader_workers=1,
        )
    )  # fmt: skip
    for path in targets.glob("*.tar"):
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_another_teacher_is_not_taken_for_this_one(audio: Path, targets: Path, tmp_path: Path) -> None:
    other = outside.write_wave(tmp_path / "other", seed=1)
    assert not verify(VerifySettings(targets=str(targets), audio=str(audio), teacher=str(other), device="cpu"))
    with pytest.raises(UserError, match="belongs to other settings"):
        label(
            LabelSettings(teacher=str(other), audio=str(audio), output=str(targets), mode="top_k", k=10, device="cpu")
        )


def test_a_student_learns_and_is_scored_beside_its_teacher(
    foreign: Path, audio: Path, targets: Path, tmp_path: Path
) -> None:
    train(student(targets, audio, tmp_path / "student"))
    losses = [
        json.loads(line)["loss"]
        for line in (tmp_path / "student" / "metrics.jsonl").read_text().splitlines()
        if '"loss"' in line
    ]
    assert losses[-1] < losses[0]
    report = evaluate(
        EvalSettings(
            systems={"teacher": str(foreign), "student": str(tmp_path / "student")}, teacher="teacher", audio=str(audio),
            output=str(tmp_path / "report"), device="cpu", bootstrap=0,
        )
    )  # fmt: skip
    told = report.systems["teacher"]
    assert (told.model.kind, told.features.frame_ms) == ("outside", 20)
    assert "Wav2Vec2ForCTC" in (tmp_path / "report" / "report.json").read_text()


def test_a_student_of_other_frames_resamples(audio: Path, targets: Path, tmp_path: Path) -> None:
    features = FeatureSettings(sample_rate=8000, mels=8).model_dump()
    with pytest.raises(
        UserError, match=r"frame period in ms of the soft targets: 20, expected here: 30; .*resample=true"
    ):
        train(student(targets, audio, tmp_path / "refused", features=features))
    train(student(targets, audio, tmp_path / "student", features=features, source={"resample": True}))
    assert (tmp_path / "student" / "best" / "checkpoint.json").exists()


def test_a_student_of_other_units_is_told_what_to_do(audio: Path, targets: Path, units: object, tmp_path: Path) -> None:
    (tmp_path / "units").mkdir()
    (tmp_path / "units" / "units.model").write_bytes(units.model)  # type: ignore[attr-defined]
    with pytest.raises(
        UserError, match=r"units of the soft targets: .*asr-kd units teacher=.*texts.*transcribe.*features"
    ):
        train(student(targets, audio, tmp_path / "student", units=str(tmp_path / "units")))


def test_units_of_a_teacher(foreign: Path, targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_units(UnitsSettings(teacher=str(foreign), output=str(tmp_path / "units")))
    assert load_units(tmp_path / "units").hash == load_units(targets).hash
    assert "the 30 units of" in capsys.readouterr().out


def test_tokens_that_no_text_becomes_are_told(audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = outside.write_wave(tmp_path / "dotted")
    outside.write_tokens(folder, [*outside.TOKENS[:-1], "…"])
    make_units(UnitsSettings(teacher=str(folder), output=str(tmp_path / "units")))
    assert f"{folder}: no text becomes 1 of its tokens, which Unicode's NFKC changes: '…'" in capsys.readouterr().out
    label(LabelSettings(teacher=str(folder), audio=str(audio), output=str(tmp_path / "targets"), device="cpu"))
    assert "no text becomes 1 of its tokens" in capsys.readouterr().err


def test_it_transcribes_files_and_shards(
    foreign: Path, audio: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import soundfile

    rng = np.random.default_rng(0)
    soundfile.write(tmp_path / "long.wav", rng.normal(0, 0.1, 7 * 16000), 16000)
    for window in (60.0, 5.0):  # whole, and by windows
        transcribe_files(
            TranscribeSettings(checkpoint=str(foreign), window_seconds=window), [str(tmp_path / "long.wav")]
        )
    assert len(capsys.readouterr().out.splitlines()) == 2
    output = tmp_path / "texts.jsonl"
    transcribe_shards(TranscribeSettings(checkpoint=str(foreign), audio=str(audio), output=str(output), device="cpu"))
    assert len(output.read_text().splitlines()) == 12
    with pytest.raises(UserError, match="kind outside hears whole utterances"):
        from asr_kd.decoding.transcribe import transcribe_stream

        transcribe_stream(TranscribeSettings(checkpoint=str(foreign), stream=True), str(tmp_path / "long.wav"))


def test_its_targets_are_shown(audio: Path, targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect(
        InspectSettings(
            targets=str(targets), key="s0-u0", units=str(targets), audio=str(audio), png=str(tmp_path / "x.png")
        )
    )
    assert "frames of 20 ms" in capsys.readouterr().out
    assert (tmp_path / "x.png").stat().st_size > 1000


def online(foreign: Path, targets: Path, audio: Path, output: Path, **changes: object) -> TrainSettings:
    source = {"targets": None, "teacher": str(foreign), "augment": {"noise": {"share": 1.0}}} | dict(
        changes.pop("source", {})
    )
    return student(targets, audio, output, source=source, **changes)


@pytest.mark.parametrize("stack", [1, 2])
def test_it_answers_in_the_step(foreign: Path, targets: Path, audio: Path, tmp_path: Path, stack: int) -> None:
    """What it says of the sound without noise, frame by frame of the student's own features."""
    features = SAME_FRAMES if stack == 1 else {"sample_rate": 8000, "mels": 8, "stack": 2}
    settings = online(foreign, targets, audio, tmp_path / "run", features=features)
    teacher, units = load_teacher(str(foreign)), load_units(targets)
    stream = PhaseStream(settings, 0, units, foreigners({str(foreign): teacher}))
    batch = next(one for one in stream.batches(stream.start(), 0) if one is not None)
    said = answer({str(foreign): teacher.model}, batch, stream.lessons[0])
    order = said["soft.units"].values.argsort(-1)
    found = said["soft.probs"].values.gather(-1, order).split(batch.lengths.tolist())
    sounds = [one.numpy()[:, None] for one in batch.parts["sound"].values.split(batch.parts["sound"].lengths.tolist())]
    for frames, sound in zip(found, sounds, strict=True):
        wanted = np.exp(infer(teacher, [sound])[0])
        assert len(wanted) - len(frames) in (0, 1)
        assert np.abs(frames.numpy() - wanted[: len(frames)]).max() < 1e-5


def test_a_student_learns_from_it_in_the_step(foreign: Path, targets: Path, audio: Path, tmp_path: Path) -> None:
    losses = []
    for workers in (0, 1):
        train(online(foreign, targets, audio, tmp_path / str(workers), loader_workers=workers))
        lines = (tmp_path / str(workers) / "metrics.jsonl").read_text().splitlines()
        losses.append([json.loads(line)["loss"] for line in lines if '"loss"' in line])
    assert losses[0] == losses[1]
    assert losses[0][-1] < losses[0][0]


def test_a_student_learns_its_hidden_states_in_the_step(
    foreign: Path, targets: Path, audio: Path, tmp_path: Path
) -> None:
    source = {"features": [{"student": "layer.1", "teacher": "layer.2"}]}
    train(online(foreign, targets, audio, tmp_path / "run", source=source))
    assert (tmp_path / "run" / "best" / "checkpoint.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"features": {"sample_rate": 16000, "mels": 8}},
            "has frames of 20 ms from 0 ms on, this run of 30 ms; .*resample=true",
        ),
        ({"source": {"augment": {"stretch": 0.1}}}, "augment.stretch changes what the student hears"),
        (
            {
                "source": {"audio": None, "augment": {}, "generated": {"kind": "noise", "utterances": 4}},
                "phase": {"hours": 0.01, "passes": None},
            },
            "generated makes features and no sound",
        ),
        ({"phase": {"chunks": {"frames": 20}}}, "chunks cut what the student hears"),
    ],
)
def test_what_a_teacher_in_the_step_cannot_do(
    foreign: Path, targets: Path, audio: Path, tmp_path: Path, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        train(online(foreign, targets, audio, tmp_path / "run", **changes))


@pytest.mark.parametrize("mode", ["alignment", "occupancy", "mass", "sampled"])
def test_all_modes(foreign: Path, audio: Path, tmp_path: Path, mode: str) -> None:
    label(
        LabelSettings.model_validate(
            {"teacher": str(foreign), "audio": str(audio), "output": str(tmp_path / mode), "mode": mode}
        )
    )
    assert metadata_of(tmp_path / mode).statistics.utterances == 4


def test_hidden_states_are_learned(foreign: Path, audio: Path, tmp_path: Path) -> None:
    settings = LabelSettings(
        teacher=str(foreign),
        audio=str(audio),
        output=str(tmp_path / "targets"),
        mode="hidden",
        taps=["layer.2"],
        keep="frames",
    )
    label(settings)
    held = metadata_of(tmp_path / "targets").hidden
    assert held is not None and held.taps == {"layer.2": 16}


def test_sound_too_short_for_a_teacher_in_the_step_is_not_learned(foreign: Path, targets: Path, tmp_path: Path) -> None:
    """It fills a frame of the student, and none of the teacher's."""
    audio = write_audio(
        tmp_path / "audio",
        [[utterance(f"u{number}", seconds, number) for number, seconds in enumerate((0.7, 0.022, 0.8))]],
    )
    features = SAME_FRAMES | {"window_ms": 20}
    settings = online(
        foreign, targets, audio, tmp_path / "run", features=features, development=str(tmp_path / "audio"), max_bad_share=0.5
    )  # fmt: skip
    teacher = load_teacher(str(foreign))
    stream = PhaseStream(settings, 0, load_units(targets), foreigners({str(foreign): teacher}))
    batch = next(one for one in stream.batches(stream.start(), 0) if one is not None)
    assert len(batch.lengths) == 2
    assert stream.sources[0].met.unused == (
        "u1",
        "too short: 352 samples, the network needs 400 for one frame of 20 ms",
    )


def in_bfloat16(foreign: Path, audio: Path, output: Path) -> LabelSettings:
    return LabelSettings(
        teacher=str(foreign),
        audio=str(audio),
        output=str(output),
        mode="top_k",
        k=10,
        device="cpu",
        precision="bfloat16",
    )


def test_it_labels_in_bfloat16(
    foreign: Path, audio: Path, targets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "targets"
    label(in_bfloat16(foreign, audio, output))
    mark = load_teacher(str(foreign), precision="bfloat16").fingerprint
    assert metadata_of(output).teacher == mark != metadata_of(targets).teacher
    with pytest.raises(UserError, match="belongs to other settings"):  # not half of each
        label(in_bfloat16(foreign, audio, targets))
    wanted = VerifySettings(targets=str(output), audio=str(audio), teacher=str(foreign), device="cpu")
    with pytest.raises(UserError, match=r"was labelled with other settings; give precision=bfloat16 \(not float32\)"):
        verify(wanted)
    capsys.readouterr()
    assert verify(wanted.model_copy(update={"precision": "bfloat16"}))
    assert "largest difference 0.00000" in capsys.readouterr().out
    near, exact = (dict(read_target_shard(folder / "shard-000000.tar")[1]) for folder in (output, targets))
    assert any((near[key].log_probs != exact[key].log_probs).any() for key in exact)


def test_a_system_from_outside_is_scored_in_bfloat16_beside_one_of_ours(
    foreign: Path, teacher: Path, audio: Path, tmp_path: Path
) -> None:
    systems = {"foreign": str(foreign), "ours": str(teacher)}
    settings = EvalSettings(
        systems=systems,
        audio=str(audio),
        output=str(tmp_path / "report"),
        device="cpu",
        bootstrap=0,
        precision="bfloat16",
    )
    report = evaluate(settings)
    assert report.systems["foreign"].fingerprint == load_teacher(str(foreign), precision="bfloat16").fingerprint
    assert report.systems["ours"].fingerprint == load_teacher(str(teacher)).fingerprint
    said = json.loads((tmp_path / "report" / "report.json").read_text())
    assert (
        said["systems"]["foreign"]["model"]["precision"] == "bfloat16" and said["settings"]["precision"] == "bfloat16"
    )
    with pytest.raises(UserError, match="precision: ours is a checkpoint of asr_kd, which answers in float32"):
        evaluate(settings.model_copy(update={"systems": {"ours": str(teacher)}}))
    with pytest.raises(UserError, match="precision"):  # other scores would stand in the same folder
        evaluate(settings.model_copy(update={"precision": "float32"}))


def test_bfloat16_is_written_only_where_it_is_used(foreign: Path, audio: Path, targets: Path) -> None:
    held = load_teacher(str(foreign)).settings.model_dump()
    assert "precision" not in held and "precision" not in (targets / "job.json").read_text()
    assert "precision" not in TranscribeSettings(checkpoint="x").model_dump()


def test_texts_in_bfloat16(foreign: Path, teacher: Path, audio: Path, tmp_path: Path) -> None:
    settings = TranscribeSettings(
        checkpoint=str(foreign),
        audio=str(audio),
        output=str(tmp_path / "texts.jsonl"),
        device="cpu",
        precision="bfloat16",
    )
    transcribe_shards(settings)
    assert len((tmp_path / "texts.jsonl").read_text().splitlines()) == 12
    with pytest.raises(UserError, match=f"precision: {teacher} is a checkpoint of asr_kd"):
        transcribe_shards(settings.model_copy(update={"checkpoint": str(teacher)}))


def test_it_answers_in_a_step_of_bfloat16(foreign: Path, targets: Path, audio: Path, tmp_path: Path) -> None:
    losses = {}
    for precision in ("float32", "bfloat16"):
        train(online(foreign, targets, audio, tmp_path / precision, precision=precision))
        lines = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        losses[precision] = [json.loads(line)["loss"] for line in lines if '"loss"' in line]
    assert losses["float32"] != losses["bfloat16"]
    assert np.allclose(*losses.values(), rtol=0.05)


def test_moments_are_of_features(foreign: Path, audio: Path, tmp_path: Path) -> None:
    settings = MomentsSettings(teacher=str(foreign), audio=str(audio), output=str(tmp_path / "moments.safetensors"))
    with pytest.raises(UserError, match=f"teacher: {foreign} hears sound, .*train a student on its targets"):
        moments(settings)
