"""Which utterances to learn from, and which recordings of the same moments belong together."""
