"""Names for the contents of blocks: equal names mean equal keys and values, whoever computed them.

A block's keys and values depend on every token up to its end and on the weights in use. Digests are
cryptographic because a collision would serve one client's context to another.
"""

import struct
from hashlib import blake2b

from service.scheduler.pool import BLOCK_TOKENS
from service.scheduler.sequence import Sequence

_SIZE = 16
_pack = struct.Struct(f"<{BLOCK_TOKENS}q").pack


def root_of(sequence: Sequence) -> bytes:
    """What the sequence's chain hangs from: expert generations, exact gates, and where the gates begin.

    Empty while the pattern is unknown, remembered in the sequence afterwards.
    """
    if not sequence.root and sequence.pattern is not None:
        named = repr((sequence.pattern.gates, sequence.single_pass)).encode()
        sequence.root = blake2b(named, digest_size=_SIZE).digest()
    return sequence.root


def extend(sequence: Sequence, blocks: int) -> None:
    """Grow the chain to `blocks` digests; each covers its block's tokens and, through its parent, all before."""
    chain, tokens = sequence.chain, sequence.tokens
    parent = chain[-1] if chain else root_of(sequence)
    for start in range(len(chain) * BLOCK_TOKENS, blocks * BLOCK_TOKENS, BLOCK_TOKENS):
        packed = _pack(*tokens[start : start + BLOCK_TOKENS])
        parent = blake2b(parent + packed, digest_size=_SIZE).digest()
        chain.append(parent)
