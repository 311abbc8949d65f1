"""Seeing attention, and computing it over a cache, without an L x L matrix."""
