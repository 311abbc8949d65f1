"""What a cache kept, token by token, as one self-contained HTML page."""
