"""Preference datasets: validation, statistics, building, review, and publishing."""

from ..preferences.columns import COLUMNS, Column, check_columns
from ..preferences.faults import KINDS, Finding, Place
from .counts import QUANTITIES, Quantity, SplitStatistics
from .export import card_files, check_splits, prepare_splits, push_dataset
from .report import format_report
from .validation import ValidationReport, validate_splits


__all__ = [
    "COLUMNS",
    "KINDS",
    "QUANTITIES",
    "Column",
    "Finding",
    "Place",
    "Quantity",
    "SplitStatistics",
    "ValidationReport",
    "card_files",
    "check_columns",
    "check_splits",
    "format_report",
    "prepare_splits",
    "push_dataset",
    "validate_splits",
]
