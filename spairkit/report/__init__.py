"""One self-contained HTML page about a run: no network, no script, nothing but the file."""

from spairkit.report.page import write_report as write_report
