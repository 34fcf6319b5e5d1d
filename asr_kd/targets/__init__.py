"""Soft targets: what a teacher said, frame by frame, and how it is kept."""
