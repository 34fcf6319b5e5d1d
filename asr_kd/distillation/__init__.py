"""What a student can learn from a teacher: one file per kind of knowledge."""
