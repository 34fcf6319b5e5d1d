"""The arms of a comparison, from arms.yaml, and the pipeline that trains them on a task with some seeds."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asr_kd.config.load import build, load_yaml
from asr_kd.errors import UserError
from asr_kd.training.settings import TrainSettings

HERE = Path(__file__).parent
#: task → its file, and variables in place of those there
TASKS: dict[str, tuple[str, dict[str, Any]]] = {
    "strong": ("strong.yaml", {}),
    "weak": ("weak.yaml", {}),
    "grammar": ("weak.yaml", {"strings": "grammar"}),
    "real": ("real.yaml", {}),
}
#: what the arms that start from random weights change besides
FRESH: dict[str, Any] = {"init": None}


@dataclass(frozen=True)
class Arm:
    """A student to train: an entry of arms.yaml with one start; see there.

    Attributes:
        name: in the table; `-fresh` behind that of the entry where it starts from random weights.
        key, values: the setting of its source that is chosen, and what is tried; none: ("", [None]).
        passes: in place of the task's; None: those.
    """

    name: str
    source: dict[str, Any] = field(default_factory=dict)
    labelled: dict[str, Any] = field(default_factory=dict)
    further: Sequence[dict[str, Any]] = ()
    train: dict[str, Any] = field(default_factory=dict)
    key: str = ""
    values: Sequence[Any] = (None,)
    fresh: bool = False
    baseline: str | None = None
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    tasks: Sequence[str] = tuple(TASKS)
    passes: int | str | None = None

    def stage(self, value: Any) -> str:
        """Name of its stage, and of the run's folder, with a value of its setting."""
        return f"student-{self.name}" + (f"-{value:g}" if self.key else "")


def read_arms(file: Path = HERE / "arms.yaml") -> dict[str, Arm]:
    """All arms by name, each start one.

    Raises:
        UserError: when an entry has a key that arms do not have, or a baseline that is not there with its start.
    """
    arms: dict[str, Arm] = {}
    known = {"source", "labelled", "further", "train", "grid", "starts", "baseline", "stages", "tasks", "passes"}
    for name, entry in load_yaml(file).items():
        if wrong := set(entry) - known:
            raise UserError(f"{file}: {name}: {min(wrong)} is no key of an arm; they are {', '.join(sorted(known))}")
        grid = entry.get("grid", {"": [None]})
        if len(grid) != 1:
            raise UserError(f"{file}: {name}: grid has {len(grid)} settings; give one, and values of it")
        ((key, values),) = grid.items()
        for start in entry.get("starts", ["supervised"]):
            fresh = start == "fresh"
            base = entry.get("baseline", "soft" if name != "soft" else None)
            arm = Arm(
                name + "-fresh" * fresh, key=key, values=values, fresh=fresh, baseline=base and base + "-fresh" * fresh,
                **{part: entry[part] for part in ("source", "labelled", "further", "train", "stages", "tasks", "passes") if part in entry},
            )  # fmt: skip
            arms[arm.name] = arm
    for arm in arms.values():
        if arm.baseline and arm.baseline not in arms:
            raise UserError(f"{file}: {arm.name}: there is no arm {arm.baseline} to compare it with; add that start")
    return arms


def with_baselines(arms: Mapping[str, Arm], names: Sequence[str]) -> list[Arm]:
    """The named arms, soft where there is one, and those that they are compared with, in the order of arms.yaml."""
    wanted = {*names} | ({"soft"} & arms.keys())
    while more := {base for name in wanted if (base := arms[name].baseline)} - wanted:
        wanted |= more
    return [arm for name, arm in arms.items() if name in wanted]


def task_of(task: str, seed: int, variables: Mapping[str, Any], root: str = "${run}") -> dict[str, Any]:
    """The stages of a task's file with one seed: every variable but the pipeline's `run` is filled in.

    Args:
        variables: in place of the file's.
        root: folder of all tasks.
    """
    file, changed = TASKS[task]
    pipeline = load_yaml(HERE / file)
    values = {**pipeline["variables"], **changed, **variables}
    values |= {
        "data": f"{root}/{task}/data",
        "run": f"{root}/{task}/seed{seed}",
        "seed": seed,
        "second_seed": seed + 100,
        "third_seed": seed + 200,
        "passes_of_three_quarters": round(values["passes"] * 4 / 3),
    }
    return {"values": values, "stages": pipeline["stages"]}


