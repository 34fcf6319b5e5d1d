"""A pipeline: stages from one YAML file, in order, each skipped while its inputs and settings are unchanged."""

from __future__ import annotations

import concurrent.futures
import contextlib
import functools
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field

from asr_kd.config.base import Location, Settings, named_places
from asr_kd.config.load import build, load_yaml, override
from asr_kd.config.verbs import STAGES, VERBS
from asr_kd.ending import Status, Stopped
from asr_kd.errors import UserError
from asr_kd.files import (
    CLAIM,
    clear_errors,
    folder_state,
    hash_json,
    local,
    place,
    read_json,
    sha256_file,
    write_json,
    write_whole,
)
from asr_kd.models.origin import won_nothing
from asr_kd.recipes import located, named
from asr_kd.shards.leases import check_unused, sole_writer
from asr_kd.shards.manifests import open_manifest
from asr_kd.summary import tell_summary
from asr_kd.typed import Typed, read

#: keys of places that jobs write, or read only where somebody has written; every other place is an input
_WRITTEN = ("output", "report", "feature_cache", "run")
#: what names nothing on this disk: a URL, `hf:…`, `torchaudio:…`, and what a source of train calls networks of its own run
_ELSEWHERE = re.compile(r"[A-Za-z][\w+.-]*:|(average|cycle)$")


class ScriptSettings(Settings):
    """A recipe's own Python script; it is called with --output and these arguments."""

    file: Location = Field(description="the script")
    output: Location = Field(description="folder or file that it writes")
    arguments: list[str | int | float] = Field(default_factory=list, description="further arguments")


class StageSettings(Settings):
    """One stage of a pipeline."""

    verb: Literal[STAGES] = Field(description="what runs")  # type: ignore[valid-type]
    settings: dict[str, Any] = Field(
        default_factory=dict, description="the verb's settings; for a script: file, output and arguments"
    )


class PipelineSettings(Settings):
    """Stages in order; a later one may read what an earlier one wrote."""

    variables: dict[str, Any] = Field(
        default_factory=dict, description="names for ${name} in the stages; overridden by name=value"
    )
    shared: dict[str, Any] = Field(default_factory=dict, description="a place for YAML anchors")
    stages: dict[str, StageSettings] = Field(min_length=1, description="name: stage")


@dataclass
class Stage:
    """A stage ready to run: validated settings, the stages it reads from, what identifies its result, and the file of its record."""

    name: str
    verb: str
    settings: dict[str, Any]
    output: Path
    needs: list[str]
    fingerprint: str
    record: Path


def run_pipeline(path: str, assignments: list[str], dry_run: bool = False) -> None:
    """Run the stages whose inputs or settings changed since they last finished.

    A UserError when the file is wrong, an input is not there, or a stage failed; a dry run prints which inputs are not there.

    A stage is identified by its settings, the identities of the stages it reads from, and the content of its other inputs.
    Independent stages run in parallel, as many as the variable `jobs` says. `path` is the pipeline's YAML file, a folder
    that holds it as pipeline.yaml, or else the name of a recipe that comes with the package; `assignments` are `name=value`
    for its variables.
    """
    file = _file(path)
    variables, stages = load_pipeline(file, assignments)
    run = Path(variables["run"])
    due = [stage for stage in stages if not _is_current(stage)]
    for stage in stages:
        print(f"{stage.name:<28} {'to do' if stage in due else 'unchanged'}   asr-kd {stage.verb} → {stage.output}")
    absent = [words for stage, words, _ in missing_inputs(variables, stages) if stage in due]
    if dry_run:
        print(*absent, sep="\n", end="\n" * bool(absent))
        return
    if absent:
        more = f"; {len(absent) - 1} more are not there, see --dry-run" if absent[1:] else ""
        raise UserError(f"{absent[0]}{more}")
    if due:
        began = time.monotonic()
        with clear_errors(run / "stages"):
            run.mkdir(parents=True, exist_ok=True)
        with sole_writer(run) as check:
            due = [stage for stage in due if not _is_current(stage)]  # another may have run just before
            _run_stages(run, stages, due, variables["jobs"], check)
        print(f"{len(due)} stages in {time.monotonic() - began:,.0f} s")
    tell_summary(
        run, {"stages": {one.name: _recorded(one).get("seconds") for one in stages}, "ran": [one.name for one in due]}
    )
    for line in _outcome(stages):
        print(line)


