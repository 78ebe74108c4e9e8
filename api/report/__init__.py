"""The report of a sample: the cells of many fields as one differential, with red cells, parasites, platelets and provenance."""

from .sample import exact_limits, sample_figures
from .smear_report import SmearReport
from .tables import ReportTables


__all__ = ["ReportTables", "SmearReport", "exact_limits", "sample_figures"]
