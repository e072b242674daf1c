"""The report: one self-contained HTML page that shows what each query was traced to."""

from hf_forward_inf.report.page import SHOWN, as_card, write_report

__all__ = ["SHOWN", "as_card", "write_report"]
