"""Names of logged terms that are written in one room and read in others; "/" and the press's name follow."""

SELECTION = "selection"
"""The press's selection loss."""
KEPT = "kept_mass"
"""The share of the teacher's attention that the press's selection keeps."""
MOST = "kept_mass_most"
"""The largest share that its budget could keep."""
