"""Audio → text with a Whisper or Moonshine model; for sets of shards, text that a student can learn from, and why the rest is left out."""

from __future__ import annotations

import json
import math
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from asr_kd.audio.decode import decode, read_blocks
from asr_kd.audio.pieces import pieces
from asr_kd.config.base import is_default
from asr_kd.decoding.settings import TranscribeSettings
from asr_kd.decoding.spelling import Spelling
from asr_kd.decoding.whisper import RATE, Recogniser, family, load_recogniser
from asr_kd.decoding.whisper_settings import WhisperSettings
from asr_kd.errors import AudioError, UserError
from asr_kd.files import CLAIM, Place, claim_folder, names_in, place, write_whole
from asr_kd.models.acoustic import pick_device
from asr_kd.models.outside.hub import fetched
from asr_kd.progress import Progress
from asr_kd.shards.index import ShardInfo, ShardList
from asr_kd.shards.leases import sole_writer
from asr_kd.shards.quarantine import Quarantine
from asr_kd.shards.tarset import read_checked
from asr_kd.summary import tell_summary
from asr_kd.units import load_units

#: seconds; shorter sound is no utterance, and too short for Moonshine's convolutions
SHORTEST = 0.1
#: settings of CTC models and of their decoders
OF_CTC = (
    "decoder", "beam", "nbest", "lm", "lexicon", "lm_weight", "word_bonus", "window_seconds", "segment", "batch_frames", "precision",
)  # fmt: skip
#: characters named in a message at most
NAMED = 10


@dataclass(frozen=True)
class Segment:
    """A piece of an utterance: seconds, the text as the model writes it, and what the filter looks at (as of `Heard`)."""

    start: float
    end: float
    text: str
    avg_logprob: float | None
    no_speech_prob: float | None
    compression_ratio: float
    language: str | None


class Transcriber:
    """A recogniser, how its texts are written, and which of them are kept.

    Raises:
        UserError: when a setting does not fit such a model, or it cannot be loaded.
    """

    def __init__(self, settings: TranscribeSettings, folder: Path) -> None:
        if settings.stream:
            raise UserError(f"{settings.checkpoint}: hears whole utterances, and cannot --stream; give it files")
        if odd := next((name for name in OF_CTC if not is_default(settings, name)), None):
            raise UserError(f"{odd}: belongs to CTC models, and {settings.checkpoint} is not one; leave it out")
        self.settings = settings.whisper
        self.spelling = Spelling(
            load_units(self.settings.units) if self.settings.units else None, self.settings.normalizer
        )
        device = pick_device(settings.device)
        self.recogniser: Recogniser = load_recogniser(folder, self.settings, device, settings.threads)

    def __call__(self, blocks: Iterable[np.ndarray], name: str) -> dict[str, Any]:
        """Transcribe one recording.

        Args:
            blocks: float32 [samples] at RATE; memory holds one and a piece.
            name: of the recording, for messages.

        Returns:
            `text`, `language`, `avg_logprob`, `no_speech_prob`, `compression_ratio` and `segments` (as of `Segment`), a JSON value.

        Raises:
            AudioError: when it is too short.
            UserError: when the network gives no number.
        """
        segments = []
        for start, sound in pieces(blocks, RATE, self.settings.piece_seconds):
            if len(sound) < SHORTEST * RATE:
                raise AudioError(f"{name}: too short: {len(sound) / RATE:.3f} s, {SHORTEST} s are needed")
            heard = self.recogniser(sound)
            if heard.avg_logprob is not None and not math.isfinite(heard.avg_logprob):
                raise UserError(
                    f"{name}: the network's output is NaN; its weights are broken, or whisper.compute is too coarse for them"
                )
            end = start + len(sound)
            segments.append(
                Segment(
                    round(start / RATE, 3), round(end / RATE, 3), heard.text, _rounded(heard.avg_logprob), _rounded(heard.no_speech_prob),
                    _rounded(compression_ratio(heard.text)) or 0.0, heard.language,
                )
            )  # fmt: skip
        languages = Counter(one.language for one in segments)
        return {
            "text": self.spelling(" ".join(one.text for one in segments)),
            "language": languages.most_common(1)[0][0],
            # of a recording of several pieces the least sure one: one bad piece spoils the text
            "avg_logprob": min((one.avg_logprob for one in segments if one.avg_logprob is not None), default=None),
            "no_speech_prob": max(
                (one.no_speech_prob for one in segments if one.no_speech_prob is not None), default=None
            ),
            "compression_ratio": max(one.compression_ratio for one in segments),
            "segments": [asdict(one) for one in segments],
        }

    def refusal(self, found: dict[str, Any]) -> tuple[str, str]:
        """Why nobody should learn from such a text, in one word and in a sentence; empty if there is no reason."""
        if odd := self.spelling.unwritable(found["text"]):
            return "unwritable", f"holds {odd[0]!r}, which no unit covers"
        if not found["text"]:
            return "no_words", "holds no words"
        return next((why for one in found["segments"] if (why := self._doubt(one))[0]), ("", ""))

    def _doubt(self, segment: dict[str, Any]) -> tuple[str, str]:
        """As `refusal`, of a piece: Whisper's own rules (A. Radford et al., 2022, section 4.5)."""
        wanted, unsure = self.settings, ""
        sure, silent, ratio = (segment[name] for name in ("avg_logprob", "no_speech_prob", "compression_ratio"))
        if wanted.min_avg_logprob is not None and sure is not None and sure < wanted.min_avg_logprob:
            unsure = f"avg_logprob {sure:g} is below whisper.min_avg_logprob {wanted.min_avg_logprob:g}"
        # what it is sure of was said, whatever it thought of the sound before
        if unsure or wanted.min_avg_logprob is None:
            most = wanted.max_no_speech_prob
            if most is not None and silent is not None and silent > most:
                quiet = f"no_speech_prob {silent:g} is above whisper.max_no_speech_prob {most:g}"
                return "no_speech_prob", f"{quiet}, and {unsure}" if unsure else quiet
        if unsure:
            return "avg_logprob", unsure
        if wanted.max_compression_ratio is not None and ratio > wanted.max_compression_ratio:
            return (
                "compression_ratio",
                f"compression_ratio {ratio:g} is above whisper.max_compression_ratio {wanted.max_compression_ratio:g}",
            )
        return "", ""


