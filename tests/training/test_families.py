"""Networks that stream, from training to words: each learns the tones, stops and goes on to the same bits, and is transcribed as it hears."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from asr_kd.audio.decode import decode
from asr_kd.audio.features import Frontend
from asr_kd.cli import main
from asr_kd.decoding.decoder import make_decoder
from asr_kd.decoding.settings import DecodingSettings
from asr_kd.models.acoustic import build_model, infer, load_checkpoint, save_checkpoint
from asr_kd.models.settings import ModelSettings
from asr_kd.shards.tarset import read_index, read_shard
from asr_kd.training import phase
from asr_kd.training.settings import TrainSettings
from asr_kd.training.trainer import train
from asr_kd.units import Units
from tests.training.conftest import FEATURES
from tests.training.test_step import FAMILIES

Job = Callable[..., TrainSettings]
families = pytest.mark.parametrize("kind", FAMILIES)


def model_of(kind: str) -> dict[str, Any]:
    return {"kind": kind, "layers": 2, "size": 16, **FAMILIES[kind]}


@families
def test_it_learns_the_words_and_says_them_while_it_hears(
    job: Job, kind: str, development: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = job(phase={"passes": 15, "learning_rate": 0.01}, model=model_of(kind), evaluate_every=20)
    train(settings)
    trained = load_checkpoint(settings.output)
    assert trained.training["development_wer"] < 0.5 and trained.settings == settings.model
    assert trained.lookahead_ms is not None and trained.lookahead_ms < 200
    (first, *_) = read_index(Path(development))
    sounds = [soundfile.read(io.BytesIO(one.audio))[0] for one in read_shard(Path(development) / first.name)]
    file = tmp_path / "sound.wav"
    soundfile.write(file, np.concatenate(sounds[:3]), 8000)
    capsys.readouterr()
    words = ["transcribe", f"checkpoint={settings.output}", "device=cpu"]
    assert main([*words, str(file)]) == 0
    text = capsys.readouterr().out.strip()
    assert main([*words, "--stream", str(file), "piece_ms=37"]) == 0
    streamed = capsys.readouterr().out.splitlines()
    assert len(text) > 2 and streamed[-1] == text
    features = Frontend(trained.features).compute(decode(file.read_bytes(), "sound", 8000, 60.0)[0])
    assert make_decoder(DecodingSettings(), trained)(infer(trained, [features])[0])[0].text == text


class Killed(BaseException):
    pass


@families
def test_killed_in_carried_chunks_it_goes_on_to_the_same_bits(
    job: Job, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = job(phase={"passes": 1, "chunks": {"frames": 9, "carry": True}}, model=model_of(kind), evaluate_every=2)
    run, steps, real = Path(settings.output), 0, phase.step
    train(settings)
    run.rename(tmp_path / "whole")

    def killed(*arguments: Any, **named: Any) -> float:
        nonlocal steps
        steps += 1
        if steps == 4:
            raise Killed
        return real(*arguments, **named)

    monkeypatch.setattr(phase, "step", killed)
    with pytest.raises(Killed):
        train(settings)
    train(settings)
    for name in ("last/state.safetensors", "best/model.safetensors"):
        assert (run / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("kind", ["blstm", "conv", "conformer"])
def test_what_hears_whole_utterances_neither_carries_nor_streams(
    job: Job, kind: str, units: Units, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(
        ValueError, match=r"chunks\.carry needs a network that streams.* lstm, separable, chunked_conformer, emformer"
    ):
        job(phase={"chunks": {"frames": 9, "carry": True}}, model={"kind": kind})
    settings = ModelSettings(kind=kind, layers=1, size=8)
    save_checkpoint(tmp_path, build_model(settings, FEATURES.dimension, units.size), units, FEATURES, settings)
    assert main(["transcribe", f"checkpoint={tmp_path}", "device=cpu", "--stream", "a.wav"]) == 2
    said = f"kind {kind} hears whole utterances; --stream needs a model of kind lstm, separable, chunked_conformer, emformer\n"
    assert capsys.readouterr().err.endswith(said)
