"""Back end for CPUs: fused forward and backward over cache-sized groups of experts."""
