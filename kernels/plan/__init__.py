"""Plan of a batch: its routed rows in expert order, by a sort or by Triton kernels."""
