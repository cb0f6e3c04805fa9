"""Studies: sweeps over whole runs, comparisons, benchmarks and fault injection; only tools import them."""
