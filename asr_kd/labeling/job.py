"""Run a teacher over audio shards and write soft-target shards; it can be resumed, and accounts for every utterance."""

from __future__ import annotations

import functools
import itertools
import json
import sys
import time
from abc import abstractmethod
from collections import Counter, defaultdict
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, closing
from typing import Any

import numpy as np
import torch

from asr_kd.allocator import keep_freed_memory
from asr_kd.audio.blas import one_thread
from asr_kd.audio.features import version_of
from asr_kd.errors import UserError
from asr_kd.files import Place, claim_folder, clear_torn, names_in, place, sha256_file, write_json, write_whole
from asr_kd.labeling.hidden import check_taps, hidden_claim, make_quantiser, quantiser_of
from asr_kd.labeling.load import NO_TEXT, deferred, load, select
from asr_kd.labeling.settings import OF_TEXT, LabelSettings
from asr_kd.labeling.shard import ahead, label_shard, one_behind, selection_of
from asr_kd.loggers import Loggers
from asr_kd.models.acoustic import Checkpoint, pick_device
from asr_kd.models.origin import score_of
from asr_kd.models.outside.vocabulary import unreached
from asr_kd.models.teachers import load_teacher
from asr_kd.progress import Progress
from asr_kd.shards.index import ShardInfo, ShardList
from asr_kd.shards.keys import check_keys
from asr_kd.shards.leases import Leases
from asr_kd.shards.manifest import read_transcripts
from asr_kd.shards.quarantine import Quarantine
from asr_kd.shards.stream import LoadedShard, killed, map_ordered, process_pool, serve_parent
from asr_kd.shards.tarset import read_index
from asr_kd.summary import tell_summary
from asr_kd.targets import codec
from asr_kd.targets.store import TargetMetadata, check_answers, read_metadata
from asr_kd.units import MODEL_FILE

#: written when a job finishes or gives up: a line for each utterance that was not labelled
QUARANTINE = "quarantine.jsonl"
#: of a teacher from outside: its outputs, and the unit that each stands for; the units are beside it
VOCABULARY = "vocabulary.json"
#: threads that read the metadata of finished shards
READERS = 16
#: fewer shards than this are looked up one by one, more by listing the folder
FEW = 16
#: figures of the report that are means over all frames
MEANS = (
    "entries_per_frame", "bytes_per_frame", "stored_bytes_per_frame", "mean_kept_mass", "mean_kl", "mean_kl_prior", "top1_kept",
)  # fmt: skip
#: what the summary has under names of its own
COUNTED = ("utterances", "labelled", "quarantined", "audio_hours")


