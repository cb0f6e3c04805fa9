"""Mixtures back to the dense class of their family."""
