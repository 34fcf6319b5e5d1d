"""Job 3: the WER report."""