def transcriber_of(settings: TranscribeSettings) -> Transcriber | None:
    """The transcriber of a Whisper or Moonshine model; None when `checkpoint` is another kind of model.

    Raises:
        UserError: as `Transcriber`; and when settings of such models are given for another.
    """
    named = settings.checkpoint.startswith("hf:")
    folder = fetched(settings.checkpoint) if named else place(settings.checkpoint)
    if isinstance(folder, Path) and family(folder):
        return Transcriber(settings, folder)
    if settings.whisper != WhisperSettings():
        raise UserError(
            f"whisper: belongs to Whisper and Moonshine models, and {settings.checkpoint} is not one; leave it out"
        )
    return None


def transcribe_file(transcriber: Transcriber, path: Path, name: str) -> dict[str, Any]:
    """As `Transcriber`, of a local file of any length; a text that the filter would leave out is named on standard error."""
    found = transcriber(read_blocks(path, name, RATE), name)
    if reason := transcriber.refusal(found)[1]:
        print(f"{name}: doubtful: {reason}", file=sys.stderr)
    return found


def label_texts(settings: TranscribeSettings, transcriber: Transcriber, infos: ShardList, output: Place) -> None:
    """Write what a model hears in a set of shards, as `transcribe_shards`; killed and started again, it goes on at the next shard.

    `output` gets a line for each text that is kept. Its lines have the fields of a list as `asr-kd select` writes it: as `transcripts` and as
    `only` of a source it teaches its own texts and leaves out the rest. The rest stands beside it (`left_out`), each with its reason.
    Until all shards are heard their lines wait in a folder beside it (`waiting`).

    Args:
        settings: of the job.
        transcriber: made of them.
        infos: the shards of `settings.audio`.
        output: JSONL file.

    Raises:
        UserError: when more than `max_bad_share` could not be read, nothing is kept, or the work of other settings waits there.
    """
    folder, rest = waiting(output), left_out(output)
    whisper = settings.whisper.model_dump(exclude={"units"})
    units = transcriber.spelling.units
    claim = {
        "audio": infos.hash, "model": transcriber.recogniser.fingerprint, "units": units and units.hash, "max_seconds": settings.max_seconds,
        **whisper,
    }  # fmt: skip
    claim_folder(folder, "transcribe", claim, ".jsonl")
    with sole_writer(folder) as check, Progress("transcribe", infos.samples, "utterances") as progress:
        done = set(names_in(folder))
        for info in infos:
            if (name := f"{info.name}.jsonl") in done:
                progress.resume(info.samples)
                continue
            lines = [_json(line) for line in _heard(settings, transcriber, info, infos.hash, progress)]
            check()
            with write_whole(folder / name, "w", make_folder=False) as file:
                file.writelines(lines)
        counts, odd, seconds = Counter[str](), Counter[str](), 0.0
        bad = Quarantine(infos.samples, settings.max_bad_share, "read")
        with write_whole(output, "w") as kept, write_whole(rest, "w") as others:
            for info in infos:
                for line in (folder / f"{info.name}.jsonl").read_text(encoding="utf-8").splitlines():
                    value = json.loads(line)
                    counts[value.get("why", "kept")] += 1
                    seconds += value["seconds"] if value["kept"] else 0.0
                    if "segments" not in value:
                        bad.add(value["key"], value["reason"])
                    if value.get("why") == "unwritable":
                        odd.update(set("".join(transcriber.spelling.unwritable(value["text"]))))
                    (kept if value["kept"] else others).write(line + "\n")
            bad.refuse(str(settings.audio))
            if not counts["kept"]:
                raise UserError(
                    f"{settings.audio}: none of {infos.samples} texts is kept ({_reasons(counts)}); see the settings of whisper"
                )
    _remove(folder)
    why = {name: count for name, count in sorted(counts.items()) if name != "kept"}
    tell_summary(
        output, utterances=infos.samples, done=counts["kept"], quarantined=bad.count, audio_hours=seconds / 3600,
        figures={"left_out": why},
    )  # fmt: skip
    print(
        f"{output}: {infos.samples:,} utterances in = {counts['kept']:,} texts + {infos.samples - counts['kept']:,} left out ({rest})"
    )
    if infos.samples > counts["kept"]:
        print(f"left out: {_reasons(counts)}")
    if odd:
        named = ", ".join(repr(one) for one, _ in odd.most_common(NAMED)) + " …" * (len(odd) > NAMED)
        advice = "; whisper.numerals=false has numbers written as words" if any(map(str.isdigit, odd)) else ""
        print(f"{counts['unwritable']:,} texts hold characters that no unit covers: {named}{advice}")


