"""Statistics of a dense model on real text, for the methods that build experts by them."""
