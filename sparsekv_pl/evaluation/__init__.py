"""Measuring: LightningModules, the points of a matrix, lm-eval, hosted models, long contexts."""
