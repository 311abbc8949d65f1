"""Block-sparse attention: gates, Sketch&Walk, collected tensors, comparison and validation, with their reports."""
