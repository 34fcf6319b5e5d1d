"""Whether a graph says what its checkpoint says: a set of shards through both, compared."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from asr_kd.audio.decode import decode
from asr_kd.audio.features import frontend_of
from asr_kd.audio.settings import FeatureSettings
from asr_kd.audio.spectrum import spectrum_of
from asr_kd.decoding.decoder import make_decoder
from asr_kd.decoding.listening import StreamingNetwork
from asr_kd.decoding.settings import DecodingSettings
from asr_kd.decoding.wer import character_errors, word_errors
from asr_kd.ending import stop_if_asked
from asr_kd.errors import AudioError, UserError
from asr_kd.export.running import MODEL, QUANTIZED, TOKENS, Stream, TOne, session_of
from asr_kd.export.settings import ExportSettings, Interface
from asr_kd.export.sherpa import has_sherpa, recogniser_of, sherpa_runs
from asr_kd.export.zipformer2 import Zipformer2
from asr_kd.models.acoustic import OwnCheckpoint, infer
from asr_kd.progress import Progress
from asr_kd.shards.tarset import read_checked, read_index
from asr_kd.text import NORMALIZERS


@dataclass(frozen=True)
class Limits:
    """What may differ: of texts a share of the characters (`WORD` at least), of frames the share with another best unit, the mean difference
    of log-probabilities in nat, and of the WER, where there are texts.

    Not a share of the utterances: where a network is unsure, as it is of speakers that it does not know, each long one has a frame on the edge.
    """

    characters: float
    frames: float
    log_prob: float
    wer: float


#: by whether a graph is quantised
LIMITS = {False: Limits(0.002, 0.002, 0.01, 0.001), True: Limits(0.01, 0.02, 0.5, 0.01)}
#: characters that may differ in the shortest set: a word
WORD = 5


@dataclass
class Compared:
    """What a runtime said beside the checkpoint."""

    utterances: int = 0
    same_texts: int = 0
    characters: int = 0
    other_characters: int = 0
    frames: int = 0
    other_best: int = 0
    largest: float = 0.0
    total: float = 0.0
    numbers: int = 0
    words: int = 0
    errors: int = 0
    own_errors: int = 0
    differing: list[str] = field(default_factory=list)

    def add_text(self, key: str, said: str, own: str, reference: str | None) -> None:
        """Compare texts.

        Args:
            key: of the utterance.
            said: what the graph made of it.
            own: what the checkpoint made of it.
            reference: what was said, where that is known.
        """
        self.utterances += 1
        said, own = (
            " ".join(said.split()),
            " ".join(own.split()),
        )  # some clients print a space for each that was emitted
        self.same_texts += said == own
        self.characters += len(own)
        if said != own:
            self.other_characters += character_errors(own, said)
            self.differing.append(f"{key}: {own!r} became {said!r}")
        if reference is not None:
            basic = NORMALIZERS["basic"].apply
            self.words += len(basic(reference).split())
            self.errors += sum(word_errors(basic(reference), basic(said)))
            self.own_errors += sum(word_errors(basic(reference), basic(own)))

    def add_rows(self, said: np.ndarray, own: np.ndarray) -> None:
        """Compare log-probabilities [frames, units]."""
        difference = np.abs(said - own)
        self.frames += len(own)
        self.other_best += int((said.argmax(1) != own.argmax(1)).sum())
        self.largest = max(self.largest, float(difference.max(initial=0.0)))
        self.total += float(difference.sum(dtype=np.float64))
        self.numbers += difference.size

    def figures(self) -> dict[str, Any]:
        """As they stand in export.json."""
        found: dict[str, Any] = {"utterances": self.utterances, "same_texts": self.same_texts}
        found |= {"characters": self.characters, "other_characters": self.other_characters}
        if self.frames:
            found |= {"frames": self.frames, "other_best_unit": self.other_best}
            found |= {"largest_difference": _short(self.largest), "mean_difference": _short(self.total / self.numbers)}
        if self.words:
            found |= {
                "words": self.words,
                "wer": _short(self.errors / self.words),
                "checkpoint_wer": _short(self.own_errors / self.words),
            }
        return found

    def told(self) -> str:
        """The same in words."""
        parts = [f"{self.same_texts:,} of {self.utterances:,} texts the same"]
        if self.words:
            parts.append(f"WER {self.errors / self.words:.2%} (the checkpoint's {self.own_errors / self.words:.2%})")
        if self.frames:
            parts.append(f"{self.other_best:,} of {self.frames:,} frames with another best unit")
            parts.append(f"log-probabilities off by {self.total / self.numbers:.1g} nat, at most {self.largest:.1g}")
        return ", ".join(parts)

    def beyond(self, limits: Limits) -> list[str]:
        """What differs by more than it may, in words."""
        found = []
        if self.other_characters > max(WORD, limits.characters * self.characters):
            found.append(
                f"{self.other_characters} of {self.characters} characters of the texts differ ({self.differing[0]})"
            )
        if self.other_best > limits.frames * self.frames:
            found.append(f"{self.other_best} of {self.frames} frames have another best unit")
        if self.numbers and not self.total <= limits.log_prob * self.numbers:
            found.append(
                f"log-probabilities differ by {self.total / self.numbers:.3g} nat, {limits.log_prob} are allowed"
            )
        if self.words and abs(self.errors - self.own_errors) > max(1, limits.wer * self.words):
            found.append(f"WER {self.errors / self.words:.2%}, the checkpoint's is {self.own_errors / self.words:.2%}")
        return found


def _short(value: float) -> float:
    return float(f"{value:.4g}")


#: waveform float32 [samples] → log-probabilities float32 [rows, units], that of the first frame first
Rows = Callable[[np.ndarray], np.ndarray]


def rows_of(
    interface: Interface, session: Any, features: FeatureSettings, described: dict[str, Any], piece_ms: int
) -> Rows:
    """What hears a waveform through a graph; rows of T-one and zipformer2 go on behind the last frame.

    Args:
        interface: of the graph.
        session: of onnxruntime.
        features: that its network hears.
        described: what export.json says of the interface.
        piece_ms: sound that a stream hears at once.
    """

    rate = features.sample_rate

    def stream(sound: np.ndarray) -> np.ndarray:
        heard, piece = Stream(session), max(1, rate * piece_ms // 1000)
        parts = [heard.push(sound[None, at : at + piece])[0] for at in range(0, len(sound), piece)]
        return np.concatenate([*parts, heard.push(sound[None, :0], 1.0)[0]])

    def t_one(sound: np.ndarray) -> np.ndarray:
        heard, silence = TOne(session), described["tail_ms"] * rate // 1000
        silence += -(len(sound) + silence) % heard.samples
        chunks = np.concatenate([sound, np.zeros(silence, np.float32)]).reshape(-1, 1, heard.samples)
        return np.concatenate([heard.push(chunk)[0] for chunk in chunks])[described["lag_rows"] :]

    def zipformer2(sound: np.ndarray) -> np.ndarray:
        heard, silence = Zipformer2(session), np.zeros(described["tail_ms"] * rate // 1000, np.float32)
        logs = spectrum_of(features).of(np.concatenate([sound, silence]))
        frames = logs[: len(logs) // features.stack * features.stack].reshape(-1, features.stack, features.mels)
        return np.concatenate([heard.push(one) for one in frames])[described["lag_rows"] :]

    def offline(sound: np.ndarray) -> np.ndarray:
        heard, name = (sound, "samples") if features.kind == "own" else (spectrum_of(features).of(sound), "features")
        given = {name: heard[None], "lengths": np.array([len(heard)])}
        log_probs, frames = session.run(["log_probs", "frames"], given)
        return np.asarray(log_probs[0, : frames[0]])

    return {"stream": stream, "t-one": t_one, "zipformer2": zipformer2, "offline": offline}[interface]


def own_rows(checkpoint: OwnCheckpoint, sound: np.ndarray, stream: bool) -> np.ndarray:
    """What the checkpoint itself says of a waveform float32 [samples]: log-probabilities [frames, units]; AudioError when it is too short."""
    if stream:
        network = StreamingNetwork(checkpoint)
        return np.concatenate([network.push(sound), network.finish()])
    return infer(checkpoint, [frontend_of(checkpoint.features).compute(sound)])[0]


def compare(
    settings: ExportSettings, checkpoint: OwnCheckpoint, folder: Path, described: dict[str, Any]
) -> dict[str, Compared]:
    """Hear a set of shards with the checkpoint, with onnxruntime, and with sherpa-onnx where it knows the interface and is installed.

    Args:
        settings: of the export; `check` is the set.
        checkpoint: that was exported.
        folder: with the graphs and tokens.txt.
        described: what export.json says of the interface.

    Returns:
        by file and runtime what was found.

    Raises:
        UserError: when the set holds no utterance that can be heard.
    """
    assert settings.check is not None
    rate, streams = checkpoint.features.sample_rate, settings.interface != "offline"
    # behind a stream's last frame the product hears no features, a client of T-one no sound
    cut = checkpoint.model.delay if settings.interface in ("t-one", "zipformer2") else 0
    if settings.interface == "zipformer2":
        cut += 1  # there it hears the end mirrored
    decoder = make_decoder(DecodingSettings(), checkpoint)
    files = [name for name in (MODEL, QUANTIZED) if (folder / name).exists()]
    rows = {
        name: rows_of(settings.interface, session_of(folder / name, settings.threads), checkpoint.features, described, settings.piece_ms) for name in files
    }  # fmt: skip
    texts: dict[str, Callable[[np.ndarray], str]] = {}
    if sherpa_runs(settings.interface, checkpoint.features) and has_sherpa():
        for name in files:
            texts[name] = recogniser_of(
                settings.interface, folder / name, folder / TOKENS, checkpoint.features, described, settings.piece_ms, settings.threads
            )  # fmt: skip
    found = {f"{name}, onnxruntime": Compared() for name in files} | {
        f"{name}, sherpa-onnx": Compared() for name in texts
    }
    shards = read_index(settings.check)
    heard = 0
    with Progress("check", shards.samples, "utterances") as progress:
        for shard in shards:
            for sample in read_checked(settings.check, shard):
                stop_if_asked()
                text = sample.fields.get("text")
                try:
                    sound, _ = decode(sample.audio, sample.key, rate, settings.max_seconds)
                    own = own_rows(checkpoint, sound, streams)
                except AudioError as error:
                    print(f"left out {sample.key}: {error}", file=sys.stderr)
                    continue
                heard += 1
                said = decoder(own)[0].text
                for name in files:
                    here, log_probs = found[f"{name}, onnxruntime"], rows[name](sound)
                    here.add_rows(log_probs[: len(own) - cut], own[: len(own) - cut])
                    here.add_text(sample.key, decoder(log_probs)[0].text, said, text)
                for name, hear in texts.items():
                    found[f"{name}, sherpa-onnx"].add_text(sample.key, hear(sound), said, text)
                progress.advance(1, len(sound) / rate)
    if not heard:
        raise UserError(f"check: {settings.check} holds no utterance that can be heard; give audio shards that do")
    return found
