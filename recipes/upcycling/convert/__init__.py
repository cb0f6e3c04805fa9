"""Conversion of a dense checkpoint to an MoE model on disk, tensor by tensor."""
