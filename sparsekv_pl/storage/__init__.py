"""Files on disk: atomic writes, locked folders, digests, finished work and its keys, and file errors."""
