"""``python -m sparsekv_pl.ask DOCUMENT [QUESTION ...]``: a document's evicted cache, asked from the shell."""
