"""CMU AN4 as downloaded → manifests of four sets that share no speaker, and what the sets have in common.

    python pipelines/an4/corpus.py --corpus FOLDER --output runs/an4/corpus --labelled-minutes 10 --development-speakers 8 --split 0

FOLDER holds `etc/` and `wav/` (or is the folder above them). The audio may be WAV or FLAC, which is left where it is, or NIST
SPHERE or headerless samples (`.raw`, of either byte order), which are copied as WAV. The test set is the official one. The
official training set is parted by speaker, in an order that `--split` alone decides: the first speakers are the development
set, the next ones are labelled until there are enough minutes, and all others are unlabelled. What these said goes to
`unlabelled-oracle.jsonl`, which only the oracle student reads.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from asr_kd.errors import UserError
from asr_kd.files import claim_folder, read_text, write_json, write_whole

RATE = 16000
#: as the official downloads and their copies name them
ENDINGS = (".wav", ".flac", ".sph", ".raw")
SPOKEN = re.compile(r"^\s*(?:<s>)?\s*(?P<text>.*?)\s*(?:</s>)?\s*\((?P<key>[^()\s]+)\)\s*$")


@dataclass
class Recording:
    """One utterance of the corpus."""

    key: str
    speaker: str
    audio: Path
    text: str
    seconds: float

    def line(self, with_text: bool = True) -> str:
        """Of a manifest."""
        known = {"audio": str(self.audio), "key": self.key, "speaker": self.speaker}
        return json.dumps({**known, "text": self.text} if with_text else known) + "\n"


def find_root(corpus: Path) -> Path:
    """The folder with `etc` and `wav`.

    Raises:
        UserError: when there is none.
    """
    for folder in (corpus, corpus / "an4"):
        if (folder / "etc" / "an4_train.fileids").is_file():
            return folder
    raise UserError(
        f"corpus: {corpus} holds no etc/an4_train.fileids; give the folder of CMU AN4, unpacked "
        "(an4_sphere.tar.gz or an4_raw.*.tar.gz from http://www.speech.cs.cmu.edu/databases/an4/)"
    )


def read_part(root: Path, part: str, copies: Path) -> list[Recording]:
    """The recordings of `train` or `test`; what only this corpus is had in is copied to `copies` as WAV.

    Raises:
        UserError: when a list, a transcription or a recording is missing or cannot be read.
    """
    listed = root / "etc" / f"an4_{part}.fileids"
    spoken = root / "etc" / f"an4_{part}.transcription"
    texts = {}
    for number, line in enumerate(read_text(spoken, "transcription").splitlines(), 1):
        if not line.strip():
            continue
        match = SPOKEN.match(line)
        if not match:
            raise UserError(f"{spoken}, line {number}: not `TEXT (utterance)`; download the corpus again")
        texts[match["key"]] = " ".join(match["text"].lower().split())
    recordings = []
    for name in read_text(listed, "list of recordings").split():
        key, speaker = Path(name).name, Path(name).parent.name
        if key not in texts:
            raise UserError(f"{spoken}: has no text of {key}, which {listed.name} lists; download the corpus again")
        audio = next((path for ending in ENDINGS if (path := root / "wav" / f"{name}{ending}").is_file()), None)
        if audio is None:
            raise UserError(f"{root / 'wav' / name}: no recording ({', '.join(ENDINGS)}); download the corpus again")
        if audio.suffix in (".raw", ".sph"):
            audio = as_wav(audio, copies / f"{key}.wav")
        recordings.append(Recording(key, speaker, audio.resolve(), texts[key], duration(audio)))
    return recordings


def as_wav(recording: Path, copy: Path) -> Path:
    """A copy of a SPHERE file, or of headerless 16-bit samples. In the wrong byte order speech is noise, whose samples jump."""
    if recording.suffix == ".raw":
        data = recording.read_bytes()
        orders = [np.frombuffer(data[: len(data) // 2 * 2], dtype).astype(np.float32) for dtype in ("<i2", ">i2")]
        samples = min(orders, key=lambda order: float(np.abs(np.diff(order)).mean()) if len(order) > 1 else 0.0)
        samples, rate = samples.astype(np.int16), RATE
    else:
        duration(recording)  # names it when it is none
        samples, rate = soundfile.read(str(recording), dtype="int16")
    copy.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(copy, samples, rate, subtype="PCM_16")
    return copy


def duration(audio: Path) -> float:
    """Seconds of a recording."""
    try:
        return float(soundfile.info(str(audio)).duration)
    except soundfile.LibsndfileError as error:
        raise UserError(f"{audio}: cannot be read ({error}); download the corpus again") from None


def divide(
    train: list[Recording], labelled_minutes: float, development_speakers: int, split: int
) -> dict[str, list[Recording]]:
    """Development, labelled and unlabelled recordings of the training set, each speaker in one of them.

    Raises:
        UserError: when there are too few speakers for the three.
    """
    speakers = sorted({one.speaker for one in train})
    order = [speakers[place] for place in np.random.default_rng(split).permutation(len(speakers))]
    seconds = {speaker: sum(one.seconds for one in train if one.speaker == speaker) for speaker in speakers}
    development, others = order[:development_speakers], order[development_speakers:]
    before = itertools.accumulate((seconds[speaker] for speaker in others), initial=0.0)
    labelled = [speaker for speaker, heard in zip(others, before, strict=False) if heard < labelled_minutes * 60]
    unlabelled = others[len(labelled) :]
    if not (development and labelled and unlabelled):
        raise UserError(
            f"{development_speakers} development speakers and {labelled_minutes} labelled minutes leave a set empty: "
            f"the training set has {len(speakers)} speakers and {sum(seconds.values()) / 60:.0f} minutes; ask for less"
        )
    sets = {"development": development, "labelled": labelled, "unlabelled": unlabelled}
    return {name: [one for one in train if one.speaker in chosen] for name, chosen in sets.items()}


def describe(sets: dict[str, list[Recording]]) -> dict[str, object]:
    """Sizes of the sets, and how many utterances of the later ones say what one of an earlier set says, word for word."""
    order = ("labelled", "unlabelled", "development", "test")
    sizes = {
        name: {
            "utterances": len(sets[name]),
            "speakers": len({one.speaker for one in sets[name]}),
            "minutes": round(sum(one.seconds for one in sets[name]) / 60, 2),
            "words": sum(len(one.text.split()) for one in sets[name]),
        }
        for name in order
    }
    shared = {}
    for first, second in itertools.combinations(order, 2):
        said = {one.text for one in sets[first]}
        shared[f"{second} said in {first}"] = sum(one.text in said for one in sets[second])
    return {"sets": sizes, "sentences": shared}


def main() -> None:
    """Write the manifests."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--labelled-minutes", type=float, default=10.0)
    parser.add_argument("--development-speakers", type=int, default=8)
    parser.add_argument("--split", type=int, default=0)
    chosen = parser.parse_args()
    try:
        root = find_root(chosen.corpus)
        settings = {name: str(value) for name, value in vars(chosen).items() if name not in ("output", "corpus")}
        claim_folder(chosen.output, "corpus", {**settings, "corpus": str(root.resolve())})
        copies = chosen.output.resolve() / "audio"
        sets = divide(
            read_part(root, "train", copies), chosen.labelled_minutes, chosen.development_speakers, chosen.split
        )
        sets["test"] = read_part(root, "test", copies)
        for name, recordings in sets.items():
            with write_whole(chosen.output / f"{name}.jsonl", "w") as file:
                file.writelines(one.line(with_text=name != "unlabelled") for one in recordings)
        with write_whole(chosen.output / "unlabelled-oracle.jsonl", "w") as file:
            file.writelines(json.dumps({"key": one.key, "text": one.text}) + "\n" for one in sets["unlabelled"])
        described = describe(sets)
        write_json(chosen.output / "sets.json", described)
    except UserError as error:
        sys.exit(f"pipelines/an4/corpus.py: {error}")
    for name, size in described["sets"].items():  # type: ignore[attr-defined]
        print(f"{name}: {', '.join(f'{value:g} {what}' for what, value in size.items())}")
    print(", ".join(f"{count} utterances of {what}" for what, count in described["sentences"].items()))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
