"""Utterances that a job cannot use: how many, the first of them, and when they are too many."""

from __future__ import annotations

from dataclasses import dataclass

from asr_kd.errors import UserError


@dataclass
class Quarantine:
    """What a job could not use so far.

    Attributes:
        total: utterances of the whole job.
        share: `max_bad_share`, the share of `total` that may be bad.
        done: what is done to the others: used, labelled, read.
        first: key and reason of the first one.
        all_may: whether all may be bad, if `share` says so.
        excused: how many of `count` may be, whatever the share is, unless nothing else is there.
    """

    total: int
    share: float
    done: str = "used"
    count: int = 0
    first: tuple[str, str] = ("", "")
    all_may: bool = False
    excused: int = 0

    def add(self, key: str, reason: str, excused: bool = False) -> None:
        """Count an utterance."""
        if not self.count or (self.count == self.excused and not excused):
            self.first = key, reason
        self.count += 1
        self.excused += excused

    @property
    def too_many(self) -> bool:
        """Whether more than the share are bad."""
        return self.count - self.excused > self.share * self.total

    @property
    def example(self) -> str:
        """The first one, in brackets, for a message."""
        key, reason = self.first
        return f"(first: {key}: {reason.removeprefix(f'{key}: ')})"

    def refuse(self, where: str, advice: str = "fix them") -> None:
        """Raise UserError when too many are bad, or none is good: `where` they are, how many, the first one, and `advice`."""
        if 0 < self.total == self.count and not self.all_may:
            raise UserError(f"{where}: none of {self.total} utterances can be {self.done} {self.example}; {advice}")
        if self.too_many:
            raise UserError(
                f"{where}: {self.count - self.excused} of {self.total} utterances cannot be {self.done}, more than max_bad_share "
                f"{self.share} {self.example}; {advice}, or raise max_bad_share"
            )