def _heard(
    settings: TranscribeSettings, transcriber: Transcriber, info: ShardInfo, index: str, progress: Progress
) -> Iterator[dict[str, Any]]:
    """A line for each utterance of a shard, in order."""
    assert settings.audio is not None
    for sample in read_checked(settings.audio, info):
        line: dict[str, Any] = {"key": sample.key, "set": index, "shard": info.name, "seconds": 0.0, "kept": False}
        try:
            waveform, _ = decode(sample.audio, sample.key, RATE, settings.max_seconds)
            line["seconds"] = round(len(waveform) / RATE, 6)
            found = transcriber([waveform], sample.key)
            why, reason = transcriber.refusal(found)
            line |= {**found, "kept": not why, **({"why": why, "reason": reason} if why else {})}
        except AudioError as error:
            line |= {"why": "unreadable", "reason": str(error).removeprefix(f"{sample.key}: ")}
        progress.advance(1, line["seconds"])
        yield line


def left_out(output: Place) -> Place:
    """The file beside `output` with the texts that are not kept."""
    return output.parent / f"{output.name.removesuffix('.jsonl')}.left-out.jsonl"


def waiting(output: Place) -> Place:
    """The folder beside `output` with the lines of finished shards, until all are."""
    return output.parent / f"{output.name}.parts"


def _remove(folder: Place) -> None:
    for name in sorted(
        names_in(folder), key=lambda name: name == CLAIM
    ):  # that last: without it the folder is nobody's
        (folder / name).unlink(missing_ok=True)
    if isinstance(folder, Path):
        folder.rmdir()


def compression_ratio(text: str) -> float:
    """Bytes of a text, divided by those that zlib makes of them: above 2.4 it repeats itself (A. Radford et al., 2022, section 4.5)."""
    data = text.encode()
    return len(data) / len(zlib.compress(data))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _reasons(counts: Counter[str]) -> str:
    return ", ".join(f"{why} {count:,}" for why, count in sorted(counts.items()) if why != "kept")


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
