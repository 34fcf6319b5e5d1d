from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import asr_kd
from asr_kd.api.recogniser import Recogniser
from asr_kd.cli import main
from tests.api.conftest import RATE, sound


def by_command(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, object]:
    """What `asr-kd transcribe` finds in a file."""
    capsys.readouterr()
    assert main(["transcribe", *words, "details=true"]) == 0
    found: dict[str, object] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("checkpoint", ["student", "teacher"])
@pytest.mark.parametrize("settings", [{}, {"decoder": "beam", "nbest": 3}])
@pytest.mark.parametrize("seconds", [2.0, 12.0])  # within what is heard at once, and longer
def test_files_and_arrays_have_the_text_of_the_command(
    here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkpoint: str, settings: dict[str, object], seconds: float
) -> None:  # fmt: skip
    file, more = tmp_path / "a.flac", {**settings, "window_seconds": 5.0, "device": "cpu"}
    soundfile.write(file, np.stack([sound(seconds), sound(seconds, 1)], 1), RATE)
    words = [f"{name}={value}" for name, value in more.items()]
    expected = by_command(capsys, f"checkpoint={checkpoint}", str(file), *words)
    asr = asr_kd.load(here / checkpoint, **more)  # type: ignore[arg-type]
    heard = asr.transcribe(file)
    assert heard.text == str(heard) == expected["text"] != ""
    assert [word.text for word in heard.words] == [word["word"] for word in expected["words"]]  # type: ignore[attr-defined]
    if seconds < 5:
        assert [one.text for one in heard.alternatives] == [one["text"] for one in expected["nbest"]]  # type: ignore[attr-defined]
    samples, rate = soundfile.read(file)
    for array in (samples, samples.astype(np.float32), torch.from_numpy(samples)):
        assert asr.transcribe(array, rate) == heard or seconds > 5
        assert asr.transcribe(array, rate).text == heard.text


