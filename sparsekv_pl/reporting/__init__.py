"""Reports of a run's records: tables with intervals, pictures, one page, and kvpress's layout."""

from sparsekv_pl.reporting.analysis_page import write_analysis
from sparsekv_pl.reporting.environment import REPORTED_PACKAGES, environment, run_environment
from sparsekv_pl.reporting.heatmaps import sparsity_figure
from sparsekv_pl.reporting.intervals import paired_bootstrap, wilson_interval
from sparsekv_pl.reporting.kvpress_layout import write_kvpress_layout
from sparsekv_pl.reporting.run_report import write_run
from sparsekv_pl.reporting.summary import summarised
from sparsekv_pl.reporting.terminal import terminal_table

__all__ = [
    "REPORTED_PACKAGES",
    "environment",
    "paired_bootstrap",
    "run_environment",
    "sparsity_figure",
    "summarised",
    "terminal_table",
    "wilson_interval",
    "write_analysis",
    "write_kvpress_layout",
    "write_run",
]
