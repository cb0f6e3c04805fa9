"""DeRS as a storage format: a base for all experts of a matrix, and each expert's difference from it."""
