from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from asr_kd.cli import main
from asr_kd.errors import UserError
from asr_kd.labeling.hidden import make_quantiser
from asr_kd.labeling.job import label
from asr_kd.labeling.settings import LabelSettings
from asr_kd.models.acoustic import load_checkpoint
from asr_kd.shards import pool
from asr_kd.shards.tarset import read_index
from tests.cluster import local_cluster

ray = pytest.importorskip("ray", reason="ray is not installed; `pip install -r requirements-dev.lock` does it")
from asr_kd.labeling import ray_engine  # noqa: E402  # it asks for ray at once
from asr_kd.shards.ray_crew import RayCrew  # noqa: E402

Job = Callable[..., LabelSettings]


def published(folder: str | Path) -> dict[str, bytes]:
    """What must be the same after any interruption; no file of a killed worker may be left either."""
    return {
        path.name: path.read_bytes()
        for path in Path(folder).iterdir()
        if path.name not in ("timing.json", "summary.json")
    }


def saboteur(folder: str) -> Callable[[], None]:
    """What a worker runs before anything else: it dies as `plan.json` in `folder` says, and tells of finished shards that are done again."""

    def hook() -> None:
        import json
        import os
        import signal
        from pathlib import Path

        from asr_kd.labeling import ray_engine

        load, replace = ray_engine.load_shard, os.replace

        def perhaps_die(moment: str, name: str) -> None:
            plan = Path(folder) / "plan.json"
            plan = json.loads(plan.read_text()) if plan.exists() else {"deaths": 0, "moments": {}}
            for death in range(plan["deaths"] if plan["moments"].get(name) == moment else 0):
                try:
                    (Path(folder) / f"died-{death}-{name}").open("x").close()
                except FileExistsError:
                    continue
                os.kill(os.getpid(), signal.SIGKILL)

        def loading(settings: Any, teacher: Any, transcripts: Any, info: Any) -> Any:
            if (Path(settings.output) / info.name).exists():
                (Path(folder) / "redone").touch()
            perhaps_die("load", info.name)
            return load(settings, teacher, transcripts, info)

        def replacing(source: Any, target: Any) -> None:
            perhaps_die("before publishing", Path(target).name)
            replace(source, target)
            perhaps_die("after publishing", Path(target).name)

        ray_engine.load_shard, os.replace = loading, replacing

    return hook


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Ray with two CPUs and one GPU that is not there: its address, and the folder of its saboteur."""
    folder = tmp_path_factory.mktemp("saboteur")
    with local_cluster(saboteur(str(folder)), gpus=1) as address:
        yield address, folder


@pytest.fixture
def sabotage(cluster: tuple[str, Path]) -> Iterator[Callable[..., Path]]:
    """Let workers die over shards, at such moments, so many times each; gives the folder of `saboteur`."""
    _, folder = cluster

    def plan(moments: dict[str, str], deaths: int = 1) -> Path:
        (folder / "plan.json").write_text(json.dumps({"moments": moments, "deaths": deaths}))
        return folder

    yield plan
    for path in folder.iterdir():
        path.unlink()


@pytest.fixture(scope="module")
def expected(teacher: Path, audio: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """What the local engine publishes."""
    output = tmp_path_factory.mktemp("local") / "targets"
    label(
        LabelSettings(
            teacher=str(teacher), audio=str(audio), output=str(output), batch_frames=120, device="cpu", k=8, mass=0.99
        )
    )
    return published(output)


def test_same_bytes_as_the_local_engine(
    cluster: object, job: Job, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = job(engine="ray", worker_gpus=0.5, min_workers=2, output="targets")
    monkeypatch.chdir(Path(job().output).parent)  # workers stand in another folder
    label(settings)
    assert published("targets") == expected
    timing = json.loads(Path("targets/timing.json").read_text())
    assert timing["device"] == "cpu" and timing["shards"] == 3 and 0 < timing["workers"] <= 2
    monkeypatch.setattr(RayCrew, "start", lambda _: pytest.fail("a worker for nothing"))
    label(settings)
    assert published("targets") == expected


def test_workers_killed(job: Job, expected: dict[str, bytes], sabotage: Callable[..., Path]) -> None:
    folder = sabotage(
        {"shard-000000.tar": "load", "shard-000001.tar": "before publishing", "shard-000002.tar": "after publishing"}
    )
    settings = job(engine="ray")
    label(settings)
    assert len(list(folder.glob("died*"))) == 3
    assert published(settings.output) == expected
    assert not (folder / "redone").exists()


def test_a_shard_that_always_kills_its_worker_is_named(
    job: Job, sabotage: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool, "ATTEMPTS", 2)
    folder = sabotage({"shard-000001.tar": "load"}, deaths=99)
    settings = job(engine="ray", max_workers=1)
    with pytest.raises(UserError, match=r"shard-000001\.tar: 2 workers died over this shard"):
        label(settings)
    assert len(list(folder.glob("died*"))) == 2
    assert not list(Path(settings.output).glob(".*.tmp"))


DRIVER = """
import sys, ray

def slow():
    import time
    from asr_kd.models import acoustic
    infer = acoustic.log_posteriors_and_hidden
    def slowly(*arguments):
        time.sleep(0.2)
        return infer(*arguments)
    acoustic.log_posteriors_and_hidden = slowly

