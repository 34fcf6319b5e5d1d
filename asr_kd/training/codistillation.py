"""Codistillation: separate runs teach each other by checkpoints that they share (Anil et al. 2018, arXiv 1804.03235).

With `share: {every: E}` a run leaves its weights in `shared/step-N/` at each multiple N of E. A source with
`teacher: {run: FOLDER, every: E}` learns, from step k·E on, from what the other run was at its step (k-1)·E, and waits for that if it has to: which
weights teach in a step depends on the step alone, whichever run is the faster one, is started first, or dies and goes on. Before
2·E nobody answers, and nothing is learned by what needs an answer. A run that has ended teaches by the last that it shared.

What was shared stays: another run may go back to a save of long ago, and ask for it again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import torch

from asr_kd.distillation.answers import check_same_input
from asr_kd.distillation.settings import SHARED, RunSettings
from asr_kd.errors import UserError
from asr_kd.files import Place, place, read_json, write_json
from asr_kd.models.acoustic import load_checkpoint, save_checkpoint
from asr_kd.training.distributed.ranks import total
from asr_kd.training.settings import PhaseSettings
from asr_kd.training.step import Learner
from asr_kd.units import Units

#: in the shared folder of a run that has ended: the step that it shared last
LAST = "last.json"
#: seconds between two looks for a checkpoint
LOOK_SECONDS = 0.2


def share(learner: Learner, units: Units, run: Path) -> None:
    """Leave a checkpoint for other runs, if it is time: the average's weights where there is one, without a calibrated blank.

    What is there already stays: a run that goes on from a save makes the same again, and others may be reading.

    Args:
        learner: after a step, and after its average has followed.
        units: of its output.
        run: its folder.
    """
    settings, step = learner.settings, learner.position.step
    if not settings.share or step % settings.share.every or not learner.ranks.first:
        return
    folder = _shared(run / SHARED, step)
    if not (folder / "checkpoint.json").exists():
        learner.check()
        pupil: Any = learner.average.module if learner.average else learner.pupil
        save_checkpoint(folder, pupil.student, units, settings.features, settings.model, {"step": step})


def share_no_more(learner: Learner, run: Path) -> None:
    """Tell other runs, before the last state is saved, that this one has ended."""
    every, step = learner.settings.share and learner.settings.share.every, learner.position.step
    if every and learner.ranks.first:
        write_json(run / SHARED / LAST, {"step": step - step % every})


def hear(
    learner: Learner, plan: PhaseSettings, units: Units, stop_asked: Callable[[], int], ended: bool = False
) -> bool:
    """Before a step of all processes: load what the runs that teach in this phase have shared, if it is time; waits for it.

    Args:
        learner: before a step; takes the networks and what they are.
        plan: of the phase.
        units: of the learner.
        stop_asked: the signal that asked this process to stop; 0 if none did.
        ended: whether this process has no more batches in this phase; where none has, nothing is waited for.

    Returns:
        False if the wait has ended, for all processes, because one was asked to stop.

    Raises:
        UserError: when it does not come in time, has other units or features, or is not what the run has learned from before.
    """
    step, position = learner.position.step, learner.position
    for one in {one.name: one for source in plan.sources for one in source.runs}.values():
        wanted = (step // one.every - 1) * one.every
        held = position.heard.get(one.name)
        if wanted <= 0 or (held and held[0] == wanted and one.name in learner.teachers):
            continue
        folder, going = _awaited(one, wanted, learner, stop_asked, ended)
        if folder is None:
            return going
        # a network is made with random weights first: how often one is loaded must not move the run's own draws
        with torch.random.fork_rng(devices=[]):
            checkpoint = load_checkpoint(folder, learner.ranks.device)
        check_same_input(f"teacher: {folder}", checkpoint, units, learner.settings.features)
        if held and held[0] == wanted and held[1] != checkpoint.fingerprint:
            raise UserError(
                f"{folder}: is not what this run has learned from before; the other run was trained anew, so train this one anew too"
            )
        position.heard[one.name] = [wanted, checkpoint.fingerprint]
        learner.teachers[one.name] = checkpoint.model
    return True


def _awaited(
    one: RunSettings, step: int, learner: Learner, stop_asked: Callable[[], int], ended: bool
) -> tuple[Place | None, bool]:
    """The folder of what a run shared at a step, or last if it ended before; None if none is needed, and False if a process was asked to stop.

    All processes wait together.
    """
    began, said = monotonic(), not learner.ranks.first
    while True:
        if (last := place(one.name) / LAST).exists():
            step = min(step, _ended_at(last))
            if not step:
                raise UserError(
                    f"teacher: {one.run} has ended before it shared anything; train it longer, or lower its share.every"
                )
        folder = _shared(place(one.name), step)
        own = [not (folder / "checkpoint.json").exists(), bool(stop_asked()), monotonic() - began > one.wait, not ended]
        missing, asked, late, needed = total(torch.tensor(own, dtype=torch.float32), learner.ranks).tolist()
        if not missing:
            return folder, True
        if asked or not needed:
            return None, not asked
        if late:
            raise UserError(
                f"teacher: {folder} has not come in {one.wait:g} s; start that run, with share.every={one.every}, or "
                "wait for it longer (teacher.wait)"
            )
        if not said:
            print(f"{learner.settings.output}: waiting for {folder}", file=sys.stderr)
            said = True
        learner.check()
        sleep(min(LOOK_SECONDS, one.wait))


def _ended_at(last: Place) -> int:
    try:
        return int(read_json(last)["step"])
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{last}: does not say when that run ended; copy it again, or train that run again") from None


def _shared(folder: Place, step: int) -> Place:
    return folder / f"step-{step}"
