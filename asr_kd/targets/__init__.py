"""Soft targets: a teacher's output distribution frame by frame, and how it is stored."""
