"""``python -m sparsekv_pl.serve``: an OpenAI-compatible server whose documents are evicted once and asked often."""
