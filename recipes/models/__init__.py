"""Models of transformers: reading, upcycling in memory, low-rank factors, and export."""