def _file(path: str) -> Path:
    """The pipeline's file that `run` was given: what lies here, else the recipe of that name."""
    given = local(path, "command line")
    if given.exists():
        return given / "pipeline.yaml" if given.is_dir() else given
    file = named(str(given))
    print(f"recipe {given}: {file}")
    return file


def _outcome(stages: list[Stage]) -> list[str]:
    """The result of a finished pipeline: training runs that improved nothing, then the verdicts of the reports."""
    lost, verdicts = [], []
    for stage in stages:
        output = place(stage.settings["output"])
        if stage.verb == "train" and (output / "best" / "checkpoint.json").exists():
            training = read_json(output / "best" / "checkpoint.json", "checkpoint").get("training")
            if words := won_nothing(training):
                lost.append(f"{stage.name} won nothing: {words}")
        elif stage.verb == "eval" and (output / "report.json").exists():
            verdicts.append(f"{stage.name}: {read_json(output / 'report.json', 'report')['verdict']}")
    return lost + verdicts


def load_pipeline(file: Path, assignments: list[str]) -> tuple[dict[str, Any], list[Stage]]:
    """Read a pipeline: its variables, and its stages; everything is validated before anything runs."""
    values = load_yaml(file, as_typed=True)
    pipeline = build(PipelineSettings, values, str(file))
    variables = pipeline.variables
    for assignment in assignments:
        name = assignment.partition("=")[0]
        if name not in variables:
            raise UserError(f"{assignment}: {file} has no variable {name}; it has {', '.join(variables) or 'none'}")
    variables = override(variables, assignments)
    if not isinstance(variables.get("run"), str) or not variables["run"].strip():
        raise UserError(
            f"{file}: variables.run is missing; set it to the folder of the run, e.g. runs/{file.parent.name}"
        )
    run = variables["run"] = str(local(str(variables["run"]), "run"))
    for name, value in variables.items():  # any other may name what lies in the run
        if isinstance(value, str) and "${run}" in value:
            variables[name] = value.replace("${run}", run)
    jobs = variables.get("jobs", 1)
    jobs = variables["jobs"] = read(jobs) if isinstance(jobs, Typed) else jobs
    if type(jobs) is not int or jobs < 1:
        raise UserError(f"{file}: variables.jobs: {jobs!r} is not a number of stages to run at once; set 1 or more")
    lies = functools.partial(located, recipe=file)
    stages: list[Stage] = []
    for name, plan in pipeline.stages.items():
        where = f"{file}: stages.{name}"
        given = _mapped(plan.settings, functools.partial(_substitute, variables=variables, where=where))
        built = build(VERBS[plan.verb].kind(), given, where)
        values = built.model_dump()
        if not values.get("output"):
            raise UserError(f"{where}: the key output is missing; set it, so that later stages can read it")
        output = Path(values["output"])
        texts: list[str] = []
        _mapped({**values, "output": None}, texts.append)
        strings = sorted(set(texts))
        needs = [stage for stage in stages if any(_within(Path(text), stage.output) for text in strings)]
        outside = [text for text in strings if not any(_within(Path(text), stage.output) for stage in stages)]
        inputs = {text: mark for text in outside if (mark := _content(Path(lies(text))))}
        listed = values.get("manifest")  # of `prepare`, which takes folders too
        if listed in outside and listed not in inputs and Path(listed).is_dir():
            inputs[listed] = folder_state(Path(listed))
        if plan.verb == "prepare" and isinstance(listed, str) and listed in inputs and Path(listed).is_file():
            beside = (str(file) for file in open_manifest(listed).files())  # such as the recordings of supervisions
            inputs |= {file: mark for file in beside if file != listed and (mark := _content(Path(file)))}
        tars = values.get("audio") if plan.verb == "index" else None
        if isinstance(tars, str) and tars in outside and tars not in inputs and Path(tars).is_dir():
            inputs[tars] = folder_state(Path(tars), below=False)  # the index may lie below
        # the output does not depend on where the recipe lies, the pipeline's folder, the number of threads and who works
        deciding = {name: value for name, value in values.items() if name not in built.sharing}
        settings = _mapped(
            deciding, lambda text: text.replace(variables["run"], "${run}"), ("threads", "feature_cache")
        )
        identity = [plan.verb, settings, [stage.fingerprint for stage in needs], inputs]
        upstream = sorted(stage.name for stage in needs)
        record = Path(variables["run"]) / "stages" / f"{name}.json"
        stages.append(Stage(name, plan.verb, _mapped(values, lies), output, upstream, hash_json(identity), record))
    return variables, stages


