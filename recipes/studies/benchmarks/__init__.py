"""Benchmarks of routers, saving, conversion, sharding and engines."""
