"""A run's report: one self-contained page from what lies in its folder."""

from pra.evaluation.report.page import write_report

__all__ = ["write_report"]