def missing_inputs(variables: dict[str, Any], stages: list[Stage]) -> Iterator[tuple[Stage, str, str | None]]:
    """Inputs on this disk that no stage makes and that are not there: the stage, a sentence, and the variable that names it.

    What a script is called with is not looked at: only the script knows what that is.
    """
    for stage in stages:
        for key, text in named_places(build(VERBS[stage.verb].kind(), stage.settings, f"stage {stage.name}")):
            made = any(_within(Path(text), one.output) for one in stages)
            if made or key.rpartition(".")[2] in _WRITTEN or _ELSEWHERE.match(text) or os.path.lexists(text):
                continue
            variable = next((name for name, value in variables.items() if str(value) == text), None)
            remedy = f"give {variable}=FILE" if variable else "correct it in the pipeline, or put it there"
            yield stage, f"stage {stage.name}: {key}: {text} is not there; {remedy}", variable


def wanted_variables(file: Path) -> list[str]:
    """Variables of a pipeline that name inputs which are not there as it stands; each once, in the pipeline's order."""
    variables, stages = load_pipeline(file, [])
    named = {variable for _, _, variable in missing_inputs(variables, stages)}
    return [name for name in variables if name in named]


def _mapped(value: Any, change: Callable[[str], Any], without: Sequence[str] = ()) -> Any:
    """A JSON value, its texts changed, without some keys."""
    if isinstance(value, dict):
        return {key: _mapped(item, change, without) for key, item in value.items() if key not in without}
    if isinstance(value, list):
        return [_mapped(item, change, without) for item in value]
    return change(value) if isinstance(value, str) else value


def _substitute(text: str, variables: dict[str, Any], where: str) -> Any:
    names = re.findall(r"\$\{(\w+)\}", text)
    if unknown := [name for name in names if name not in variables]:
        raise UserError(f"{where}: ${{{unknown[0]}}} is not a variable of the pipeline; it has {', '.join(variables)}")
    if names and text == f"${{{names[0]}}}":
        return variables[names[0]]
    return re.sub(r"\$\{(\w+)\}", lambda match: str(variables[match[1]]), text) if names else text


def _within(path: Path, folder: Path) -> bool:
    return path == folder or folder in path.parents


def _content(path: Path) -> str | None:
    """A hash of a file, or of the index of a set of shards; None for anything else."""
    with contextlib.suppress(OSError):
        return next((sha256_file(file) for file in (path, path / "index.json") if file.is_file()), None)
    return None


def _recorded(stage: Stage) -> dict[str, Any]:
    """The record: its fingerprint when it last started; if it has finished, also its `seconds` and its `claim`."""
    value = read_json(stage.record, "stage record") if stage.record.exists() else {}
    return value if isinstance(value, dict) else {}


def _claim(stage: Stage) -> str | None:
    """A hash of job.json in the stage's output; None if it has none."""
    claim = stage.output / CLAIM
    return sha256_file(claim) if claim.is_file() else None


def _is_current(stage: Stage) -> bool:
    """Whether the stage has finished, and its output is still the one it wrote."""
    known, claim = _recorded(stage), _claim(stage)
    if "seconds" not in known or known.get("fingerprint") != stage.fingerprint or not stage.output.exists():
        return False
    return (claim or not VERBS[stage.verb].claims) and known.get("claim", claim) == claim  # older records hold none


