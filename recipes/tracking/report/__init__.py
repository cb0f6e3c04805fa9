"""Report of a run: figures, a page that opens anywhere, and a table for the terminal."""

from recipes.tracking.report.build_report import build_report, readme_figure
from recipes.tracking.report.results_table import results_table

__all__ = ["build_report", "readme_figure", "results_table"]
