"""Write the settings file of every stage, for what starts a stage in many processes: python pipelines/million_hours/settings.py [name=value …]"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from asr_kd.errors import UserError
from asr_kd.files import write_whole
from asr_kd.pipeline import load_pipeline

PIPELINE = Path(__file__).parent / "pipeline.yaml"


def main(assignments: list[str]) -> int:
    """Write `settings/STAGE.yaml` into the folder of the run, as `asr-kd run` does, and print the commands in order."""
    try:
        variables, stages = load_pipeline(PIPELINE, assignments)
        for stage in stages:
            file = Path(variables["run"]) / "settings" / f"{stage.name}.yaml"
            with write_whole(file, "w") as out:
                yaml.safe_dump(stage.settings, out, sort_keys=False, allow_unicode=True)
            print(f"asr-kd {stage.verb} {file}")
    except UserError as error:
        print(f"settings.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
