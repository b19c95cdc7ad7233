"""The last line of a test run: what was skipped here, and what it takes to run it."""

from collections import Counter
from typing import Any

import pytest


def pytest_unconfigure(config: pytest.Config) -> None:
    """After pytest's own summary, in the process that prints it."""
    reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(config, "workerinput"):
        return
    reasons = Counter(_reason(report) for report in reporter.stats.get("skipped", []))
    if reasons:
        parts = [f"{count} ({reason})" for reason, count in reasons.most_common()]
        reporter.write_line(f"NOT RUN here: {'; '.join(parts)}")


def _reason(report: Any) -> str:
    text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
    return text.removeprefix("Skipped: ")
