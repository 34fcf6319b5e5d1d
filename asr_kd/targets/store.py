"""Soft-target shards: write them, read them with checks of what the reader expects, join them with their audio."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from asr_kd.audio.settings import InputSettings
from asr_kd.config.base import Settings
from asr_kd.config.load import build
from asr_kd.errors import UserError
from asr_kd.files import Place, hash_json, names_in, parse_json, place, readable
from asr_kd.shards.tarset import first_member, read_members, write_members
from asr_kd.targets.codec import decode_all, encode
from asr_kd.targets.hidden import HiddenDescription
from asr_kd.targets.posteriors import SparsePosteriors
from asr_kd.targets.prior import from_text, prior_of

#: of shards without hidden states, and of those with them
PLAIN, VERSION = 3, 4
METADATA, SUFFIX, HIDDEN_SUFFIX = "metadata.json", ".target", ".hidden"
#: soft targets decoded in one call
TOGETHER = 16


class CodecDescription(Settings):
    """How the members are written; see README.md beside this file."""

    version: int
    levels: int


class Selection(Settings):
    """What was kept of the teacher's distribution; null is what its mode does not look at."""

    mode: Literal["mass", "top_k", "sampled", "alignment", "occupancy"]
    k: int | None = None
    mass: float | None = None
    floor: float | None = None
    draws: int | None = None
    seed: int | None = None
    temperature: float | None = None
    hold_frames: int | None = None


class Statistics(Settings):
    """What a shard holds and what it lost; means are over its frames.

    `mean_kl` and `worst_kl` (nat) count from the teacher's full distribution to the stored one with the tail spread
    evenly, `mean_kl_prior` with the tail spread like the shard's prior; `top1_kept` is the share of frames whose most
    probable unit is the teacher's. All are null for an alignment, the divergences for draws too.
    """

    utterances: int
    frames: int
    audio_seconds: float
    entries_per_frame: float
    bytes_per_frame: float
    mean_kept_mass: float
    mean_kl: float | None
    mean_kl_prior: float | None = None
    worst_kl: float | None
    top1_kept: float | None


class TargetMetadata(Settings):
    """The first member of a soft-target shard: which audio it belongs to, which teacher made it and how.

    Attributes:
        teacher: fingerprint of the checkpoint.
        units_hash: of the teacher's vocabulary.
        offset_ms: start of the first frame in the audio.
        features: the teacher's front end, or what sound it is given.
        frontend: version of our front end.
        heard: how the teacher's features were rounded, or that it was given sound. None in shards before version 3, whose teachers
            were given float32 features though they were trained on float16.
        audio_sha256: of the audio shard that it belongs to.
        quarantined: key → reason, utterances of the audio shard without a target.
        tail_prior: distribution of the mass that was not kept, as of `prior.to_text`.
        members: SHA-256 over keys and soft targets in order, set by `write_target_shard`; without it two swapped soft
            targets would not be noticed.
        hidden: what is held of the teacher's hidden states; None, and no key of the file, if nothing is.
    """

    format: Literal["asr_kd-targets"] = "asr_kd-targets"
    version: int = PLAIN
    codec: CodecDescription
    selection: Selection
    teacher: str
    units_hash: str
    num_units: int
    frame_ms: Annotated[int, Field(ge=1, le=10_000)]
    offset_ms: int = 0
    features: InputSettings
    frontend: int = 1
    heard: Literal["float16", "sound"] | None = None
    audio_sha256: str
    quarantined: dict[str, str]
    tail_prior: str | None = None
    members: str | None = None
    statistics: Statistics
    hidden: HiddenDescription | None = None


class Labelled(NamedTuple):
    """An utterance of a shard: its soft target, and the bytes of its hidden states, if the shard has them."""

    key: str
    target: SparsePosteriors
    hidden: bytes | None


def write_target_shard(
    path: Place | str,
    metadata: TargetMetadata,
    targets: Iterable[tuple[str, SparsePosteriors | bytes]],
    hidden: Mapping[str, bytes] | None = None,
) -> None:
    """Write a shard, atomically.

    Args:
        path: local or in an object store.
        metadata: of the shard.
        targets: key and soft target (or its bytes from `encode`), in the order of the audio shard.
        hidden: key → bytes of `encode_hidden`, if the metadata describe hidden states.
    """
    levels, draws = metadata.codec.levels, metadata.selection.draws
    members, digest = [], hashlib.sha256()
    for key, target in targets:
        data = target if isinstance(target, bytes) else encode(target, levels, draws)
        members.append((key + SUFFIX, data))
        _count_in(digest, key, data)
        if hidden is not None:
            members.append((key + HIDDEN_SUFFIX, hidden[key]))
            _count_in(digest, key + HIDDEN_SUFFIX, hidden[key])
    value = metadata.model_copy(update={"members": digest.hexdigest()}).model_dump()
    if metadata.hidden is None:  # such shards are as they were before there were hidden states
        del value["hidden"]
    else:
        value["version"] = VERSION
    value["checksum"] = hash_json(value)
    text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
    write_members(path, [(METADATA, text.encode()), *members])


