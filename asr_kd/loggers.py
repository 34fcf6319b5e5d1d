"""Where figures of a job go while it runs, beside its own files: TensorBoard, Weights & Biases, MLflow, or what another package offers.

A logger is an object with three methods, `Logger`; a package offers one as an entry point of the group `asr_kd.loggers`: its name, and what
makes it without arguments. A job never fails by a logger: one that raises is told once, and left out from then on.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, Protocol

from asr_kd.ending import Stopped
from asr_kd.errors import UserError

#: of entry points of other packages
GROUP = "asr_kd.loggers"


class Logger(Protocol):
    """Takes the figures of one job."""

    def start(self, config: dict[str, Any]) -> None:
        """A job begins.

        Args:
            config: its `verb`, its `output`, its `settings` as they stand in a file, and `step`: what was told of later steps was
                undone, because the job goes on from there; -1 where it begins.
        """

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Figures by name; several calls may have the same step."""

    def end(self, status: str) -> None:
        """The job has ended: `done`, `stopped` (it will go on) or `failed`."""


class TensorBoard:
    """Event files in the folder `tensorboard` of the output."""

    def start(self, config: dict[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder = os.path.join(config["output"], "tensorboard")
        self._writer = SummaryWriter(folder, purge_step=config["step"] + 1)
        text = json.dumps(config["settings"], indent=4, ensure_ascii=False)
        lines = "\n".join(f"    {line}" for line in text.splitlines())  # code, in Markdown
        self._writer.add_text("settings", lines, config["step"] + 1)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def end(self, status: str) -> None:
        self._writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases; its own environment variables say where and for whom."""

    def start(self, config: dict[str, Any]) -> None:
        import wandb

        name = config["output"].rstrip("/").rpartition("/")[2]
        project = os.environ.get("WANDB_PROJECT", "asr_kd")
        self._run = wandb.init(project=project, name=name, job_type=config["verb"], config=config)

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._run.log({"step": step, **values})  # its own steps may not go back, ours do in a job that went on

    def end(self, status: str) -> None:
        self._run.finish(exit_code=0 if status == "done" else 1)


class Mlflow:
    """A run of MLflow; its own environment variables say where."""

    def start(self, config: dict[str, Any]) -> None:
        import mlflow

        self._mlflow = mlflow
        mlflow.start_run(run_name=f"{config['verb']} {config['output']}")
        mlflow.log_dict(config, "config.json")

    def scalars(self, step: int, values: dict[str, float]) -> None:
        self._mlflow.log_metrics(values, step=step)

    def end(self, status: str) -> None:
        self._mlflow.end_run({"done": "FINISHED", "stopped": "KILLED"}.get(status, "FAILED"))


#: loggers of asr_kd by name, each with its package, which is an extra of the same name
OWN: dict[str, Callable[[], Logger]] = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases, "mlflow": Mlflow}


def is_installed(name: str) -> bool:
    """Whether the package of one of asr_kd's own loggers is there."""
    return importlib.util.find_spec(name) is not None


def made(name: str) -> Logger:
    """The logger of this name, before anything is told; a UserError when there is none, or its package is missing."""
    if name in OWN:
        if not is_installed(name):
            raise UserError(f"log: {name} is not installed; run `pip install 'asr-kd[{name}]'`, or leave it out")
        return OWN[name]()
    offered = {entry.name: entry for entry in importlib.metadata.entry_points(group=GROUP)}
    if name not in offered:
        raise UserError(f"log: {name} is no logger; there are {', '.join(sorted({*OWN, *offered}))}")
    try:
        logger: Logger = offered[name].load()()
    except Exception as error:  # of another package
        raise UserError(f"log: {name} ({offered[name].value}) cannot be made: {error!r}; leave it out") from None
    return logger


class Loggers:
    """The loggers of a job; as a context manager it tells them how the job ended.

    Args:
        names: as of the setting `log`.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._told = {name: made(name) for name in dict.fromkeys(names)}

    def start(self, verb: str, output: object, settings: dict[str, Any], step: int = -1) -> None:
        """Tell that the job begins, as `Logger.start`.

        Args:
            verb: of the job.
            output: its folder.
            settings: valid JSON.
            step: the last that was done before.
        """
        self._tell("start", {"verb": verb, "output": str(output), "settings": settings, "step": step})

    def scalars(self, step: int, values: dict[str, float]) -> None:
        """Tell figures, as `Logger.scalars`."""
        self._tell("scalars", step, values)

    def _tell(self, method: str, *what: Any) -> None:
        for name, logger in list(self._told.items()):
            try:
                getattr(logger, method)(*what)
            except Exception as error:  # of another package
                del self._told[name]
                print(f"log: {name} fails ({error!r}) and is left out from here on; the job goes on", file=sys.stderr)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        stopped = kind is not None and issubclass(kind, Stopped | KeyboardInterrupt)
        self._tell("end", "stopped" if stopped else "failed" if kind else "done")
