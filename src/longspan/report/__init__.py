"""Run folders -> one self-contained HTML page, PNG figures and CSV tables.

`summarise` turns evaluation records into numbers, `write_report` turns them into a page that needs no network.
Everything shown is computed from the records of a run; nothing is measured, scored or generated here.
"""

from longspan.report.html import ReportResult, write_report
from longspan.report.summary import summarise

__all__ = ["ReportResult", "summarise", "write_report"]
