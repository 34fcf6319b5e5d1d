"""Running teachers over audio shards: batch generation of soft targets."""
