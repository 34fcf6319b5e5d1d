"""Progress of long jobs: a bar on a terminal, an occasional line in a log."""

from __future__ import annotations

import sys
import threading
import time

from tqdm import tqdm

LOG_EVERY_SECONDS = 15.0


class Progress:
    """Shows how much is done, audio hours an hour, and the time left.

    Args:
        title: what is being done, e.g. `label`.
        total: amount of work; None if unknown.
        unit: what is counted, e.g. `utterances`.
        show: whether anything is printed; true in one of several processes.
    """

    def __init__(self, title: str, total: int | None, unit: str, show: bool = True) -> None:
        self.title, self.total, self.unit, self.show = title, total, unit, show
        self.done = self._before = 0
        self.audio_seconds = 0.0
        self._start = self._last = time.monotonic()
        self._counting = threading.Lock()
        self._bar = tqdm(total=total, desc=title, unit=f" {unit}", leave=True) if show and sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif kind is None:
            self._print()

    def resume(self, count: int) -> None:
        """Count what an earlier run has done, without its effect on the speed."""
        self.done += count
        self._before += count
        if self._bar is not None:
            self._bar.n = self._bar.last_print_n = self._bar.initial = self._before
            self._bar.refresh()

    def advance(self, count: int = 1, audio_seconds: float = 0.0, note: str = "") -> None:
        """Count `count` more done, with `audio_seconds` seconds of audio; `note` is shown beside the figures.

        Work of other processes is counted without its audio: the time left is of the whole job, the speed of this process.
        """
        with self._counting:
            self.done += count
            self.audio_seconds += audio_seconds
        if self._bar is not None:
            self._bar.set_postfix_str(", ".join(part for part in (self._rate(), note) if part), refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._last >= LOG_EVERY_SECONDS:
            self._last = time.monotonic()
            self._print(note)

    def _rate(self) -> str:
        elapsed = max(time.monotonic() - self._start, 1e-6)
        return f"{self.audio_seconds / elapsed:,.0f} audio hours/hour" if self.audio_seconds else ""

    def _print(self, note: str = "") -> None:
        if not self.show:
            return
        elapsed = time.monotonic() - self._start
        time_of = f"{elapsed:,.1f} s"
        if self.total and self._before < self.done < self.total:
            time_of = f"{elapsed / (self.done - self._before) * (self.total - self.done):,.0f} s left"
        done = f"{self.title}: {self.done:,}" + (f" of {self.total:,}" if self.total else "") + f" {self.unit}"
        print(", ".join(filter(None, (done, self._rate(), time_of, note))), file=sys.stderr, flush=True)
