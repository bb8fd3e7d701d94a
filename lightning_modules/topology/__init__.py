"""Persistent homology of return series: delay embedding, diagrams, and vectors of diagrams.

Only :mod:`~lightning_modules.topology.vectorisers` needs scikit-learn when imported, and only computing diagrams needs
giotto-tda or gudhi; all come with the extra ``[tda]``.
"""

from lightning_modules.topology.diagrams import persistence_diagrams
from lightning_modules.topology.representation import TopologicalRepresentation
from lightning_modules.topology.scaling import scale_returns
from lightning_modules.topology.takens import embed, search_parameters

__all__ = ["TopologicalRepresentation", "embed", "persistence_diagrams", "scale_returns", "search_parameters"]