ray.init(address=sys.argv[1], runtime_env={"worker_process_setup_hook": slow})
from asr_kd.labeling.settings import LabelSettings
from asr_kd.labeling.job import label
label(LabelSettings.model_validate_json(sys.argv[2]))
"""


def test_the_driver_killed_and_started_again(cluster: tuple[str, Path], job: Job, expected: dict[str, bytes]) -> None:
    settings = job(engine="ray", worker_cpus=2)
    output = Path(settings.output)
    process = subprocess.Popen(
        [sys.executable, "-c", DRIVER, cluster[0], settings.model_dump_json()], stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 300
    while not list(output.glob("*.tar")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors.decode()
    inodes = {path: path.stat().st_ino for path in output.glob("*.tar")}
    assert 0 < len(inodes) < 3
    label(settings)  # with both CPUs, which the worker of the dead driver has to let go
    assert {path: path.stat().st_ino for path in inodes} == inodes
    assert published(output) == expected


TERMINATED = """
import os, signal, sys
from asr_kd import cli
from asr_kd.shards.ray_crew import RayCrew
real = RayCrew.give
def give(*arguments):
    call = real(*arguments)
    os.kill(os.getpid(), signal.SIGTERM)
    return call
RayCrew.give = give
sys.exit(cli.main(sys.argv[1:]))
"""


def test_sigterm_ends_the_driver_with_one_line(cluster: tuple[str, Path], job: Job) -> None:
    settings = job(engine="ray", ray_address=cluster[0])
    words = [f"{name}={value}" for name, value in settings.model_dump(exclude_unset=True).items()]
    command = [sys.executable, "-c", TERMINATED, "label", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.count("interrupted; the same command goes on")) == (143, 1), done.stderr
    assert "SIGTERM received" not in done.stderr
    assert not (Path(settings.output) / ".leases").exists()


def test_a_workers_error_is_one_sentence(
    cluster: object, job: Job, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    audio = tmp_path / "audio"
    shutil.copytree(job().audio, audio)
    for path in audio.glob("*.tar"):  # other bytes than the index tells of
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    settings = job(audio=str(audio))
    words = [f"teacher={settings.teacher}", f"audio={audio}", f"output={settings.output}", "device=cpu"]
    assert main(["label", "engine=ray", *words]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith(f"asr-kd label: {audio}/shard-00000") and errors.count("\n") == 1
    assert not list(Path(settings.output).glob("*.tar"))


def test_what_a_worker_refuses(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    worker = ray_engine.Labeler(job(engine="ray", worker_gpus=1, device="auto"), "", None)
    with pytest.raises(UserError, match="worker_gpus: PyTorch sees no GPU on"):
        worker.load()
    worker = ray_engine.Labeler(job(engine="ray"), "another", None)
    with pytest.raises(UserError, match=r"is teacher \w+ on .* and another for the driver; give all machines the same"):
        worker.load()


def test_a_worker_codes_with_the_quantiser_of_the_driver(job: Job, tmp_path: Path) -> None:
    codes = {"mode": "hidden", "taps": ["layer.1"], "keep": "codes", "codebooks": 2, "quantiser_frames": 300}
    label(job(output=str(tmp_path / "local"), **codes))
    settings = job(engine="ray", output=str(tmp_path / "ray"), **codes)
    (tmp_path / "ray").mkdir()
    teacher, infos = load_checkpoint(settings.teacher), read_index(settings.audio)
    make_quantiser(settings, teacher, infos)
    worker = ray_engine.Labeler(settings, teacher.fingerprint, None)
    worker.load()
    for info in infos:
        worker.do(info)
    local = published(tmp_path / "local")
    assert published(tmp_path / "ray") == {name: local[name] for name in [*infos.names, "quantiser.safetensors"]}


MISSING = """
import sys
sys.modules["ray"] = None
from asr_kd.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_missing_ray_is_named(job: Job) -> None:
    settings = job(engine="ray")
    words = [f"{name}={value}" for name, value in settings.model_dump(exclude_unset=True).items()]
    # in a process of its own: threads of a Ray that runs would miss the module too, and may crash
    done = subprocess.run([sys.executable, "-c", MISSING, "label", *words], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
    assert "ray is not installed; run `pip install 'asr-kd[ray]'`" in done.stderr
    assert not Path(settings.output).exists()


def test_an_address_where_nobody_answers_is_named(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(UserError, match=f"ray_address: nobody answers at {address}"):
            label(job(engine="ray", ray_address=address))
    with pytest.raises(UserError, match="ray_address: nobody answers at head"):
        label(job(engine="ray", ray_address="head"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_workers": 2}, "max_workers belongs to engine ray alone"),
        ({"worker_gpus": 1.0}, "worker_gpus belongs to engine ray alone"),
        ({"engine": "ray", "min_workers": 3, "max_workers": 2}, "max_workers 2 must not be below min_workers 3"),
        ({"engine": "ray", "device": "cuda"}, "device cuda needs worker_gpus above 0"),
    ],
)
def test_settings_that_do_not_fit_are_refused(job: Job, changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        job(**changes)
