"""Results JSON to one self-contained HTML page, and to a terminal summary. Both are pure functions of the results file."""

from dlkernels.report.page import build, summary

__all__ = ["build", "summary"]
