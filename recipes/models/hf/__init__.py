"""Decoders of transformers: recognised blocks, the model of a run, and surgery on it."""
