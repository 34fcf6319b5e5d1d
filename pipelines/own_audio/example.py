"""Recordings and manifests as one has them, to try things on: python pipelines/own_audio/example.py RUN FOLDER

Takes the first utterances out of the shards of a finished run of the digits: their audio as it is, and the four manifests that
`asr-kd run pipelines/own_audio` wants.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

from asr_kd.shards.tarset import read_index, read_shard

#: manifest → set of the run, and how many utterances
PARTS = {
    "labelled": ("labelled", 60),
    "unlabelled": ("unlabelled", 80),
    "development": ("development", 30),
    "test": ("test", 30),
}


def main() -> None:
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    data, folder = Path(sys.argv[1]) / "data", Path(sys.argv[2])
    (folder / "audio").mkdir(parents=True, exist_ok=True)
    for name, (part, count) in PARTS.items():
        samples = itertools.chain.from_iterable(
            read_shard(data / part / info.name) for info in read_index(str(data / part))
        )
        lines = []
        for sample in itertools.islice(samples, count):
            audio = f"audio/{sample.key}.{sample.extension}"
            (folder / audio).write_bytes(sample.audio)
            lines.append(json.dumps({"audio": audio, "key": sample.key, **sample.fields}, ensure_ascii=False) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(lines)} utterances")


if __name__ == "__main__":
    main()
