from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_kd.errors import UserError
from asr_kd.shards.prepare import _Preparation, prepare
from asr_kd.shards.ranges import Plan
from asr_kd.shards.settings import PrepareSettings
from tests.cluster import local_cluster

pytest.importorskip("ray", reason="ray is not installed; `pip install -r requirements-dev.lock` does it")


def saboteur(folder: str) -> Callable[[], None]:
    """What a worker runs before anything else: the first to publish the second shard dies just before."""

    def hook() -> None:
        import os
        import signal
        from pathlib import Path

        replace = os.replace

        def replacing(source: str, target: str) -> None:
            if Path(target).name == "shard-000001.tar":
                try:
                    (Path(folder) / "died").open("x").close()
                except FileExistsError:
                    pass
                else:
                    os.kill(os.getpid(), signal.SIGKILL)
            replace(source, target)

        os.replace = replacing

    return hook


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Ray with two CPUs; a file that is there when a worker has died."""
    folder = tmp_path_factory.mktemp("saboteur")
    with local_cluster(saboteur(str(folder))):
        yield folder / "died"


@pytest.fixture
def manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Eight utterances, the fourth of them bad, and what names them from here."""
    for number in range(8):
        soundfile.write(tmp_path / f"u{number}.wav", np.random.default_rng(number).normal(0, 0.1, 900 + number), 8000)
    (tmp_path / "u3.wav").write_bytes(b"RIFF")
    (tmp_path / "list.jsonl").write_text("".join(json.dumps({"audio": f"u{number}.wav"}) + "\n" for number in range(8)))
    monkeypatch.chdir(tmp_path)
    return "list.jsonl"


def tree(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name not in ("timing.json", "summary.json"))
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def test_a_cluster_writes_the_bytes_of_one_process_though_a_worker_dies(
    died: Path, manifest: str, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = {"manifest": manifest, "samples_per_shard": 2, "max_bad_share": 0.2}
    prepare(PrepareSettings.model_validate({**wanted, "output": "alone"}))
    # paths count from where the driver stands, and the reasons in quarantine.jsonl name them as it does
    prepare(PrepareSettings.model_validate({**wanted, "output": "shards", "engine": "ray", "min_workers": 2}))
    assert died.exists() and "a worker was lost; its shards are given out again" in capsys.readouterr().err
    assert tree(Path("shards")) == tree(Path("alone"))
    assert json.loads(Path("shards/timing.json").read_text())["shards"] == 4


def test_a_folder_that_a_worker_has_not_is_named(tmp_path: Path) -> None:
    settings = PrepareSettings(manifest="list.jsonl", output="shards", engine="ray")
    worker = _Preparation(settings, Plan(tmp_path, tmp_path, 0, 1, 1), folder=str(tmp_path / "none"))
    with pytest.raises(
        UserError, match=r"none: cannot be entered on .*; run the command in a folder that all machines"
    ):
        worker.load()


MISSING = """
import sys
sys.modules["ray"] = None
from asr_kd.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_missing_ray_is_named(manifest: str) -> None:
    words = ["prepare", f"manifest={manifest}", "output=shards", "engine=ray"]
    done = subprocess.run([sys.executable, "-c", MISSING, *words], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "ray is not installed; run `pip install 'asr-kd[ray]'`" in done.stderr
    assert not Path("shards").exists()
