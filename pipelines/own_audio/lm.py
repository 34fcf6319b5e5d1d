"""What the labelled text knows: python pipelines/own_audio/lm.py --audio SHARDS --output FOLDER [--order 2]

Writes the vocabulary of the transcripts of audio shards, words.txt, and a word n-gram model of them, lm.arpa: for lexicon=… and
lm=… of `transcribe` and `eval` with decoder=beam.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from asr_kd.decoding.estimate import write_arpa
from asr_kd.errors import UserError
from asr_kd.files import place, write_whole
from asr_kd.shards.tarset import read_index, read_shard


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--audio", required=True)
    parser.add_argument("--output", required=True, type=Path)
    parser.add_argument("--order", type=int, default=2)
    chosen = parser.parse_args()
    try:
        folder = place(chosen.audio)
        samples = (sample for shard in read_index(folder) for sample in read_shard(folder / shard.name))
        texts = [sample.fields["text"] for sample in samples if sample.fields.get("text", "").strip()]
        if not texts:
            raise UserError(f"{chosen.audio}: holds no text; give labelled audio shards")
        words = sorted({word for text in texts for word in text.split()})
        chosen.output.mkdir(parents=True, exist_ok=True)
        with write_whole(chosen.output / "words.txt", "w") as file:
            file.writelines(f"{word}\n" for word in words)
        write_arpa(chosen.output / "lm.arpa", texts, chosen.order)
    except UserError as error:
        sys.exit(f"pipelines/own_audio/lm.py: {error}")
    print(f"{chosen.output}: {len(words):,} words and their {chosen.order}-grams from {len(texts):,} texts")


if __name__ == "__main__":
    main()
