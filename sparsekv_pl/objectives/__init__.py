"""What training minimises: one objective per file, chosen and mixed in YAML."""

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.alignment import SelectionObjective
from sparsekv_pl.objectives.layerwise import Layerwise
from sparsekv_pl.objectives.mixed import Mixed
from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.objectives.reconstruction import Reconstruction
from sparsekv_pl.objectives.tokens import EIT, LM, SparseLM

__all__ = [
    "EIT",
    "LM",
    "Layerwise",
    "Mixed",
    "Objective",
    "Reconstruction",
    "Request",
    "SelectionObjective",
    "SparseLM",
    "StudentView",
]
