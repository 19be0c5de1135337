"""Exclusive vector → factors: truncated SVD, rank and byte budgets, error report.

Works on deltas alone; knows no files and no bundles. Start reading at `compress.py`, then `svd.py`.
"""

from experts.compression.compress import CompressedExpert, compress
from experts.compression.exclusive import exclusive_delta
from experts.compression.kinds import TensorKind, tensor_kind
from experts.compression.report import CompressionReport, TensorReport
from experts.compression.spec import CompressionSpec
from experts.compression.svd import truncated_svd

__all__ = [
    "CompressedExpert",
    "CompressionReport",
    "CompressionSpec",
    "TensorKind",
    "TensorReport",
    "compress",
    "exclusive_delta",
    "tensor_kind",
    "truncated_svd",
]
