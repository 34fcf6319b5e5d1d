"""speechocean762 as downloaded → Kaldi data folders of four sets that share no speaker.

    python pipelines/speechocean762/corpus.py --corpus FOLDER --output runs/speechocean762/corpus --unlabelled-speakers 70 --development-speakers 15 --split 0

FOLDER holds `train`, `test` and `WAVE` (or is the folder above them). `train` is the labelled set. The speakers of `test` are parted in an
order that `--split` alone decides: unlabelled, development, test. A FOLDER that holds `labelled`, `unlabelled`, `development` and `test` is
taken as it is. What the unlabelled speakers said goes to `unlabelled-oracle.jsonl`, which only the oracle student reads. Audio stays where it is.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np

from asr_kd.errors import UserError
from asr_kd.files import claim_folder, read_text, write_whole

SETS = ("labelled", "unlabelled", "development", "test")
BY_UTTERANCE, BY_SPEAKER = ("wav.scp", "text", "utt2spk"), ("spk2gender", "spk2age")

Rows = dict[str, dict[str, str]]


def find_root(corpus: Path) -> tuple[Path, bool]:
    """The folder that the audio's paths count from, and whether the four sets are in it already.

    Raises:
        UserError: when it is not this corpus.
    """
    for folder in (corpus, corpus / "speechocean762"):
        for names in (SETS, ("train", "test")):
            if all((folder / name / "wav.scp").is_file() for name in names):
                return folder, names == SETS
    raise UserError(
        f"corpus: {corpus} holds no train/wav.scp and test/wav.scp; give the folder of speechocean762, unpacked "
        "(https://www.openslr.org/101)"
    )


def read_set(root: Path, name: str) -> Rows:
    """The files of a data folder: of each, what stands behind an id; audio as whole paths.

    Raises:
        UserError: when a file is missing, a line is none of it, or an utterance has no speaker.
    """
    rows: Rows = {}
    for file in (*BY_UTTERANCE, *BY_SPEAKER):
        path, rows[file] = root / name / file, {}
        for number, line in enumerate(read_text(path, "list of the corpus").splitlines(), 1):
            if not line.strip():
                continue
            key, *rest = line.split(maxsplit=1)
            if not rest and file != "text":
                raise UserError(f"{path}, line {number}: nothing stands behind {key}; download the corpus again")
            rows[file][key] = rest[0].strip() if rest else ""
    for key in rows["wav.scp"]:
        if key not in rows["utt2spk"]:
            raise UserError(f"{root / name / 'utt2spk'}: names no speaker of {key}; download the corpus again")
    rows["wav.scp"] = {key: str((root / audio).resolve()) for key, audio in rows["wav.scp"].items()}
    return rows


def of_speakers(rows: Rows, speakers: set[str]) -> Rows:
    """The part of a set that some speakers said."""
    chosen = {key for key, speaker in rows["utt2spk"].items() if speaker in speakers}
    kept = dict.fromkeys(BY_UTTERANCE, chosen) | dict.fromkeys(BY_SPEAKER, speakers)
    return {file: {key: value for key, value in rows[file].items() if key in kept[file]} for file in rows}


def divide(test: Rows, unlabelled: int, development: int, split: int) -> dict[str, Rows]:
    """The official test half by speaker.

    Raises:
        UserError: when a set would be empty, or the split is no seed.
    """
    if split < 0:
        raise UserError(f"split: {split} is below 0; choose another number")
    speakers = sorted(set(test["utt2spk"].values()))
    order = [speakers[place] for place in np.random.default_rng(split).permutation(len(speakers))]
    parts = (order[:unlabelled], order[unlabelled : unlabelled + development], order[unlabelled + development :])
    if min(unlabelled, development) < 0 or not all(parts):
        raise UserError(
            f"{unlabelled} unlabelled and {development} development speakers leave a set empty: {len(speakers)} are to be parted; ask for less"
        )
    return {name: of_speakers(test, set(part)) for name, part in zip(SETS[1:], parts, strict=True)}


def main() -> None:
    """Write the data folders."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--corpus", required=True, type=Path)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--unlabelled-speakers", type=int, default=70)
    parser.add_argument("--development-speakers", type=int, default=15)
    parser.add_argument("--split", type=int, default=0)
    chosen = parser.parse_args()
    try:
        root, parted = find_root(chosen.corpus)
        settings = {name: str(value) for name, value in vars(chosen).items() if name not in ("output", "corpus")}
        if parted:
            sets = {name: read_set(root, name) for name in SETS}
        else:
            parts = divide(
                read_set(root, "test"), chosen.unlabelled_speakers, chosen.development_speakers, chosen.split
            )
            sets = {"labelled": read_set(root, "train"), **parts}
        # after what may be refused, so that the folder is free for other settings
        claim_folder(chosen.output, "corpus", {**settings, "corpus": str(root.resolve())})
        for name, rows in sets.items():
            (chosen.output / name).mkdir(exist_ok=True)
            for file, values in rows.items():
                with write_whole(chosen.output / name / file, "w") as written:
                    written.writelines(f"{key}\t{value}\n" for key, value in values.items())
        with write_whole(chosen.output / "unlabelled-oracle.jsonl", "w") as written:
            said = sets["unlabelled"]["text"].items()
            written.writelines(json.dumps({"key": key, "text": text}) + "\n" for key, text in said if text)
    except UserError as error:
        sys.exit(f"pipelines/speechocean762/corpus.py: {error}")
    for name, rows in sets.items():
        speakers = len(set(rows["utt2spk"].values()))
        print(f"{name}: {len(rows['wav.scp']):,} utterances, {speakers} speakers")


if __name__ == "__main__":
    main()
