"""Static merges: fine-tunes → shared expert. One method a file, each a pure function of tensors.

`methods.py` says which there are and their hyper-parameters; `merge.py` streams a whole model through one,
`family.py` reads the fine-tunes, `entrywise.py` and `blocks.py` run the entrywise methods within the cache.
May import `experts.checkpoint`, `experts.factors` and `experts.compression.solvers`. Start at `merge.py`.
"""

from experts.merging.cache import MergeCache
from experts.merging.merge import merge
from experts.merging.methods import (
    Averaging,
    Breadcrumbs,
    Dare,
    DareTies,
    Della,
    IsoC,
    MergeMethod,
    ModelStock,
    Sce,
    TaskArithmetic,
    Ties,
    TsvMerge,
)

__all__ = [
    "Averaging",
    "Breadcrumbs",
    "Dare",
    "DareTies",
    "Della",
    "IsoC",
    "MergeCache",
    "MergeMethod",
    "ModelStock",
    "Sce",
    "TaskArithmetic",
    "Ties",
    "TsvMerge",
    "merge",
]
