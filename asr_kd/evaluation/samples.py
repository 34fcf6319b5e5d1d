"""What the page lets one hear and see of a few utterances: their audio, and what teacher and student made of one."""

from __future__ import annotations

import base64
import io
import sys
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np

from asr_kd.audio.decode import decode, encode
from asr_kd.audio.features import Frontend, frontend_of
from asr_kd.errors import AudioError, UserError
from asr_kd.evaluation.charts import Heat
from asr_kd.evaluation.schema import Report
from asr_kd.evaluation.schema import Sample as Listed
from asr_kd.evaluation.settings import EvalSettings
from asr_kd.evaluation.utterances import Identity
from asr_kd.models.acoustic import infer, pick_device
from asr_kd.models.teachers import load_teacher
from asr_kd.shards.tarset import Sample, read_index, read_listed

CLIP_BYTES = 3_500_000  # of all clips together, in base64
CLIP_RATE = 16_000  # Hz; for listening, more adds bytes alone
PICTURE_SECONDS = 12.0  # of the utterance whose posteriors are drawn
UNITS = 14  # units with most mass that a picture shows
FAINT = 0.05  # units that never reach this probability are not shown
BLANK = "∅"  # as `Units.piece` writes it


@dataclass(frozen=True)
class Clip:
    """An utterance to listen to: MP3 in base64, or why there is none."""

    seconds: float
    audio: str = ""
    problem: str = ""


@dataclass
class Evidence:
    """Clips by identity, and pictures of one of these utterances: its spectrogram, then posteriors."""

    clips: dict[Identity, Clip] = field(default_factory=dict)
    shown: Identity | None = None
    pictures: list[Heat] = field(default_factory=list)


def gather(report: Report, drawn: list[str]) -> Evidence:
    """Fetch the report's samples from the shards, and draw what these systems make of the first that is short enough.

    An utterance whose audio is gone or cannot be read keeps its place, with the reason.
    """
    evidence, left = Evidence(), CLIP_BYTES
    heard: dict[Identity, Sample] = {}
    for one in report.samples:
        identity = one.identity
        try:
            sample = _fetch(report.settings.audio, one)
            waveform, rate = decode(sample.audio, one.key, None, report.settings.max_seconds)
            if rate > CLIP_RATE:
                waveform, rate = decode(sample.audio, one.key, CLIP_RATE, report.settings.max_seconds)
        except (AudioError, UserError, OSError) as error:
            evidence.clips[identity] = Clip(0.0, problem=f"cannot be played: {error}")
            continue
        heard[identity] = sample
        seconds, audio = len(waveform) / rate, base64.b64encode(encode(waveform, rate, "MP3")).decode()
        evidence.clips[identity] = Clip(seconds, problem="left out to keep the page small")
        if len(audio) <= left:
            left -= len(audio)
            evidence.clips[identity] = Clip(seconds, audio)
    short = [one for one in heard if 0 < evidence.clips[one].seconds <= PICTURE_SECONDS]
    evidence.shown = next(iter(short or heard), None)
    if evidence.shown is not None and find_spec("matplotlib") is None:
        print("report: without pictures, as matplotlib is not installed (asr-kd[report])", file=sys.stderr)
    elif evidence.shown is not None:
        evidence.pictures = _pictures(report.settings, heard[evidence.shown], drawn)
    return evidence


def _fetch(audio: str | list[str] | dict[str, str | list[str]], one: Listed) -> Sample:
    folder = audio[one.set] if isinstance(audio, dict) else audio
    shard = next((info for info in read_index(folder) if info.name == one.shard), None)
    for sample in read_listed(folder, shard) if shard else ():
        if sample.key == one.key:
            return sample
    raise UserError(f"{folder}/{one.shard}: {one.key} is not there any more; make the report again")


def _pictures(settings: EvalSettings, sample: Sample, drawn: list[str]) -> list[Heat]:
    """Spectrogram and posteriors of one utterance, all with the same time axis; posteriors with the same rows."""
    spectrum, posteriors = None, []
    for name in drawn:
        checkpoint = load_teacher(settings.systems[name], pick_device("cpu"))
        waveform, _ = decode(sample.audio, sample.key, checkpoint.features.sample_rate, settings.max_seconds)
        frames = round(1000 * PICTURE_SECONDS / checkpoint.frame_ms)
        # rounded as in training and in scoring
        features = frontend_of(checkpoint.features).compute(waveform)
        probs = np.exp(infer(checkpoint, [features])[0][:frames])
        seconds = len(probs) * checkpoint.frame_ms / 1000
        posteriors.append((name, probs, [checkpoint.units.piece(unit) for unit in range(probs.shape[1])], seconds))
        if spectrum is None:
            like = checkpoint.features.shown
            shown = Frontend(like).compute(waveform)[: round(1000 * PICTURE_SECONDS / like.frame_ms)]
            mels = shown.astype(np.float32).reshape(-1, like.mels)
            low, high = np.percentile(mels, [2, 99.8])
            picture = _png(mels.T[::-1], "magma", low, max(high, low + 1e-3))
            spectrum = Heat("Spectrogram", picture, ["high mel", "low mel"], len(shown) * like.frame_ms / 1000)
    rows = _rows([(probs, pieces) for _, probs, pieces, _ in posteriors])
    pictures = [spectrum] if spectrum else []
    for name, probs, pieces, seconds in posteriors:
        rows_of = {piece: unit for unit, piece in enumerate(pieces)}
        image = np.stack([probs[:, rows_of[row]] if row in rows_of else np.zeros(len(probs)) for row in rows])
        pictures.append(Heat(name, _png(image, "viridis", 0.0, 1.0), rows, seconds))
    return pictures


def _rows(posteriors: list[tuple[np.ndarray, list[str]]]) -> list[str]:
    """The units that some system gives most mass, the blank first, then as they peak, so that speech runs downwards."""
    mass: dict[str, float] = {}
    peak: dict[str, float] = {}
    for probs, pieces in posteriors:
        totals, best = probs.sum(0).tolist(), probs.argmax(0).tolist()
        for unit in np.flatnonzero(probs.max(0) >= FAINT):
            piece = pieces[unit]
            if totals[unit] > mass.get(piece, 0.0):
                mass[piece], peak[piece] = totals[unit], best[unit] / len(probs)
    heaviest = sorted(mass, key=lambda piece: -mass[piece])[:UNITS]
    return sorted(heaviest, key=lambda piece: (piece != BLANK, peak[piece], piece))


def _png(values: np.ndarray, colours: str, low: float, high: float) -> str:
    import matplotlib.image

    data = io.BytesIO()
    matplotlib.image.imsave(data, np.ascontiguousarray(values), cmap=colours, vmin=low, vmax=high, format="png")
    return base64.b64encode(data.getvalue()).decode()
