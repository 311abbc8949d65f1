"""The report of the anchor analysis."""
