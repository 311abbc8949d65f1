"""The report of the oracle hot blocks."""
