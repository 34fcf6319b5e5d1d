"""Small sets laid out as those of other toolkits: their sounds, and what `prepare` makes of them."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from asr_kd.shards.manifest import Utterance
from asr_kd.shards.manifests import open_manifest
from asr_kd.shards.prepare import prepare
from asr_kd.shards.settings import PrepareSettings
from asr_kd.shards.tarset import read_index, read_shard

RATE = 8000


def sound(seed: int, seconds: float = 0.5) -> np.ndarray:
    return np.random.default_rng(seed).integers(-9000, 9000, int(seconds * RATE)).astype(np.int16)


def encoded(seed: int, seconds: float = 0.5, kind: str = "FLAC") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, sound(seed, seconds), RATE, format=kind)
    return file.getvalue()


def write(path: Path, content: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(path: Path, *objects: dict[str, Any]) -> Path:
    return write(path, "".join(json.dumps(one) + "\n" for one in objects))


def tar(path: Path, *members: tuple[str, bytes | str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, content in members:
            data = content if isinstance(content, bytes) else content.encode()
            header = tarfile.TarInfo(name)
            header.size = len(data)
            file.addfile(header, io.BytesIO(data))
    return path


def listed(path: Path) -> list[Utterance]:
    return list(open_manifest(path))


def prepared(path: Path, output: Path, **changes: Any) -> dict[str, tuple[np.ndarray, dict[str, Any]]]:
    """Sound and fields of each utterance in the shards that are made of a manifest, in order."""
    values = {"manifest": str(path), "output": str(output), "samples_per_shard": 3, **changes}
    prepare(PrepareSettings.model_validate(values))
    samples = [one for info in read_index(output) for one in read_shard(output / info.name)]
    return {one.key: (soundfile.read(io.BytesIO(one.audio), dtype="int16")[0], one.fields) for one in samples}


def quarantined(output: Path) -> dict[str, str]:
    found = map(json.loads, (output / "quarantine.jsonl").read_text().splitlines())
    return {one["key"]: one["reason"] for one in found}
