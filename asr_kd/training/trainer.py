"""Job 2: one trainer for teachers and students. Read it from the top: `train` is the whole run."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import torch
from torch.optim.swa_utils import AveragedModel

from asr_kd.allocator import keep_freed_memory
from asr_kd.audio.blas import one_thread
from asr_kd.audio.features import versioned
from asr_kd.config.knobs import made_on_device
from asr_kd.distillation.answers import CYCLE, OWN, answerers, check_same_input, foreigners
from asr_kd.distillation.knowledge import Pupil
from asr_kd.ending import stop_requests
from asr_kd.errors import UserError
from asr_kd.files import claim_folder, local
from asr_kd.loggers import Loggers, is_installed
from asr_kd.models.acoustic import Checkpoint, build_model, load_checkpoint, parameters, pick_device
from asr_kd.models.teachers import is_foreign, load_teacher
from asr_kd.shards.leases import sole_writer
from asr_kd.training.averaging import remove_others
from asr_kd.training.batches import PhaseStream
from asr_kd.training.checkpoints import STATE, load_state
from asr_kd.training.codistillation import share_no_more
from asr_kd.training.distributed.exchange import Exchange
from asr_kd.training.distributed.ranks import Ranks, joined, total
from asr_kd.training.metrics import Metrics
from asr_kd.training.outcome import concluded, phase_lost
from asr_kd.training.phase import begin_phase, run_phase, save
from asr_kd.training.provenance import provenance, start_from
from asr_kd.training.scoring import restore_best, score, score_mean
from asr_kd.training.settings import TrainSettings
from asr_kd.training.step import Learner, make_optimizer
from asr_kd.training.texts import check_texts, left_out
from asr_kd.training.weights import with_weights
from asr_kd.units import Units, load_units


@one_thread()
def train(settings: TrainSettings) -> None:
    """Train an acoustic model through the phases of `settings`; run again after an interruption, it resumes.

    Writes into `settings.output`: `best/`, the checkpoint with the best score on the development set (`settings.choose`);
    `last/state.safetensors`, from which an interrupted run resumes; `scored/`, checkpoints to average (`settings.average`);
    `shared/`, checkpoints that other runs learn from (`settings.share`); `metrics.jsonl`, which loggers are told too (`settings.log`). Started by
    `torchrun`, several processes train one network (`settings.distributed`).

    Raises:
        UserError: when settings, units, targets and audio do not fit each other, or too much of the data is unusable.
    """
    keep_freed_memory()
    torch.set_num_threads(settings.threads)
    with joined(pick_device(settings.device)) as ranks:
        _train(settings, ranks)


def _train(settings: TrainSettings, ranks: Ranks) -> None:
    run = local(settings.output, "output")
    settings, weighed = with_weights(settings)
    carried, world = any(phase.chunks and phase.chunks.carry for phase in settings.phases), ranks.world
    if settings.lanes % world:
        raise UserError(f"lanes: {settings.lanes} is not a multiple of {world} processes; set lanes={world}")
    if world > 1 and carried:
        raise UserError("chunks.carry: takes another number of steps in each process; train in one, or leave carry out")
    loggers, units = _loggers(settings, ranks), load_units(settings.units)
    sources = [source for phase in settings.phases for source in phase.sources]
    runs = [one for source in sources for one in source.runs]
    _refuse_foreign(settings.init, [one.run for one in runs])
    made = OWN | {one.name for one in runs}
    asked = {name for source in sources for name in source.teachers if name not in made}
    teachers: dict[str, Checkpoint] = {folder: load_teacher(folder, ranks.device) for folder in sorted(asked)}
    for folder, teacher in teachers.items():
        otherwise = ", or label the audio and learn the targets with resample=true"
        check_same_input(f"teacher: {folder}", teacher, units, settings.features, otherwise)
    torch.manual_seed(settings.seed)
    init = load_checkpoint(settings.init) if settings.init else None
    on_device, phases = made_on_device(settings.features_on, ranks.device.type), range(len(settings.phases))
    streams = [PhaseStream(settings, phase, units, foreigners(teachers), on_device) for phase in phases]
    opened = [source for stream in streams for source in stream.sources]
    for remark in check_texts(settings, units, opened, ranks.first) + left_out(opened) + weighed:
        _say(ranks, remark)
    data = provenance(settings, units, init, teachers)
    claim_folder(
        run, "train", {**settings.model_dump(exclude={"log"}), "features": versioned(settings.features), **data}
    )
    with sole_writer(run) if ranks.first else nullcontext(lambda: None) as check:  # one lease covers all ranks
        student = build_model(settings.model, settings.features.dimension, units.size).to(ranks.device)
        if init:
            start_from(init, student, settings, units)
        kinds = [kind for stream in streams for lesson in stream.lessons for kind in lesson.kinds]
        pupil = Pupil(student, kinds).to(ranks.device)
        if (pupil.taps or pupil.beside) and carried:
            raise UserError(
                "chunks.carry: hears the student alone, chunk by chunk; leave out carry, or what trains modules beside it or looks at its layers"
            )
        learner = Learner(settings, pupil, make_optimizer(pupil, settings), Exchange(pupil, ranks), check=check)
        if settings.ema_decay:
            learner.average = AveragedModel(pupil)
        if settings.teacher_decay is not None:
            learner.taught_by = AveragedModel(pupil)
        learner.teachers = answerers(teachers, learner.taught_by or learner.average)
        torch.manual_seed(settings.seed + ranks.rank)  # the same weights on all ranks, but different dropout
        _run(learner, streams, units, run, loggers)


def _refuse_foreign(init: str | None, runs: list[str]) -> None:
    if run := next(filter(is_foreign, runs), None):
        raise UserError(
            f"teacher.run: {run} is a model from outside, and no run that shares what it learns; let it answer as it is: teacher: {run}"
        )
    if init and is_foreign(init):
        raise UserError(
            f"init: {init} is a model from outside, whose network is none of those that are trained here; leave out init, and learn from it as a "
            "teacher"
        )


def _loggers(settings: TrainSettings, ranks: Ranks) -> Loggers:
    """Who is told; TensorBoard unasked where it is installed."""
    unasked = ["tensorboard"] if settings.tensorboard and "tensorboard" not in settings.log else []
    if unasked and not is_installed("tensorboard"):
        _say(ranks, "TensorBoard is not installed (asr-kd[tensorboard]), so metrics.jsonl alone has the curves")
        unasked = []
    return Loggers([*settings.log, *unasked] if ranks.first else [])


def _run(learner: Learner, streams: list[PhaseStream], units: Units, run: Path, loggers: Loggers) -> None:
    """All phases, from the saved state if there is one, in a folder leased to this job."""
    settings, ranks, saved = learner.settings, learner.ranks, None
    if (run / STATE).exists():
        saved = load_state(run, learner)
        if ranks.first:
            remove_others(run, learner.position.kept)
        if learner.position.finished:
            if ranks.first:
                print(concluded(learner.position, settings, again=True))
            return
        _say(ranks, f"{run}: resuming at step {learner.position.step:,}")
    position = learner.position
    step = position.step if saved is not None else -1
    if ranks.first:
        loggers.start("train", run, settings.model_dump(mode="json", exclude={"log"}), step)
    metrics = Metrics(run, step, loggers, ranks.first)
    several = f", {ranks.world} processes" if ranks.world > 1 else ""
    bits = f" of {settings.model.bits} bits" if settings.model.bits else ""
    size = f"{parameters(learner.pupil.student):,} parameters{bits}, {units.size} units"
    _say(ranks, f"{run}: {settings.model.kind}, {size}, on {ranks.device}{several}")
    with metrics, stop_requests() as stop_asked:
        if saved is None:
            # the first point of the curve; also finds a bad development set before the training, not after it
            position.lanes = [stream.start() for stream in streams]
            score(learner, units, metrics, run)
            save(learner, metrics, run)
        elif saved and not position.step:  # saved before a phase has begun, when there was no method to have a state
            learner.exchange.load_state_dict(saved)
            saved = None
        while not position.finished:
            stream = streams[position.phase]
            begin_phase(learner, stream, saved)
            saved = None
            run_phase(learner, stream, units, metrics, run, stop_asked)
            if position.step != position.scored:
                score(learner, units, metrics, run)
            position.phase, position.turn, position.phase_seconds = position.phase + 1, 0, 0.0
            if position.phase == len(streams):
                position.phase, position.cycle = 0, position.cycle + 1
                position.finished = position.cycle == settings.cycles
                if position.finished:
                    share_no_more(learner, run)
                if position.finished and ranks.first and position.kept:
                    score_mean(learner, units, metrics, run)
            if ranks.first and (lost := phase_lost(position, settings, stream.phase)):
                print(f"{run}: {lost}")
            position.phase_start = position.step
            # The next phase starts from the best weights, so that a phase can only help. The saved state has them, as
            # `best` may hold other weights when the run resumes.
            if not position.finished:
                total(torch.zeros(1), ranks)  # wait until the first process has written them
                restore_best(learner, run)
                learner.exchange.restart()
                for average in filter(None, (learner.average, learner.taught_by)):
                    average.n_averaged.zero_()  # the next step's weights start a new average, and till then these answer
                    average.module.load_state_dict(learner.pupil.state_dict())
                learner.watches.clear()
                if not position.phase and any(
                    CYCLE in source.plan.teachers for one in streams for source in one.sources
                ):
                    learner.teachers[CYCLE] = deepcopy(learner.pupil.student)
            save(learner, metrics, run)
    if ranks.first:
        print(concluded(position, settings))


def _say(ranks: Ranks, text: str) -> None:
    if ranks.first:
        print(text, file=sys.stderr)