@one_thread()
def label(settings: LabelSettings) -> None:
    """Label every shard of `settings.audio` with the teacher's posteriors, or its alignment to the text.

    Writes into `settings.output` one soft-target shard for each audio shard, under the same name, and at the end
    `quarantine.jsonl`, `report.json` (what was labelled) and `timing.json` (how fast). Killed at any moment and started
    again, it continues with the missing shards and produces the same bytes (except `timing.json`). Any number of processes
    with these settings share the work, on all machines that share the folder; each ends when everything is done.

    Raises:
        UserError: when the output belongs to other settings, or more than `max_bad_share` was quarantined.
    """
    began = time.time()
    keep_freed_memory()
    loggers, engine_of = Loggers(settings.log), _engine(settings)
    # the driver of a cluster needs only the teacher's description
    device = pick_device("cpu" if settings.engine == "ray" else settings.device)
    torch.set_num_threads(settings.threads)
    infos = read_index(settings.audio)
    total = infos.samples
    if not total:
        raise UserError(f"{settings.audio}: holds no utterances; prepare the audio shards again")
    teacher = load_teacher(settings.teacher, device, settings.precision)
    check_taps(settings, teacher)
    if settings.features_on == "device" and teacher.model.hears_sound:
        raise UserError(
            f"features_on: {settings.teacher} hears the sound itself, and no features are made of it; leave it out"
        )
    transcripts = read_transcripts(settings.transcripts) if settings.transcripts else None
    if transcripts is not None:
        check_keys(settings.audio, infos, f"transcripts {settings.transcripts}", transcripts.__contains__)
    claim = _claim(settings, teacher, infos)
    named = {infos.hash: str(settings.audio), str(claim["transcripts"]): str(settings.transcripts)}
    claim_folder(settings.output, "label", claim, ".tar", named)
    output = place(settings.output)
    if teacher.vocabulary:  # a student of these targets takes its units from here
        with write_whole(output / MODEL_FILE, make_folder=False) as file:
            file.write(teacher.units.model)
        write_json(output / VOCABULARY, teacher.vocabulary, make_folder=False)
        if lost := unreached(teacher.vocabulary):
            print(f"{settings.teacher}: {lost}", file=sys.stderr)
    make_quantiser(settings, teacher, infos)

    start = time.perf_counter()
    left = missing(infos, output)
    finished = len(infos) - len(left)
    shards, frames, audio_seconds = 0, 0, 0.0  # what this process has labelled
    bad = Quarantine(total, settings.max_bad_share, "labelled")

    def published(info: ShardInfo) -> bool:
        there = (output / info.name).exists()
        if there:  # it was missing when this process last looked: another one made it
            progress.advance(info.samples)
        return there

    loggers.start("label", output, settings.model_dump(mode="json", exclude={"log"}))
    with (
        loggers,
        Progress("label", total, "utterances") as progress,
        Leases(output / ".leases") as leases,
        engine_of(settings, teacher, transcripts, progress) as engine,
    ):

        def work(free: Iterator[ShardInfo]) -> Iterator[ShardInfo]:
            nonlocal shards, frames, audio_seconds
            for info, metadata in engine.run(free):
                yield info
                shards += 1
                frames += metadata.statistics.frames
                audio_seconds += metadata.statistics.audio_seconds
                for key, reason in metadata.quarantined.items():
                    bad.add(key, reason)
                took = time.perf_counter() - start
                loggers.scalars(shards, {
                    "utterances": progress.done, "quarantined": bad.count, "audio_hours": audio_seconds / 3600, "frames_per_second": frames / took,
                    "audio_hours_per_hour": audio_seconds / took, "entries_per_frame": metadata.statistics.entries_per_frame,
                })  # fmt: skip
                if bad.too_many:  # no need to work for weeks on a job that must fail
                    _account(settings, teacher, infos, total, partly=True)

        def not_done(some: ShardList) -> ShardList:
            left = missing(some, output)
            progress.advance(total - left.samples - progress.done)  # done by others in the meantime
            return left

        progress.resume(total - left.samples)
        leases.share(left, lambda info: info.name, published, not_done, work)
    seconds = time.perf_counter() - start
    report = _account(settings, teacher, infos, total)
    if shards:
        timing = {
            "device": ", ".join(sorted(engine.devices)),
            "workers": engine.workers(seconds),
            "threads": settings.threads,
            "shards": shards,
            "shards_done_before": finished,
            "seconds": seconds,
            "frames_per_second": frames / seconds,
            "audio_hours_per_hour": audio_seconds / seconds,
        }
        write_json(output / "timing.json", timing, make_folder=False)
    clear_torn(output, began)
    tell_summary(
        settings.output, utterances=total, done=report["labelled"], quarantined=report["quarantined"], audio_hours=report["audio_hours"],
        figures={name: value for name, value in report.items() if name not in COUNTED} | {"frames_per_second": frames / seconds},
    )  # fmt: skip
    beside = f", {report['hidden']['bytes_per_frame']:.2f} of hidden states" if settings.taps else ""
    kl = "" if report["mean_kl"] is None else f", mean KL {report['mean_kl']:.5f} nat"
    print(
        f"{output}: {total:,} utterances in = {report['labelled']:,} labelled + {report['quarantined']:,} quarantined\n"
        f"{report['audio_hours']:.3f} audio hours, {report['frames']:,} frames ({frames / seconds:,.0f} a second), "
        f"{report['bytes_per_frame']:.2f} bytes a frame{beside}, mass kept {report['mean_kept_mass']:.5f}{kl}"
    )


class Engine(AbstractContextManager["Engine"]):
    """Labels the shards it is given; as a context manager it frees its resources.

    Args:
        transcripts: key → text in place of the text in the shards, for an alignment.

    Attributes:
        devices: where teachers are.
    """

    def __init__(
        self, settings: LabelSettings, teacher: Checkpoint, transcripts: dict[str, str] | None, progress: Progress
    ) -> None:
        self.settings, self.teacher, self.transcripts, self.progress = settings, teacher, transcripts, progress
        self.devices: set[str] = set()

    @abstractmethod
    def run(self, free: Iterator[ShardInfo]) -> Iterator[tuple[ShardInfo, TargetMetadata]]:
        """Label the shards of `free`, taken one by one as work proceeds; yields each when it is published, or raises UserError."""

    def workers(self, seconds: float) -> float:
        """Average number of workers over the `seconds` that the job took; all must have ended."""
        return 1.0


