"""Fewer experts: a mixture's experts merged into those that text uses most."""
