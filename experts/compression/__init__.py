"""Exclusive vector → factors: truncated SVD, rank and byte budgets, quantised forms, error report.

Works on deltas alone; knows no files and no bundles. Start reading at `compress.py`, then `svd.py` and
`stored.py`; `baselines.py` and `curve.py` are for comparison and serve nothing.
"""

from experts.compression.activations import activation_statistics
from experts.compression.compress import CompressedExpert, compress
from experts.compression.exclusive import exclusive_delta
from experts.compression.kinds import TensorKind, tensor_kind
from experts.compression.report import CompressionReport, TensorReport
from experts.compression.spec import Allocation, Codec, CompressionSpec
from experts.compression.svd import truncated_svd

__all__ = [
    "Allocation",
    "Codec",
    "CompressedExpert",
    "CompressionReport",
    "CompressionSpec",
    "TensorKind",
    "TensorReport",
    "activation_statistics",
    "compress",
    "exclusive_delta",
    "tensor_kind",
    "truncated_svd",
]