def _count_in(digest: hashlib._Hash, key: str, data: bytes) -> None:
    digest.update(f"{key} {len(data)}\n".encode())
    digest.update(data)


def read_target_shard(
    path: Place | str, units_hash: str | None = None, num_units: int | None = None, frame_ms: int | None = None
) -> tuple[TargetMetadata, Iterator[tuple[str, SparsePosteriors]]]:
    """As `read_labelled_shard`, without hidden states: an iterator over keys and soft targets.

    Args:
        path: local or in an object store.
        units_hash: as of `read_labelled_shard`, like `num_units` and `frame_ms`.
    """
    metadata, utterances = read_labelled_shard(path, units_hash, num_units, frame_ms)
    return metadata, ((key, target) for key, target, _ in utterances)


def read_labelled_shard(
    path: Place | str, units_hash: str | None = None, num_units: int | None = None, frame_ms: int | None = None
) -> tuple[TargetMetadata, Iterator[Labelled]]:
    """Open a soft-target shard, check that it fits the reader, and return its metadata and an iterator over its utterances.

    Args:
        path: local or in an object store.
        units_hash: of the reader's vocabulary; None: any.
        num_units: of the reader's vocabulary; None: any.
        frame_ms: the reader's frame period; None: any.

    Raises:
        UserError: when the shard is of a newer version, other units or another frame period; from the iterator: when a
            member is damaged, of another vocabulary, or missing.
    """
    members = read_members(path)
    metadata = _metadata(path, next(iter(members), None))
    same = "label with a teacher that has the same"
    other = (
        f"{same} units, or give the student the teacher's (asr-kd units teacher=…); a student of other units learns from texts "
        "(transcribe) or hidden features of that teacher, not from its posteriors"
    )
    for name, theirs, mine, remedy in (
        ("units", metadata.units_hash, units_hash, other),
        ("number of units", metadata.num_units, num_units, f"{same} units"),
        (
            "frame period in ms",
            metadata.frame_ms,
            frame_ms,
            f"{same} hop_ms × stack, or set resample=true on the source",
        ),
    ):
        if mine is not None and theirs != mine:
            raise UserError(f"{path}: {name} of the soft targets: {theirs}, expected here: {mine}; {remedy}")
    return metadata, _targets(path, metadata, members)


def read_metadata(path: Place | str) -> TargetMetadata:
    """Only the metadata of a soft-target shard; a UserError when there is none, or it is of a newer version."""
    return _metadata(path, first_member(path))


def tail_prior(path: Place | str, metadata: TargetMetadata) -> np.ndarray:
    """How the mass that was not kept is spread over the units, the prior of the shard: float64 [units], adding up to 1.

    A UserError when some mass was not kept and the shard has no prior, or it is damaged.
    """
    if metadata.tail_prior is None:
        if metadata.selection.mode in ("sampled", "alignment"):
            return np.full(metadata.num_units, 1.0 / metadata.num_units)
        raise UserError(f"{path}: has no prior (soft targets of version 1); label again, or choose missing_mass=ghost")
    try:
        return prior_of(from_text(metadata.tail_prior, metadata.num_units))
    except ValueError as error:
        raise UserError(f"{path}: {METADATA}: tail_prior is damaged ({error}); label the audio again") from None


def teacher_of(folder: Place | str) -> dict[str, Any]:
    """Who made the soft targets in a folder and how, as JSON: teacher, selection, codec; a UserError if it holds none."""
    metadata = metadata_of(folder)
    found = metadata.model_dump(include={"teacher", "selection", "codec"})
    return found if metadata.hidden is None else found | {"hidden": metadata.hidden.kind}


def metadata_of(folder: Place | str) -> TargetMetadata:
    """The metadata of the first shard of a folder; a UserError if it holds none."""
    with readable(folder, "folder of soft targets"):
        first = min((name for name in names_in(place(folder)) if name.endswith(".tar")), default=None)
    if first is None:
        raise UserError(f"{folder}: holds no soft-target shards; make them with `asr-kd label`")
    return read_metadata(place(folder) / first)


def with_targets(
    folder: Place | str, units_hash: str | None = None, num_units: int | None = None, frame_ms: int | None = None
) -> Callable[[Iterable[dict[str, Any]]], Iterator[dict[str, Any]]]:
    """A stage for `asr_kd.shards.dataset(…).compose(…)`: each sample gets its soft target as `target`.

    Samples that the teacher quarantined are passed over. The soft targets of a shard are in memory at a time.

    Args:
        units_hash: as of `read_target_shard`, like `num_units` and `frame_ms`.

    Raises:
        UserError: while it is read: as `read_target_shard`, and when a shard answers other audio or lacks a key.
    """
    return functools.partial(_joined, place(folder), (units_hash, num_units, frame_ms))


