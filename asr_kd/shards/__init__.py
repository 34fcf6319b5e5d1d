"""What lies on disk, and how it streams."""
