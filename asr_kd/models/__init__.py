"""Acoustic models: each maps (features, lengths) to (logits, lengths)."""
