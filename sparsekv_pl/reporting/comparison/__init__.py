"""The report of the comparison of block selectors."""
