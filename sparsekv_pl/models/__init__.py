"""Which network: sources, adapters, precision, placement; and what goes into it: batches, seeds, ratios."""
