"""The network: sources, adapters, precision, placement; and its inputs: batches, seeds, ratios."""