def _run_stages(run: Path, stages: list[Stage], due: list[Stage], jobs: int, check: Callable[[], None]) -> None:
    done = {stage.name for stage in stages if stage not in due}
    waiting = list(due)
    running: dict[concurrent.futures.Future[None], Stage] = {}
    stop = threading.Event()
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        try:
            while waiting or running:
                for stage in [stage for stage in waiting if set(stage.needs) <= done][: jobs - len(running)]:
                    check()
                    waiting.remove(stage)
                    running[pool.submit(_run_stage, run, stage, stop)] = stage
                finished, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in finished:
                    stage = running.pop(future)
                    future.result()
                    done.add(stage.name)
                    over = len(stages) - len(waiting) - len(running)
                    print(f"done: {stage.name} ({over} of {len(stages)} stages)", flush=True)
        except BaseException:
            stop.set()  # the other stages are stopped too; they resume when the pipeline runs again
            raise


def _run_stage(run: Path, stage: Stage, stop: threading.Event) -> None:
    # Output of other settings or inputs is stale and removed; that of an interrupted stage is kept, and it resumes. Outside
    # the run's folder nothing is removed: there the job itself refuses output of others.
    if run in stage.output.parents and stage.output.exists():
        if not stage.record.exists():
            raise UserError(f"stage {stage.name}: {stage.output} is there, and this run did not write it; remove it")
        if _recorded(stage).get("fingerprint") != stage.fingerprint:
            _remove(stage)
    write_json(stage.record, {"fingerprint": stage.fingerprint})
    began = time.monotonic()
    _call(run, stage, stop)
    finished = {"fingerprint": stage.fingerprint, "seconds": round(time.monotonic() - began, 1), "claim": _claim(stage)}
    write_json(stage.record, finished)


def _remove(stage: Stage) -> None:
    """Remove a stage's output of other settings or inputs, unless a job is working there."""
    if not stage.output.is_dir():
        stage.output.unlink()
        return
    try:
        check_unused(stage.output)
        with sole_writer(stage.output):
            write_json(stage.record, {"fingerprint": None})  # half removed is stale too
            shutil.rmtree(stage.output, ignore_errors=True)
    except UserError as error:
        raise UserError(f"stage {stage.name}: {error}") from None


def _call(run: Path, stage: Stage, stop: threading.Event) -> None:
    """Run a stage as a process; its output is shown line by line after the stage's name, and logged."""
    if stage.verb == "script":
        command = [stage.settings["file"], "--output", str(stage.output), *map(str, stage.settings["arguments"])]
    else:
        file = run / "settings" / f"{stage.name}.yaml"
        with write_whole(file, "w") as out:
            yaml.safe_dump(stage.settings, out, sort_keys=False, allow_unicode=True)
        command = ["-m", "asr_kd.cli", stage.verb, str(file)]
    log = run / "logs" / f"{stage.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    # many small matrix products: one thread a process is faster than two, and stages run in parallel
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    last = ""
    started = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )
    with started as process, open(log, "a", encoding="utf-8") as copy:
        threading.Thread(target=_stop_when_asked, args=(process, stop), daemon=True).start()
        assert process.stdout is not None
        for line in process.stdout:
            last = line.strip() or last
            copy.write(line)
            copy.flush()
            print(f"[{stage.name}] {line.rstrip()}", flush=True)
    if process.returncode in (Status.INTERRUPTED, Status.TERMINATED):
        raise Stopped(f"stage {stage.name} was stopped; the same command goes on from there", process.returncode)
    if process.returncode != 0:
        raise UserError(
            f"stage {stage.name} failed ({last}); see {log}, then run the pipeline again: it goes on from there"
        )


def _stop_when_asked(process: subprocess.Popen[str], stop: threading.Event) -> None:
    while process.poll() is None:
        if stop.wait(0.5):
            process.terminate()
            return
