from __future__ import annotations

import subprocess
import sys


def test_ctrl_c_while_the_command_line_is_loaded_ends_without_a_traceback() -> None:
    program = """
import runpy, sys
class Interrupted:
    def find_spec(self, name, path=None, target=None):
        if name == "asr_kd.config":
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupted())
runpy.run_module("asr_kd", run_name="__main__")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "asr_kd", "verify"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("asr-kd verify: ")
    assert "Traceback" not in done.stderr
