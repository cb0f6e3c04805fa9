"""Models that are made shard by shard: no rank ever holds a whole one."""
