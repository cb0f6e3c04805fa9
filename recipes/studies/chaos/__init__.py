"""Fault injection: kills ranks of a training job and checks that its results do not change."""
