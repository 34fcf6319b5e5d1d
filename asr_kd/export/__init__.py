"""A checkpoint leaves: a graph that other programs run, and the proof that it says the same."""
