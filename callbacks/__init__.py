"""Lightning callbacks, one concern each, imported from their modules."""
