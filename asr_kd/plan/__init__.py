"""What a large job will take: bytes, hours, cost."""
