"""The command lines of train.py and evaluate.py: parsing, checks, one-line errors."""
