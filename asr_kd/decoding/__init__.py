"""Posteriors → words."""
