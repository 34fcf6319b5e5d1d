"""A word n-gram model of the transcripts of audio shards: python pipelines/digits/lm.py --audio SHARDS --output LM.arpa [--order 3]

For decoder=beam or decoder=torchaudio of `eval` and `transcribe`; beside it the vocabulary, for lexicon=…
"""

from __future__ import annotations

import argparse
from pathlib import Path

from asr_kd.decoding.estimate import write_arpa
from asr_kd.files import place
from asr_kd.shards.tarset import read_index, read_shard


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--audio", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--order", type=int, default=3)
    arguments = parser.parse_args()
    folder = place(arguments.audio)
    texts = [
        sample.fields["text"]
        for shard in read_index(folder)
        for sample in read_shard(folder / shard.name)
        if "text" in sample.fields
    ]
    write_arpa(arguments.output, texts, arguments.order)
    words = sorted({word for text in texts for word in text.split()})
    lexicon = Path(arguments.output).with_suffix(".words")
    lexicon.write_text("".join(f"{word}\n" for word in words))
    print(f"{arguments.output}: {arguments.order}-grams of {len(texts):,} texts; {lexicon}: {len(words):,} words")


if __name__ == "__main__":
    main()
