"""Kills ranks of a training job and looks whether it goes on as if nothing had happened."""
