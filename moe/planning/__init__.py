"""Which layouts of a training job fit a cluster, and how long a step takes in each: docs/plan.md."""