class LocalEngine(Engine):
    """Labels in this process: one thread decodes the next shard, one runs the teacher, one encodes and publishes.

    With `loader_workers`, that many processes decode, and as many encode.
    """

    def __init__(self, *common: Any) -> None:
        super().__init__(*common)
        self.devices, self.quantiser = {str(self.teacher.device)}, quantiser_of(self.settings)
        self.behind, count = ThreadPoolExecutor(1), self.settings.loader_workers
        self.encoders = process_pool(count, "loader_workers", serve_parent) if count else None

    def __exit__(self, *_: object) -> None:
        self.behind.shutdown()
        if self.encoders:
            self.encoders.shutdown()

    def run(self, free: Iterator[ShardInfo]) -> Iterator[tuple[ShardInfo, TargetMetadata]]:
        settings, teacher = self.settings, self.teacher
        with closing(self._loaded(free)) as shards:  # an error ends the loaders at once
            selected = (select(settings, teacher, self.transcripts, info, shard) for info, shard in shards)
            try:
                yield from one_behind(
                    label_shard(settings, teacher, loaded, self.progress, self.behind, self.encoders, self.quantiser)
                    for loaded in selected
                )
            except BrokenProcessPool:
                raise UserError(killed(settings.loader_workers)) from None

    def _loaded(self, free: Iterator[ShardInfo]) -> Generator[tuple[ShardInfo, LoadedShard]]:
        settings, teacher, count = self.settings, self.teacher, self.settings.loader_workers
        read = functools.partial(load, settings, teacher.features, deferred(settings, teacher))
        if not count:
            yield from ahead(read, free)
            return
        first = list(itertools.islice(free, 1))  # is read here, while the processes start with the next ones
        others = map_ordered(read, free, count)
        yield from map(read, first)
        yield from others


def _engine(settings: LabelSettings) -> type[Engine]:
    if settings.engine == "local":
        return LocalEngine
    from asr_kd.labeling.ray_engine import RayEngine

    return RayEngine


def _claim(settings: LabelSettings, teacher: Checkpoint, infos: ShardList) -> dict[str, Any]:
    # everything that the output depends on; not the paths of the inputs, nor how the work is split
    return {
        "max_seconds": settings.max_seconds,
        **selection_of(settings).model_dump(),
        **hidden_claim(settings),
        **settings.model_dump(include={"precision"}),
        "teacher": teacher.fingerprint,
        "audio": infos.hash,
        "transcripts": sha256_file(settings.transcripts) if settings.transcripts else None,
        "codec": {"version": codec.VERSION, "levels": codec.LEVELS},
        "heard": "sound"
        if teacher.features.heard == "sound"
        else f"float16 features of version {version_of(teacher.features)}",
    }


def missing(infos: ShardList, output: Place) -> ShardList:
    """The audio shards that `output` has no soft targets for."""
    return infos.take(~_there(infos, output))


def _there(infos: ShardList, output: Place) -> np.ndarray:
    """bool [shards], whether `output` has soft targets for each."""
    if len(infos) < FEW:  # cheaper than listing the folder
        return np.array([(output / name).exists() for name in infos.names], bool)
    there = set(names_in(output))
    return np.array([name in there for name in infos.names], bool)


