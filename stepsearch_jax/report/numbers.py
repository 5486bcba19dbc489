"""The measures of tables and reports, and how numbers are written in them."""

from __future__ import annotations

import math

MEASURES = (
    ("f1", "F1"),
    ("em", "Exact match"),
    ("gold_recall", "Gold recall"),
    ("searches", "Searches"),
)


def format_number(value: float | None, digits: int = 3) -> str:
    """0.1234 -> "0.123"; None or NaN (not measured, not known) -> "–"."""
    return "–" if value is None or math.isnan(value) else f"{value:.{digits}f}".replace("-", "−")


def format_signed(value: float | None, digits: int = 3) -> str:
    """As `format_number`, with + or −."""
    return "–" if value is None else ("+" if value >= 0 else "−") + f"{abs(value):.{digits}f}"
