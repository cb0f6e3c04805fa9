"""Trains the same job under several routers and seeds, and puts them side by side on one page."""
