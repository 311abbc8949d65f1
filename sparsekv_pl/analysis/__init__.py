"""Analyses of attention: statistics, anchors and oracle blocks, each with its report."""
