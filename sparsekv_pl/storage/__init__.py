"""What lies on disk: whole files, locked folders, digests, finished work and its keys, and errors of files."""
