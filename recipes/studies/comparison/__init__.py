"""Comparison of routers: the same job under several routers and seeds, side by side on one page."""
