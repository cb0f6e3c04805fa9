"""Builds models shard by shard: no rank ever holds a whole one."""
