"""Giving memory back that is only needed again by chance."""

import ctypes
import mmap
import sys
from collections.abc import Iterable

from torch import Tensor

_PAGE_OUT = 21
"""MADV_PAGEOUT of Linux 5.4: reclaim pages now. Pages of a file are read again when they are touched; pages
that hold the only copy of something go to swap or stay, so nothing can be lost."""


def page_out(tensors: Iterable[Tensor]) -> None:
    """Let go of the memory of tensors that are mapped from files and of which packed copies are used instead.

    Does nothing where the system cannot.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    page = mmap.PAGESIZE
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        begin = -(-tensor.data_ptr() // page) * page
        end = (tensor.data_ptr() + tensor.nbytes) // page * page
        if end > begin:
            madvise(begin, end - begin, _PAGE_OUT)
