"""One process of a test's job, in the environment that torchrun gives: python process.py FILE FUNCTION FOLDER."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch

from asr_kd.training.distributed.ranks import joined

if __name__ == "__main__":
    file, function, folder = sys.argv[1:]
    torch.set_num_threads(1)
    with joined(torch.device("cpu")) as ranks:
        torch.save(runpy.run_path(file)[function](ranks), Path(folder) / f"{ranks.rank}.pt")
    threads = [file.read_text().strip() for file in Path("/proc/self/task").glob("*/comm")]
    if "pt_gloo_runloop" in threads:  # it would drop tensors while the interpreter ends, which can kill the process
        raise SystemExit("the group of the processes is still there at the end of the job")
