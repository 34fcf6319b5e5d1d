"""A watch on the run's own average as a teacher: one that says less and less teaches silence, and then says less still.

A student of its own answers can collapse to all blanks, where every loss against itself is lowest. What is watched is the share of frames in which
the average's best unit is not the blank, against that at the start of the phase. So a phase with a guard starts from a network that
can speak (`init`, or an earlier phase).
"""

from __future__ import annotations

from dataclasses import dataclass

#: batches of answers that tell how much was spoken at the start
FIRST = 20
#: share of the running mean that stays with each batch after them
KEPT = 0.95


@dataclass
class Watch:
    """How much is spoken in the answers to one source, in this phase.

    Attributes:
        answers: batches that were answered.
        first: share of frames with a unit, a mean over the first batches.
        now: the same, a running mean that follows the latest.
        left_out: batches whose answers were not learned.
    """

    answers: float = 0
    first: float = 0.0
    now: float = 0.0
    left_out: float = 0

    def allows(self, spoken: float, guard: float) -> bool:
        """Count a batch of answers with this share of frames that are not blank; whether they may be learned.

        They may while the running mean is at least the share `guard` of what was spoken first.
        """
        self.answers += 1
        if self.answers <= FIRST:
            self.first += (spoken - self.first) / self.answers
            self.now = self.first
            return True
        self.now = KEPT * self.now + (1 - KEPT) * spoken
        allowed = self.now >= guard * self.first
        self.left_out += not allowed
        return allowed
