from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from asr_kd.audio import blas
from asr_kd.audio.blas import one_thread
from asr_kd.audio.features import Frontend
from asr_kd.audio.settings import FeatureSettings
from asr_kd.audio.spectrum import Spectrum


@pytest.fixture
def many() -> Iterator[None]:
    found = blas._openblas()
    if found is None:
        pytest.skip("numpy comes without OpenBLAS here")
    get, put = found
    before = get()
    put(3)
    yield
    assert get() == 3, "left as it was found"
    put(before)


def threads() -> int:
    found = blas._openblas()
    assert found
    return found[0]()


def test_one_thread_as_long_as_anybody_needs_it(many: None) -> None:
    inside, out = threading.Event(), threading.Event()

    def other() -> None:
        with one_thread():
            inside.set()
            assert out.wait(300)

    thread = threading.Thread(target=other)
    with one_thread():
        assert threads() == 1
        thread.start()
        assert inside.wait(300)
    assert threads() == 1, "another thread is not done"
    out.set()
    thread.join()
    assert threads() == 3


def test_features_are_computed_by_one_thread_from_python_too(many: None, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    frontend = Frontend(FeatureSettings(sample_rate=8000))
    real = Spectrum.log_energies
    monkeypatch.setattr(Spectrum, "log_energies", lambda *given: seen.append(threads()) or real(*given))
    frontend.compute(np.zeros(8000, np.float32))
    assert seen == [1]


def test_nothing_is_loaded_twice() -> None:
    """Else another copy's number would be set."""
    program = (
        "from asr_kd.audio.blas import one_thread\nimport numpy\n"
        "with one_thread(): numpy.ones((9, 9)) @ numpy.ones((9, 9))\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'openblas' in line}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.strip() in ("0", "1"), done.stderr
