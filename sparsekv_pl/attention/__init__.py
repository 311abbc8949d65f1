"""Computing attention over a cache, and measuring it, without an L x L matrix."""
