"""The report of the validation of Sketch&Walk on collected tensors."""
