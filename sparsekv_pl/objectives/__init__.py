"""Training objectives, one per file, chosen and mixed in YAML."""

from sparsekv_pl.eviction.request import Request
from sparsekv_pl.objectives.chunks import Chunks
from sparsekv_pl.objectives.eit import EIT
from sparsekv_pl.objectives.first_chunk import FirstChunk
from sparsekv_pl.objectives.full_cache import FullCache
from sparsekv_pl.objectives.layerwise import Layerwise
from sparsekv_pl.objectives.lm import LM, SparseLM
from sparsekv_pl.objectives.mixed import Mixed
from sparsekv_pl.objectives.objective import Objective, StudentView
from sparsekv_pl.objectives.reconstruction import Reconstruction
from sparsekv_pl.objectives.selection_loss import SelectionObjective

__all__ = [
    "EIT",
    "LM",
    "Chunks",
    "FirstChunk",
    "FullCache",
    "Layerwise",
    "Mixed",
    "Objective",
    "Reconstruction",
    "Request",
    "SelectionObjective",
    "SparseLM",
    "StudentView",
]
