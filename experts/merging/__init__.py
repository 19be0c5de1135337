"""Static merges: fine-tunes → shared expert. One method a file, each a pure function of tensors.

`methods.py` says which there are and their hyper-parameters; `merge.py` streams a whole model through one.
May import `experts.checkpoint` and `experts.factors`. Start reading at `merge.py`.
"""

from experts.merging.merge import merge
from experts.merging.methods import Averaging, Dare, DareTies, MergeMethod, TaskArithmetic, Ties

__all__ = ["Averaging", "Dare", "DareTies", "MergeMethod", "TaskArithmetic", "Ties", "merge"]
