from __future__ import annotations

import os
import signal
import time

import pytest

from asr_kd import ending
from asr_kd.ending import Status, Stopped, interruptible, stop_if_asked, stop_requests
from asr_kd.errors import UserError

BOTH = [(signal.SIGINT, 130), (signal.SIGTERM, 143)]


@pytest.fixture(autouse=True)
def listening() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit an ignored one


@pytest.mark.parametrize(("number", "status"), BOTH)
def test_a_request_to_stop_interrupts_and_is_known_by_its_status(number: int, status: int) -> None:
    before = signal.getsignal(number)
    with interruptible() as stopped:
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
            time.sleep(10)
        assert stopped() == status
    assert signal.getsignal(number) == before
    stop_if_asked()


def swallow(number: int) -> None:
    """As C code does that calls Python and asks for no exception."""
    try:
        os.kill(os.getpid(), number)
        time.sleep(0.1)
    except KeyboardInterrupt:
        pass


@pytest.mark.parametrize(("number", "status"), BOTH)
def test_a_request_that_was_swallowed_is_seen_later(number: int, status: int) -> None:
    with interruptible() as stopped:
        stop_if_asked()
        swallow(number)
        with pytest.raises(KeyboardInterrupt):
            stop_if_asked()
        assert stopped() == status


def test_a_later_request_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ending, "SAME", 0.0)
    with interruptible():
        swallow(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)


def test_the_same_request_twice_does_not_disturb_the_clearing_up() -> None:
    with interruptible():
        swallow(signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)


def test_an_ignored_interrupt_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interruptible():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        stop_if_asked()


@pytest.mark.parametrize(("number", "status"), BOTH)
def test_a_job_can_stop_when_it_is_ready_to(number: int, status: int) -> None:
    with interruptible(), stop_requests() as asked:
        assert asked() == 0
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert asked() == status
        error = Stopped("out: stopped", asked())
    assert error.status is Status(status) and isinstance(error, UserError)
