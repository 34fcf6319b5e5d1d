from __future__ import annotations

import subprocess
import sys


def test_a_process_beside_the_network_starts_without_torch() -> None:
    """Most of a second, and of the memory of a small one, would be torch's."""
    code = "import sys, asr_kd.evaluation.beside; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