def test_recordings_are_cut_as_by_the_command(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = np.zeros(2 * RATE, np.float32)
    samples = np.concatenate([quiet, sound(2.0), quiet, sound(3.0, 1), quiet])
    soundfile.write(tmp_path / "a.wav", samples, RATE, subtype="FLOAT")
    words = ("segment={detector: energy}", "checkpoint=student", "device=cpu", str(tmp_path / "a.wav"))
    expected = by_command(capsys, *words)
    asr = asr_kd.load(here / "student", device="cpu", segment={"detector": "energy"})
    for heard in (asr.transcribe(tmp_path / "a.wav"), asr.transcribe(samples, RATE)):
        assert heard.text == expected["text"] != ""
        assert [word.start for word in heard.words] == [
            pytest.approx(word["start"], abs=0.001) for word in expected["words"]
        ]  # type: ignore[attr-defined]
        assert len(heard.alternatives) == 1
    assert asr.transcribe(quiet, RATE).words == []
    with pytest.raises(asr_kd.UserError, match="segment: posteriors are of a recording as a whole"):
        asr.posteriors(samples, RATE)


@pytest.mark.parametrize("rate", [8000, 16000, 22050])
@pytest.mark.parametrize("kind", [np.float32, np.int16])
def test_a_stream_knows_the_words_of_the_whole(here: Path, rate: int, kind: type) -> None:
    samples = np.repeat(sound(3.0), 3)[: 3 * rate]
    samples = (samples * 20000).astype(kind) if kind is np.int16 else samples.astype(kind)
    asr = asr_kd.load("student", device="cpu")
    expected, stream = asr.transcribe(samples, rate), asr.stream(rate)
    words, buffer = [], np.empty(1700, kind)
    for piece in itertools.chain([samples[:0]], np.split(samples, range(1700, len(samples), 1700))):
        buffer[: len(piece)] = piece  # as of a microphone, which uses its memory again
        words += stream.push(buffer[: len(piece)])
        buffer[:] = 0
        assert stream.text == " ".join(word.text for word in [*words, *stream.rest])
    words += stream.finish()
    assert stream.text == " ".join(word.text for word in words) == expected.text != ""
    assert stream.finish() == stream.rest == []
    with pytest.raises(asr_kd.UserError, match=r"the stream: has ended; begin another"):
        stream.push(samples)


def test_posteriors_are_what_the_text_is_made_of(here: Path) -> None:
    asr = asr_kd.load("teacher", device="cpu")
    found = asr.posteriors("talk.wav")
    assert found.log_probs.shape == (len(found.seconds), asr.units.size)
    np.testing.assert_allclose(np.exp(found.log_probs).sum(1), 1.0, rtol=1e-5)
    assert (found.frame_ms, found.seconds[:2].tolist(), found.units) == (30, [0.0, 0.03], asr.units)
    best = found.log_probs.argmax(1)
    said = asr.units.decode([unit for unit, before in zip(best, [0, *best], strict=False) if unit != before])
    assert said.strip() == asr.transcribe("talk.wav").text != ""
    samples, rate = soundfile.read("talk.wav")
    np.testing.assert_array_equal(asr.posteriors(samples, rate).log_probs, found.log_probs)
    long = asr_kd.load("teacher", device="cpu", window_seconds=5.0)
    assert len(long.posteriors(np.tile(samples, 6), rate).log_probs) == pytest.approx(6 * len(best), abs=6)


def test_posteriors_are_those_that_labelling_stores(here: Path) -> None:
    asr, targets = asr_kd.load("teacher", device="cpu"), asr_kd.soft_targets("targets")
    for sample in asr_kd.dataset("shards", handler=lambda error: True):
        probs = np.exp(asr.posteriors(sample["waveform"], sample["sample_rate"]).log_probs)
        target = targets[sample["__key__"]]
        kept = np.take_along_axis(probs, target.indices, 1)
        np.testing.assert_allclose(np.where(target.probabilities > 0, kept, 0), target.probabilities, atol=0.03)


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        (lambda asr: asr_kd.load("nothing"), r"nothing: there is no such folder; give that of a training run or of a checkpoint"),
        (lambda asr: asr_kd.load("talk.wav"), r"talk\.wav: is a file; a checkpoint is the folder that train writes"),
        (lambda asr: asr_kd.load("shards"), r"shards: is a folder of audio shards, no checkpoint; give the folder that train writes"),
        (lambda asr: asr_kd.load("student", decodr="beam"), r"asr_kd\.load: unknown key decodr; did you mean decoder\?"),
        (lambda asr: asr_kd.load("student", beam="8"), r"asr_kd\.load: beam: .*\(given: '8'\)"),
        (lambda asr: asr_kd.load("student", output="x"), r"asr_kd\.load: output is a setting of the command"),
        (lambda asr: asr_kd.load("student", lm=Path("no.arpa"), decoder="beam"), r"no\.arpa: language model: cannot be read"),
        (lambda asr: asr_kd.load("teacher").stream(), r"teacher: kind blstm hears whole utterances; a stream needs a model of kind lstm"),
        (lambda asr: asr.transcribe("none.wav"), r"none\.wav: cannot be read \(No such file or directory\); check the path"),
        (lambda asr: asr.transcribe("talk.wav", 8000), r"rate: talk\.wav is a file, which says its own; leave it out"),
        (lambda asr: asr.transcribe(sound(1.0)), r"the array: needs its rate in Hz, such as rate=16000"),
        (lambda asr: asr.transcribe(sound(1.0)[None], 8000), r"the array: must be \[samples\] or \[samples, channels\], not \[1, 8000\]"),
        (lambda asr: asr.transcribe([], 8000), r"the array: holds no samples"),
        (lambda asr: asr.transcribe([0.1] * 5, 8000), r"the array: too short"),
        (lambda asr: asr.posteriors([float("nan")] * 8000, 8000), r"the array: holds samples that are not numbers"),
        (lambda asr: asr.stream(3).push(sound(1.0)), r"the stream: needs its sample rate in Hz, not 3"),
        (lambda asr: asr.stream(0).push(sound(1.0)), r"the stream: needs its sample rate in Hz, not 0"),
        (lambda asr: asr.transcribe([[0.1, 0.2], [0.3]], 8000), r"the array: must be \[samples\] or \[samples, channels\], with as many"),
        (lambda asr: asr.stream().push(np.zeros((8, 0))), r"the stream: must be \[samples\] or \[samples, channels\], not \[8, 0\]"),
        (lambda asr: asr.stream().push(np.zeros((2, 2, 2))), r"the stream: must be \[samples\]"),
        (lambda asr: asr.stream().finish(), r"the stream: too short"),
    ],
)  # fmt: skip
def test_mistakes_get_one_sentence(here: Path, ask, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(asr_kd.UserError, match=f"^{words}") as error:
        ask(asr_kd.load("student"))
    assert "\n" not in str(error.value)


def test_a_teacher_from_outside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed; `pip install 'asr-kd[hf]'` does it")
    from tests.outside import write_wave

    folder = write_wave(tmp_path / "wave")
    soundfile.write(tmp_path / "a.wav", sound(1.5), RATE)
    asr = asr_kd.load(folder, device="cpu")
    heard = asr.transcribe(tmp_path / "a.wav")
    assert heard.text == by_command(capsys, f"checkpoint={folder}", str(tmp_path / "a.wav"), "device=cpu")["text"] != ""
    posteriors = asr.posteriors(sound(1.5), RATE)
    assert (posteriors.frame_ms, posteriors.log_probs.shape[1]) == (20, asr.units.size)
    assert (asr.sample_rate, asr.streams) == (16000, False) and "outside, 16000 Hz" in repr(asr)


def test_a_model_that_writes_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed; `pip install 'asr-kd[hf]'` does it")
    from tests.outside import save_whisper

    save_whisper(tmp_path / "whisper")
    soundfile.write(tmp_path / "a.wav", sound(1.5), RATE)
    asr = asr_kd.load(tmp_path / "whisper", device="cpu")
    heard = asr.transcribe(tmp_path / "a.wav")
    assert (
        heard.text
        == by_command(capsys, f"checkpoint={tmp_path}/whisper", str(tmp_path / "a.wav"), "device=cpu")["text"]
    )
    samples, rate = soundfile.read(tmp_path / "a.wav")
    assert (asr.transcribe(samples, rate), heard.words, asr.streams) == (heard, [], False)
    assert "writes text" in repr(asr)
    for ask in (lambda: asr.posteriors(samples, rate), lambda: asr.units, asr.stream):
        with pytest.raises(asr_kd.UserError, match=r"whisper: (writes text, and has no|hears whole utterances, and)"):
            ask()


def test_a_recogniser_changes_nothing_of_the_program_around_it(here: Path) -> None:
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    asr = asr_kd.load("student", device="cpu")
    assert isinstance(asr, Recogniser) and asr.transcribe("talk.wav").text
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