def filled(value: Any, values: Mapping[str, Any]) -> Any:
    """A YAML value with its `${name}` replaced; one that is nothing else keeps its type."""
    if isinstance(value, Mapping):
        return {key: filled(item, values) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, values) for item in value]
    if not isinstance(value, str):
        return value
    if (whole := re.fullmatch(r"\$\{(\w+)\}", value)) and whole[1] in values:
        return values[whole[1]]
    return re.sub(r"\$\{(\w+)\}", lambda found: str(values[found[1]]), value)


def student_of(stages: Mapping[str, Any], arm: Arm, value: Any) -> dict[str, Any]:
    """Settings of `train` for an arm with a value of its setting, from a task's stages."""
    settings = copy.deepcopy(stages["student"]["settings"])
    settings["output"] = "${run}/" + arm.stage(value)
    if arm.fresh:
        settings |= FRESH
    for key, change in copy.deepcopy(arm.train).items():
        settings[key] = {**settings[key], **change} if isinstance(change, dict) else change
    phase = settings["phases"][0]
    for source, changes in zip(phase["sources"], (arm.source, arm.labelled), strict=True):
        source |= copy.deepcopy(changes)
    phase["sources"] += copy.deepcopy(list(arm.further))
    if arm.passes:
        phase["passes"] = arm.passes
    if value is not None:
        here = phase["sources"][0]
        *path, last = arm.key.split(".")
        for step in path:
            here = here[int(step) if isinstance(here, list) else step]
        here[last] = value
    return settings


def refusal(task: str, arm: Arm, variables: Mapping[str, Any]) -> str | None:
    """Why the settings refuse an arm; None if they take it."""
    described = task_of(task, 0, variables)
    try:
        for value in arm.values:
            settings = filled(student_of(described["stages"], arm, value), described["values"])
            build(TrainSettings, settings, arm.name)
    except UserError as error:
        return str(error)
    return None


def with_own_start(stages: Mapping[str, Any], lead: str, start: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The stages of a student that is another network than the task's: its start, on the labelled audio alone, and itself.

    From random weights a network that streams comes late: half more errors after the passes that students have (pipelines/cut).

    Args:
        lead: what the names of a seed's stages begin with.
        start: name of the start; students of the same network and learning rate may share it.
        settings: of the student, with its `output`, beside which the start is kept.
    """
    first = copy.deepcopy(stages[f"{lead}student-supervised"]["settings"])
    first |= {"model": settings["model"], "output": f"{settings['output'].rpartition('/')[0]}/{start}"}
    first["phases"][0]["learning_rate"] = settings["phases"][0]["learning_rate"]
    student = settings["output"].rpartition("/")[2]
    return {
        lead + start: {"verb": "train", "settings": first},
        lead + student: {"verb": "train", "settings": {**settings, "init": first["output"]}},
    }


def stages_of(
    task: str, seed: int, chosen: Sequence[tuple[Arm, Any]], variables: Mapping[str, Any], report: Sequence[str] = ()
) -> dict[str, Any]:
    """The stages of a task with one seed, their names led by the task and the seed.

    Args:
        chosen: arms, each with a value of its setting.
        variables: in place of those of the task's file.
        report: names of stages that a report on the test set compares; none: no report.
    """
    described = task_of(task, seed, variables)
    base, values = described["stages"], described["values"]
    stages = {name: stage for name, stage in base.items() if name != "student"}
    for arm, value in chosen:
        for name, more in arm.stages.items():
            verb = base[more["like"]]["verb"] if "like" in more else more["verb"]
            settings = {**(base[more["like"]]["settings"] if "like" in more else {}), **more["settings"]}
            stages[name] = {
                "verb": verb,
                "settings": {**settings, "output": more["settings"].get("output", "${run}/" + name)},
            }
        stages[arm.stage(value)] = {"verb": "train", "settings": student_of(base, arm, value)}
    if report:
        systems = {name: "${run}/" + name for name in ["teacher", "student-supervised", *report]}
        stages["report"] = {
            "verb": "eval",
            "settings": {
                "systems": systems, "audio": "${data}/test", "output": "${run}/report", "baseline": "student-supervised",
                "teacher": "teacher", "bootstrap": 0,
            },
        }  # fmt: skip
    shared = "${data}"
    return {
        f"{task}-{name}" if str(stage["settings"]["output"]).startswith(shared) else f"{task}-{seed}-{name}": filled(
            stage, values
        )
        for name, stage in stages.items()
    }