def _all_finished(
    settings: LabelSettings, teacher: Checkpoint, infos: ShardList
) -> Iterator[tuple[ShardInfo, tuple[TargetMetadata, int]]]:
    """Metadata and size of every shard, in order."""

    quantiser = quantiser_of(settings)
    widths = {tap: teacher.model.taps[tap] for tap in settings.taps}
    marks = {"codebooks": settings.codebooks if quantiser else None, "quantiser": quantiser and quantiser.fingerprint}
    hidden = {"keep": settings.keep, "taps": widths, **marks} if settings.taps else None

    def read(info: ShardInfo) -> tuple[TargetMetadata, int]:
        path = place(settings.output) / info.name
        metadata = read_metadata(path)
        check_answers(path, metadata, info.at(settings.audio), info.sha256)
        same = metadata.selection == selection_of(settings) and hidden == (metadata.hidden and metadata.hidden.kind)
        if metadata.teacher != teacher.fingerprint or not same:
            raise UserError(f"{path}: was made by teacher {metadata.teacher} or with other settings; remove this file")
        return metadata, path.stat().st_size

    with ThreadPoolExecutor(READERS) as pool:
        for start in range(0, len(infos), 64 * READERS):  # in batches: each waiting request takes memory
            some = infos[start : start + 64 * READERS]
            yield from zip(some, pool.map(read, some), strict=True)


def _account(
    settings: LabelSettings, teacher: Checkpoint, infos: ShardList, total: int, partly: bool = False
) -> dict[str, Any]:
    """Check finished shards (`partly`: those that are there) against their audio; write quarantine.jsonl and, of all, report.json.

    A UserError when too many of the `total` utterances, or all of them, are quarantined; quarantine.jsonl lists them.
    """
    output = place(settings.output)
    finished = infos.take(_there(infos, output)) if partly else infos
    sums: dict[str, float] = dict.fromkeys(("utterances", "frames", "audio_seconds"), 0)
    weighted: Counter[str] = Counter()
    hidden: dict[str, float] = defaultdict(float)
    worst = 0.0
    stored = 0
    bad = Quarantine(total, settings.max_bad_share, "labelled")
    with write_whole(output / QUARANTINE, "w", make_folder=False) as file:
        for info, (metadata, size) in _all_finished(settings, teacher, finished):
            stored += size
            for key, reason in metadata.quarantined.items():
                file.write(json.dumps({"key": key, "shard": info.name, "reason": reason}, ensure_ascii=False) + "\n")
                bad.add(key, reason)
            if len(metadata.quarantined) + metadata.statistics.utterances != info.samples:
                raise UserError(
                    f"{output / info.name}: {metadata.statistics.utterances} labelled + {len(metadata.quarantined)} "
                    f"quarantined are not the {info.samples} utterances of its audio; prepare the audio shards again"
                )
            if (held := metadata.hidden) is not None:
                hidden["rows"] += held.rows
                hidden["bytes"] += held.bytes_per_frame * metadata.statistics.frames
                for tap, share in held.lost.items():
                    hidden[tap] += held.rows * share
            statistics = metadata.statistics.model_dump(exclude_none=True)
            worst = max(worst, statistics.pop("worst_kl", 0.0))
            for name in sums:
                sums[name] += statistics.pop(name)
            for name, value in statistics.items():
                weighted[name] += value * metadata.statistics.frames
    _, reason = bad.first
    advice = "fix the audio"
    if reason == NO_TEXT:
        advice = f"add them to {settings.transcripts}" if settings.transcripts else "give the texts with transcripts="
    elif settings.mode in OF_TEXT and reason.startswith("text "):
        advice = "fix the texts"
    bad.refuse(str(settings.audio), f"see {output / QUARANTINE}, {advice}")
    if partly:
        return {}
    if foreign := {name for name in names_in(output) if name.endswith(".tar")} - set(infos.names):
        raise UserError(f"{output}: {min(foreign)} belongs to no audio shard; remove it")
    weighted["stored_bytes_per_frame"] = stored
    frames = max(sums["frames"], 1)
    report: dict[str, Any] = {
        "shards": len(infos),
        "utterances": total,
        "labelled": sums["utterances"],
        "quarantined": bad.count,
        "audio_hours": sums["audio_seconds"] / 3600,
        "frames": sums["frames"],
        **{name: weighted[name] / frames if name in weighted else None for name in MEANS},
        "worst_kl": worst if "mean_kl" in weighted else None,
    }
    if settings.taps:
        lost = {tap: hidden[tap] / max(hidden["rows"], 1) for tap in settings.taps}
        spent = hidden["bytes"] / frames
        report["hidden"] = {"keep": settings.keep, "rows": hidden["rows"], "bytes_per_frame": spent, "lost": lost}
    if (score := score_of(teacher.training)) is not None:
        report["teacher"] = {"development_wer": score.wer, "development": score.audio}
    write_json(output / "report.json", report, make_folder=False)
    return report
