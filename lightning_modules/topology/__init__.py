"""Persistent homology of return series: delay embedding, diagrams, and vectors of diagrams.

Importing this needs neither scikit-learn, which :mod:`~lightning_modules.topology.vectorisers` imports, nor giotto-tda
or gudhi, which compute the diagrams. All come with the extra ``[tda]``.
"""

from lightning_modules.topology.diagrams import persistence_diagrams
from lightning_modules.topology.representation import TopologicalRepresentation
from lightning_modules.topology.scaling import scale_returns
from lightning_modules.topology.takens import embed, search_parameters

__all__ = ["TopologicalRepresentation", "embed", "persistence_diagrams", "scale_returns", "search_parameters"]
