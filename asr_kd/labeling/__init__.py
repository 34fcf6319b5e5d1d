"""Teachers over audio shards: batch generation of soft targets."""
