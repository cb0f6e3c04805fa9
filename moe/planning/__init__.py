"""Planning of training jobs: layouts that fit a cluster, and the time of a step in each (docs/plan.md)."""
