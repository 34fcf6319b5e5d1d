"""The stages of a pipeline one by one in the test's own process, which has imported torch already."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from asr_kd import pipeline
from asr_kd.config.verbs import VERBS
from tests import readmes


def here(patch: pytest.MonkeyPatch) -> None:
    """Have `asr-kd run` start no processes."""
    patch.setattr(pipeline, "_run_stages", _run_stages)
    patch.setattr(pipeline, "_call", _call)


def _run_stages(run: Path, stages: list[pipeline.Stage], due: list[pipeline.Stage], *_: object) -> None:
    for stage in due:
        pipeline._run_stage(run, stage, None)  # type: ignore[arg-type]


def _call(run: Path, stage: pipeline.Stage, _: object) -> None:
    if stage.verb == "script":
        words = [stage.settings["file"], "--output", str(stage.output), *map(str, stage.settings["arguments"])]
        assert readmes.run(f"python {' '.join(words)}")[0] == 0
        return
    file = run / "settings" / f"{stage.name}.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(yaml.safe_dump(stage.settings, sort_keys=False))
    VERBS[stage.verb].do(VERBS[stage.verb].kind().model_validate(stage.settings))
