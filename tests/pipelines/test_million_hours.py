"""The recipe at the paper's scale: its files fit each other and the code, and the same files run in small on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from asr_kd import cli
from asr_kd.pipeline import load_pipeline
from asr_kd.shards.tarset import read_index, read_shard

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "pipelines" / "million_hours"
SHELL = ["slurm/label.sbatch", "slurm/train.sbatch", "ray/label.sh"]
SMALL = [
    "run=run", "store=store", "models=models", "sample_rate=8000", "units=char", "units_size=20", "layers=1", "size=8",
    "workers=2", "sequence_workers=2", "batch_frames=300", "supervised_passes=1", "hours=0.002", "labelled_hours=0.001",
    "cycles=2", "whole_cycles=1", "loader_workers=0",
]  # fmt: skip
#: what a cluster has and this machine has not
TOOLS = {
    "asr-kd": f'exec {sys.executable} -m asr_kd.cli "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "srun": 'exec "$@"',
    "scontrol": "echo localhost; echo never-asked",
}


def settings_writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("million_hours_settings", RECIPE / "settings.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kubernetes(name: str) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """A job, its pods and their container."""
    job = yaml.safe_load((RECIPE / "kubernetes" / name).read_text())
    spec = job["spec"]
    pod = (spec.get("template") or spec["pytorchReplicaSpecs"]["Worker"]["template"])["spec"]
    (container,) = pod["containers"]
    return job, pod, container


def test_the_pipeline_is_valid_and_of_the_papers_size() -> None:
    variables, stages = load_pipeline(RECIPE / "pipeline.yaml", [])
    by_name = {stage.name: stage for stage in stages}
    chunks, student = by_name["student-chunks"].settings, by_name["student"].settings
    assert (chunks["model"]["layers"], chunks["model"]["size"]) == (5, 768) and chunks["lanes"] == 64
    assert chunks["distributed"]["method"] == "bmuf" and student["distributed"]["compression"] == "threshold"
    assert student["phases"][0]["sources"][0]["mwer"] and student["lanes"] == 16
    assert chunks["phases"][0]["hours"] * chunks["cycles"] == 1_000_000
    assert by_name["student"].needs == ["development", "labelled", "student-whole", "units"]
    assert cli.main(["run", str(RECIPE), "--dry-run"]) == 0
    assert not Path(variables["run"]).exists()


def test_the_launch_files_name_what_there_is() -> None:
    variables, stages = load_pipeline(RECIPE / "pipeline.yaml", [])
    files = {f"{variables['run']}/settings/{stage.name}.yaml": stage for stage in stages}
    for file in SHELL:
        subprocess.run(["bash", "-n", RECIPE / file], check=True)
        text = (RECIPE / file).read_text()
        named = next(word for word in text.split() if word.startswith(variables["run"]))
        assert f" {files[named].verb} " in text and os.access(RECIPE / file, os.X_OK)
    job, pod, container = kubernetes("label.yaml")
    assert job["kind"] == "Job" and job["spec"]["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
    verb, file = container["args"]
    assert files[file].verb == verb == "label"
    job, pod, container = kubernetes("train.yaml")
    assert job["kind"] == "PyTorchJob" and container["name"] == "pytorch"
    *_, verb, file = container["command"]
    assert files[file].verb == verb == "train"
    replicas = job["spec"]["pytorchReplicaSpecs"]["Worker"]["replicas"]
    assert files[file].settings["lanes"] % (replicas * 8) == 0 and "--nproc-per-node=8" in container["command"]
    for name in ("label.yaml", "train.yaml"):
        _, pod, container = kubernetes(name)
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the four manifests, in which commands of a cluster are there."""
    source = ROOT / "data_manifests" / "digits"
    samples = list(read_shard(source / read_index(source)[0].name))[:32]
    for number, name in enumerate(("labelled", "unlabelled", "development", "test")):
        with open(tmp_path / f"{name}.jsonl", "w") as manifest:
            for sample in samples[number::4]:
                (tmp_path / f"{sample.key}.{sample.extension}").write_bytes(sample.audio)
                line = {"key": sample.key, "audio": f"{sample.key}.{sample.extension}", "text": sample.fields["text"]}
                manifest.write(json.dumps(line) + "\n")
    tools = tmp_path / "bin"
    tools.mkdir()
    for name, command in TOOLS.items():
        (tools / name).write_text(f"#!/bin/bash\n{command}\n")
        (tools / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tools), prepend=os.pathsep)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *sys.path]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


def start(file: str, *words: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", str(RECIPE / file), *words], env={**os.environ, **environment}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip


def ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 0, output[-4000:]
    return output


def test_the_same_files_run_in_small(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert settings_writer().main(SMALL) == 0
    commands = [line.split()[1:] for line in capsys.readouterr().out.splitlines()]
    for verb, file in commands:
        name = Path(file).stem
        if name == "soft-targets":
            for process in [start("slurm/label.sbatch", file, "device=cpu") for _ in range(2)]:
                assert "8 utterances in = 8 labelled + 0 quarantined" in ended(process)
        elif name == "student-chunks":
            output = ended(start(
                "slurm/train.sbatch", file, "device=cpu", "distributed.bmuf={block_steps: 2, warmup_steps: 1}",
                PROCESSES="2", PORT="0", SLURM_NNODES="1", SLURM_JOB_ID="1", SLURM_JOB_NODELIST="localhost",
            ))  # fmt: skip
            assert "2 processes" in output
        else:
            cpu = ["device=cpu"] if verb in ("train", "label", "eval") else []
            assert cli.main([verb, file, *cpu]) == 0, file
    lines = [json.loads(line) for line in Path("models/student-chunks/metrics.jsonl").read_text().splitlines()]
    assert max(line.get("bytes_sent", 0) for line in lines) > 0
    report = json.loads(Path("models/report/report.json").read_text())
    assert {"student", "teacher", "student-supervised"} <= set(report["systems"])
