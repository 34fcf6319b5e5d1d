"""Two domains out of one set of speakers: some speakers as they were recorded, the others over a telephone.

    python pipelines/lifelong/domains.py --source runs/lifelong/data/digits --output runs/lifelong/data/domains

Writes `old-training`, `old-development`, `old-test`, and the same of `new`. Nothing is drawn but what the telephone draws from a key: the same
source gives the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "channels"))
from telephone import changed

from asr_kd.errors import UserError
from asr_kd.files import claim_folder
from asr_kd.progress import Progress
from asr_kd.shards.manifest import read_transcripts
from asr_kd.shards.tarset import Sample, read_checked, read_index, write_index, write_shard

#: who is heard first; the others come later, over the telephone
OLD = ("george", "jackson", "lucas")
#: our sets, and those of pipelines/digits/compose.py that they are cut from; the text of the first lies beside it
SETS = {"training": "unlabelled-half", "development": "development", "test": "test"}
TEXTS = "unlabelled-oracle.jsonl"


def of_domain(samples: Iterator[Sample], domain: str, texts: dict[str, str]) -> Iterator[Sample]:
    """The utterances of a domain as they are heard there, with their text."""
    for sample in samples:
        if (sample.fields.get("speaker") in OLD) == (domain == "old"):
            told = dataclasses.replace(sample, fields={"text": texts.get(sample.key), **sample.fields})
            yield told if domain == "old" else changed(told)


def split(source: Path, output: Path) -> None:
    """Write the sets of both domains.

    Raises:
        UserError: when the source lacks a set, or a shard of it one of the domains.
    """
    sets, texts = {name: read_index(source / theirs) for name, theirs in SETS.items()}, read_transcripts(source / TEXTS)
    for domain in ("old", "new"):
        for name, shards in sets.items():
            folder = output / f"{domain}-{name}"
            claim_folder(folder, "domains", {"audio": shards.hash, "domain": domain, "old": list(OLD)})
            with Progress(folder.name, shards.samples, "utterances") as progress:
                written = []
                for info in shards:
                    own = of_domain(read_checked(source / SETS[name], info), domain, texts)
                    written.append(write_shard(folder / info.name, own))
                    progress.advance(info.samples, info.seconds)
                    if not written[-1].samples:
                        raise UserError(f"{source / SETS[name]}: {info.name} holds nothing of the {domain} domain")
            write_index(folder, written)


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--source", required=True, type=Path, help="folder that pipelines/digits/compose.py wrote")
    parser.add_argument("--output", required=True, type=Path, help="folder of the sets of both domains")
    given = parser.parse_args()
    try:
        split(given.source, given.output)
    except UserError as error:
        print(f"domains: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
