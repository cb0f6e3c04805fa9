"""DeRS as a storage format: a base for all experts of a matrix, and what sets each apart."""
