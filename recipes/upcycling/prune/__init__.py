"""Fewer experts: which of a mixture's experts text needs most, and a checkpoint with these alone."""
