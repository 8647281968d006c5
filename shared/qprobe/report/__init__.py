"""What an evaluation found: `results` holds the numbers, `tables` writes them as text, `figures` draws them, `page` shows a run.

The figures need matplotlib, so `qprobe.report.figures` is imported by whoever draws and never from here.
"""

from qprobe.report.results import Band
from qprobe.report.tables import to_text

__all__ = ["Band", "to_text"]
