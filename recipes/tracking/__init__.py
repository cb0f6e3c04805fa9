"""Metrics, meters, dashboards and the report of a run."""