def _joined(
    folder: Place, reader: tuple[str | None, int | None, int | None], samples: Iterable[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    for _, of_shard in itertools.groupby(samples, lambda sample: sample["after"][:2]):
        for number, sample in enumerate(of_shard):
            path, key = folder / sample["__shard__"].name, sample["__key__"]
            if number == 0:
                metadata, pairs = read_target_shard(path, *reader)
                check_answers(path, metadata, sample["__url__"], sample["__shard__"].sha256)
                targets = dict(pairs)
            if key in metadata.quarantined:
                continue
            if key not in targets:
                raise UserError(f"{path}: has no {key} of {sample['__url__']}; label this audio again")
            yield {**sample, "target": targets[key]}


def check_answers(targets: Place | str, metadata: TargetMetadata, audio: Place | str, audio_sha256: str) -> None:
    """Refuse soft targets that were made from another audio shard.

    Args:
        targets: for the message.
        metadata: of the soft targets.
        audio: for the message.
        audio_sha256: of the audio shard.

    Raises:
        UserError: naming both sides.
    """
    if metadata.audio_sha256 != audio_sha256:
        raise UserError(
            f"{targets}: answers an audio shard with SHA-256 {metadata.audio_sha256[:16]}…, {audio} has "
            f"{audio_sha256[:16]}…; label this audio again (or give `pairs` of `asr-kd pair`, where it is another recording of the same moments)"
        )


def _metadata(path: Place | str, first: tuple[str, bytes] | None) -> TargetMetadata:
    if first is None or first[0] != METADATA:
        raise UserError(f"{path}: not a soft-target shard (no {METADATA} at its head); make it with `asr-kd label`")
    try:
        text = first[1].decode()
    except UnicodeDecodeError:
        raise UserError(f"{path}: {METADATA} is not UTF-8 text; label the audio again") from None
    value = parse_json(text, f"{path}: {METADATA}")
    if not isinstance(value, dict) or value.get("format") != "asr_kd-targets":
        raise UserError(f"{path}: {METADATA} does not describe soft targets; make them with `asr-kd label`")
    version = value.get("version")
    if not isinstance(version, int) or not 1 <= version <= VERSION:
        raise UserError(f"{path}: soft targets of version {version}, this program reads {VERSION}; use a newer asr_kd")
    checksum = value.pop("checksum", None)
    try:
        intact = checksum == hash_json(value)
    except UnicodeEncodeError:  # a lone surrogate, which is never written here
        intact = False
    if not intact:
        raise UserError(f"{path}: {METADATA} is damaged (the checksum differs); label the audio again")
    if version == 1 and isinstance(value.get("selection"), dict) and value["selection"].get("mode") == "posteriors":
        value["selection"]["mode"] = "mass"  # its name in version 1, whose floor was 0
    return build(TargetMetadata, value, f"{path}: {METADATA}")


def _targets(path: Place | str, metadata: TargetMetadata, members: Iterator[tuple[str, bytes]]) -> Iterator[Labelled]:
    seen: set[str] = set()
    frames = 0
    digest = hashlib.sha256()
    samples = _samples(path, metadata, members, digest, seen)
    while some := list(itertools.islice(samples, TOGETHER)):
        targets = decode_all([(f"{path}: {key}", data) for key, data, _ in some])
        for (key, _, hidden), target in zip(some, targets, strict=True):
            if target.num_units != metadata.num_units:
                raise UserError(
                    f"{path}: {key}: {target.num_units} units, its shard has {metadata.num_units}; label the audio again"
                )
            frames += target.frames
            yield Labelled(key, target, hidden)
    expected = metadata.statistics
    if (len(seen), frames) != (expected.utterances, expected.frames):
        raise UserError(
            f"{path}: holds {len(seen)} utterances and {frames} frames, its {METADATA} says {expected.utterances} and "
            f"{expected.frames}; label the audio again"
        )
    if metadata.members not in (None, digest.hexdigest()):  # older shards have none
        raise UserError(
            f"{path}: damaged (soft targets that are whole are not this shard's own); label the audio again"
        )


def _samples(
    path: Place | str,
    metadata: TargetMetadata,
    members: Iterator[tuple[str, bytes]],
    digest: hashlib._Hash,
    seen: set[str],
) -> Iterator[tuple[str, bytes, bytes | None]]:
    """Key, soft target and hidden states of each utterance, counted in `digest` and noted in `seen`."""
    for name, data in members:
        key, hidden = name.removesuffix(SUFFIX), None
        if key == name or key in seen or key in metadata.quarantined:
            raise UserError(f"{path}: the member {name} is foreign or there twice; label the audio again")
        seen.add(key)
        _count_in(digest, key, data)
        if metadata.hidden is not None:
            following, hidden = next(members, ("nothing", b""))
            if following != key + HIDDEN_SUFFIX:
                raise UserError(
                    f"{path}: {following} follows {name} in place of {key}{HIDDEN_SUFFIX}; label the audio again"
                )
            _count_in(digest, following, hidden)
        yield key, data, hidden
