"""What a large job will need, from a small one that was measured."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from asr_kd.allocator import keep_freed_memory
from asr_kd.config.base import folders_of
from asr_kd.errors import UserError
from asr_kd.files import Place, claimed_settings, parse_json, place, read_json, read_text, write_json
from asr_kd.models.acoustic import build_model, load_checkpoint, parameters, pick_device
from asr_kd.plan.law import fit, read_points
from asr_kd.plan.settings import PlanSettings
from asr_kd.shards.cutting import Account
from asr_kd.shards.records import OUTCOME, RECORDS, Outcome
from asr_kd.shards.settings import TIMING
from asr_kd.shards.tarset import read_index
from asr_kd.summary import tell_summary
from asr_kd.training.speed import made_up_batch, step_speed

#: file of a training run, a line a step
METRICS = "metrics.jsonl"
#: frames of each utterance in the batch on which a network's step is timed: ten seconds at 30 ms
UTTERANCE_FRAMES = 333


@dataclass
class Plan:
    """The figures of a plan; costs are in the currency of the prices.

    Attributes:
        audio_hours: as they lie in shards.
        shards: of audio, and as many of soft targets.
        label_device_hours: of one device; `label_wall_hours`, with all workers busy all the time. The training's likewise.
        prepare_worker_hours: of one worker, a core of a machine; not priced. None: not known, as `train_…` without a training.
        recording_hours: that become these audio hours, pauses and all; None: recordings are not cut, or it is not known.
        wer: of a student that learns from these audio hours, and `wer_low`, `wer_high` its 95 % interval; None: nothing was measured, or it
            follows no law.
    """

    audio_hours: float
    shards: int
    audio_bytes: float
    target_bytes: float
    label_device_hours: float
    label_wall_hours: float
    label_cost: float | None
    prepare_worker_hours: float | None = None
    prepare_wall_hours: float | None = None
    train_device_hours: float | None = None
    train_wall_hours: float | None = None
    train_cost: float | None = None
    recording_hours: float | None = None
    wer: float | None = None
    wer_low: float | None = None
    wer_high: float | None = None


@dataclass
class Prepared:
    """How audio was prepared.

    Attributes:
        seconds: of audio in shards.
        heard: seconds of what they were made from, pauses and all.
        worker_seconds: that one worker needs for them; None: not known.
    """

    seconds: float = 0.0
    heard: float = 0.0
    worker_seconds: float | None = 0.0


def plan(settings: PlanSettings) -> Plan:
    """Predict bytes, hours and cost, and print them with their assumptions.

    A UserError when the measured job is not finished, was over other audio, or measured nothing.
    """
    infos = read_index(settings.audio)
    seconds, size = infos.seconds, sum(info.bytes for info in infos)
    targets = place(settings.targets)
    if not (targets / "report.json").exists():
        raise UserError(f"{targets}: has no report.json; give the folder of a label job that is finished")
    if claimed_settings(targets).get("audio") != infos.hash:
        raise UserError(
            f"{targets}: was not labelled from {settings.audio} as it is now; give the audio that it was labelled from"
        )
    report = read_json(targets / "report.json")
    if not seconds or not report["audio_hours"] or not report["frames"]:
        raise UserError(f"{settings.audio}: holds no audio that could be measured; label a few shards first")
    heard = report["audio_hours"]
    stored = report["stored_bytes_per_frame"] * report["frames"] / heard
    prepared = _prepared(settings)
    share = _written_share(settings, prepared)
    hours = settings.hours or (settings.recording_hours or 0.0) * share
    speed, source = _label_speed(settings)
    shards = -(-int(hours * 3600 * len(infos)) // max(1, int(seconds)))
    effort = _effort(settings, hours / speed, settings.workers)
    result = Plan(hours, shards, hours * size / (seconds / 3600), hours * stored, *effort)
    beside = ""
    if held := report.get("hidden"):
        hidden = held["bytes_per_frame"] * report["frames"] / heard
        beside = f", {hidden / 1e6:,.3f} MB an hour of it hidden states ({held['keep']}, {held['bytes_per_frame']:.2f} bytes a frame)"
    assumed = [
        f"audio: {size / (seconds / 3600) / 1e6:,.1f} MB an hour, {seconds / len(infos) / 3600:,.3f} hours a shard ({settings.audio})",
        f"soft targets: {stored / 1e6:,.3f} MB an hour, {report['bytes_per_frame']:.2f} bytes a frame and the tar around them{beside} "
        f"({settings.targets})",
        f"labelling: {speed:,.0f} audio hours an hour and worker ({source})",
    ]
    assumed[1:1] = _add_preparing(settings, result, prepared, share)
    if settings.student or settings.train_speed or settings.train_model:
        speed, source = _training_speed(settings)
        effort = _effort(settings, hours * settings.passes / speed, settings.train_workers)
        result.train_device_hours, result.train_wall_hours, result.train_cost = effort
        assumed.append(
            f"training: {speed:,.0f} audio hours an hour and worker ({source}), {settings.passes} passes, "
            "no time lost between workers or waiting for data"
        )
    if settings.measured:
        assumed.append(_add_wer(settings.measured, result))
    _print(settings, result, assumed)
    tell_summary(figures=vars(result))
    if settings.report:
        write_json(settings.report, vars(result))
    return result


def _prepared(settings: PlanSettings) -> Prepared:
    """How the measured audio was prepared, as far as it is known."""
    every = Prepared()
    for folder in map(place, folders_of(settings.audio)):
        seconds, outcome, timing = read_index(folder).seconds, folder / RECORDS / OUTCOME, folder / TIMING
        cut = Account(**Outcome(**read_json(outcome)).segments) if outcome.exists() else Account()
        every.seconds += seconds
        every.heard += seconds - cut.written + cut.heard
        took = read_json(timing) if timing.exists() else None  # of an earlier version, or of no `prepare`
        if took is None or not took["audio_hours_per_hour"]:
            every.worker_seconds = None
        elif every.worker_seconds is not None:
            every.worker_seconds += seconds * took["workers"] / took["audio_hours_per_hour"]
    return every


def _written_share(settings: PlanSettings, prepared: Prepared) -> float:
    """Seconds in shards for each that `prepare` hears."""
    if settings.written_share:
        return settings.written_share
    if settings.recording_hours and prepared.heard == prepared.seconds:
        raise UserError(
            f"{settings.audio}: was not cut from recordings (asr-kd prepare segment=…), so how much of them is written is not known; give "
            "written_share="
        )
    return prepared.seconds / prepared.heard


def _add_preparing(settings: PlanSettings, result: Plan, prepared: Prepared, share: float) -> list[str]:
    """Add what is known of preparing to a plan; returns what is assumed for it, in words."""
    heard, unit, measured = (
        settings.recording_hours or result.audio_hours / share,
        "audio hours",
        f"measured, {settings.audio}",
    )
    said = []
    if share < 1:
        result.recording_hours, unit = heard, "hours of recordings"
        said.append(
            f"cutting: {share:.1%} of recordings are written ({'given' if settings.written_share else measured})"
        )
    speed = settings.prepare_speed or (prepared.worker_seconds and prepared.heard / prepared.worker_seconds)
    if speed:
        result.prepare_worker_hours = heard / speed
        result.prepare_wall_hours = result.prepare_worker_hours / settings.prepare_workers
        said.append(
            f"preparing: {speed:,.0f} {unit} an hour and worker ({'given' if settings.prepare_speed else measured})"
        )
    return said


def _add_wer(measured: str, result: Plan) -> str:
    """Add what a student would be worth, where the points follow a law; returns what is assumed for it, in words."""
    law = fit(read_points(measured))
    most, hours = float(law.hours.max()), result.audio_hours
    if refusal := law.refusal:
        return f"WER: not extrapolated, {refusal} ({measured})"
    result.wer, result.wer_low, result.wer_high = law.wer(hours)
    value, low, high = law.exponent
    far = f", {hours / most:,.0f} times the most that was measured" if hours >= 2 * most else ""
    return (
        f"WER: falls as hours to the power {-value:.3f} (95 % interval {-high:.3f} to {-low:.3f}), as it does from {law.hours.min():,.2f} to {most:,.2f} "
        f"hours{far}; with the same teacher, student and training ({measured})"
    )


def _label_speed(settings: PlanSettings) -> tuple[float, str]:
    """Audio hours an hour that one worker labels, and the source of the figure."""
    if settings.label_speed:
        return settings.label_speed, "given"
    path = place(settings.targets) / "timing.json"
    if not path.exists():  # the process that ended the job had no shard left to label
        raise UserError(
            f"{settings.targets}: has no timing.json, so the speed of labelling is not known; "
            "give label_speed= (audio hours that one worker labels in an hour)"
        )
    timing = read_json(path)
    speed = timing["audio_hours_per_hour"] / timing.get("workers", 1)
    return speed, f"measured on {timing['device']}, {timing['threads']} threads"


def _training_speed(settings: PlanSettings) -> tuple[float, str]:
    """Audio hours an hour that one worker trains on, and the source of the figure."""
    if settings.train_speed:
        return settings.train_speed, "given"
    if settings.student:
        return _speed_of_run(place(settings.student)), settings.student
    assert settings.train_model is not None and settings.train_units is not None  # the settings have one of the three
    device, features = pick_device(settings.device), settings.train_features
    keep_freed_memory()
    torch.set_num_threads(settings.threads)
    utterances = max(1, settings.train_batch_frames // UTTERANCE_FRAMES)
    batch = made_up_batch(features, settings.train_units, utterances, UTTERANCE_FRAMES)
    speed = step_speed(settings.train_model, features, settings.train_units, device, batch)
    weights = parameters(build_model(settings.train_model, features.dimension, settings.train_units))
    what = f"{settings.train_model.kind} of {weights:,} parameters"
    source = f"its bare step measured on {device}, {settings.threads} threads: {what}, {settings.train_units:,} units"
    return speed * features.frame_ms / 1000, source


def _speed_of_run(run: Place) -> float:
    """Audio hours an hour of a training run, by the median of its steps."""
    frame_seconds = load_checkpoint(run).frame_ms / 1000
    steps = [parse_json(line, str(run / METRICS)) for line in read_text(run / METRICS, "training run").splitlines()]
    speeds = sorted(step["frames_per_second"] for step in steps if "frames_per_second" in step)
    if not speeds:
        raise UserError(f"{run}: its {METRICS} holds no steps; give a training run, or train_speed")
    return speeds[len(speeds) // 2] * frame_seconds


def _effort(settings: PlanSettings, hours: float, workers: int) -> tuple[float, float, float | None]:
    """Hours of one device, hours with all workers busy all the time, and cost."""
    return hours, hours / workers, None if settings.price_per_hour is None else hours * settings.price_per_hour


def _print(settings: PlanSettings, result: Plan, assumed: list[str]) -> None:
    cut = f", cut from {result.recording_hours:,.0f} hours of recordings" if result.recording_hours else ""
    rows = [
        ("audio", f"{result.audio_hours:,.0f} hours, {result.shards:,} shards, {_size(result.audio_bytes)}{cut}"),
        ("soft targets", f"{result.shards:,} shards, {_size(result.target_bytes)}"),
    ]
    if result.prepare_worker_hours is not None:
        hours, wall_hours = result.prepare_worker_hours, result.prepare_wall_hours
        rows.append(
            (
                "preparing",
                f"{hours:,.1f} worker-hours, {wall_hours:,.1f} hours with {settings.prepare_workers:,} workers",
            )
        )
    for name, job, workers in (("labelling", "label", settings.workers), ("training", "train", settings.train_workers)):
        hours, wall_hours, cost = (getattr(result, f"{job}_{of}") for of in ("device_hours", "wall_hours", "cost"))
        if hours is not None:
            price = "" if cost is None else f", cost {cost:,.2f}"
            rows.append((name, f"{hours:,.1f} device-hours, {wall_hours:,.1f} hours with {workers:,} workers{price}"))
    if result.wer is not None:
        rows.append(("WER", f"{result.wer:.1%}, 95 % interval {result.wer_low:.1%} to {result.wer_high:.1%}"))
    for name, text in rows:
        print(f"{name:<14} {text}")
    print("assuming")
    for line in assumed:
        print(f"  {line}")


def _size(size: float) -> str:
    steps = min(5, max(0, int(math.log10(max(size, 1)) // 3)))
    return f"{size / 1000**steps:,.3g} {('B', 'kB', 'MB', 'GB', 'TB', 'PB')[steps]}"
