"""Lightning callbacks: one concern each, imported by their modules' names."""
