"""KV memory in blocks: every sequence has a block table for each group of layers, prefixes are shared.

Knows no tensors: the engine lays keys and values out by these tables.
"""

from collections import Counter
from collections.abc import Iterable
from collections.abc import Sequence as Many
from dataclasses import dataclass

from service.core import ExpertKey, Pattern
from service.scheduler.pool import BLOCK_TOKENS, NULL_BLOCK, BlockPool
from service.scheduler.prefix import extend
from service.scheduler.sequence import Sequence

__all__ = ["BLOCK_TOKENS", "NULL_BLOCK", "KvBlocks", "KvGroup"]


@dataclass(frozen=True, slots=True)
class KvGroup:
    """The layers that see equally far.

    Attributes:
        window: how many tokens a layer sees, its own included; None sees all.
        blocks: blocks of its pool, the null block included.
    """

    window: int | None
    blocks: int

    def first_seen(self, position: int) -> int:
        """Index of the first block that the token at `position` looks at."""
        return 0 if self.window is None else max(0, position - self.window + 1) // BLOCK_TOKENS

    def peak(self, tokens: int, step: int) -> int:
        """Most blocks that a sequence of `tokens` holds at a time, if a step computes `step` of them."""
        whole = _blocks(tokens)
        # That many adjacent tokens lie in one block more than they fill, at the worst alignment.
        return whole if self.window is None else min(whole, (self.window + step + 13) // BLOCK_TOKENS + 1)

    def longest_step(self, tokens: int) -> int:
        """Most tokens of one step for which a sequence of `tokens` still fits an empty pool."""
        size = self.blocks - 1
        if self.window is None or _blocks(tokens) <= size:
            return tokens
        return size * BLOCK_TOKENS - self.window - 14


class KvBlocks:
    """The pools of all groups, and the prefix cache over them.

    A sequence is admitted with blocks for all of its tokens and one more; in groups with a window only for
    those of its next step, and it gives back what the window has passed. A block becomes known to others once
    it is whole and `advance` has said that its content is good.

    Attributes:
        queries: prompt tokens that were looked up in the prefix cache.
        hits: those that were found.
    """

    def __init__(self, groups: Many[KvGroup], *, prefix_cache: bool = True) -> None:
        self.groups = tuple(groups)
        self.prefix_cache = prefix_cache
        self.queries = 0
        self.hits = 0
        self._pools = tuple(BlockPool(group.blocks) for group in groups)
        self._sliding = tuple(index for index, group in enumerate(groups) if group.window is not None)

    @property
    def total_blocks(self) -> int:
        """Blocks of all groups, the null blocks excluded."""
        return sum(pool.size for pool in self._pools)

    @property
    def cached_blocks(self) -> int:
        """Blocks that no sequence owns but a later one may find."""
        return sum(pool.idle for pool in self._pools)

    @property
    def free_blocks(self) -> int:
        """Blocks without an owner or known content."""
        return sum(pool.available - pool.idle for pool in self._pools)

    @property
    def used_blocks(self) -> int:
        """Blocks that sequences own."""
        return sum(pool.size - pool.available for pool in self._pools)

    def fits(self, tokens: int, step: int = 1) -> bool:
        """Whether a sequence of that many tokens can run at all, `step` of them at a time."""
        return all(group.peak(tokens, step) < group.blocks for group in self.groups)

    def longest_step(self, tokens: int) -> int:
        """Most tokens of a step, so that a sequence of `tokens` that runs alone never lacks a block."""
        limits = (self.groups[index].longest_step(tokens) for index in self._sliding)
        return min(limits, default=tokens)

    def match(self, sequence: Sequence) -> int:
        """Leading tokens whose keys and values are in the cache, whole blocks; at least one is left over."""
        if not self.prefix_cache or not sequence.shareable or sequence.pattern is None:
            return 0
        if sequence.request.reads_prompt and not sequence.generated:
            return 0
        whole = (len(sequence.tokens) - 1) // BLOCK_TOKENS
        extend(sequence, whole)
        return self._known(sequence.chain, whole) * BLOCK_TOKENS

    def admit(self, sequence: Sequence, hit: int, step: int, reserve: int) -> bool:
        """Give a waiting sequence its blocks, all or none.

        Args:
            hit: what `match` said.
            step: tokens that its first step computes.
            reserve: blocks of each group that must stay available.
        """
        length, shared = len(sequence.tokens) + 1, hit // BLOCK_TOKENS
        found: list[list[int]] = []
        for group, pool in zip(self.groups, self._pools, strict=True):
            hits = [pool.find(digest) for digest in sequence.chain[group.first_seen(hit) : shared]]
            known = [block for block in hits if block is not None]
            assert len(known) == len(hits), "a prefix hit has gone since it was matched"
            fresh = group.peak(length, step) - len(known)
            if fresh + sum(not pool.owners(block) for block in known) + reserve > pool.available:
                return False
            found.append(known)
        for group, pool, known in zip(self.groups, self._pools, found, strict=True):
            for block in known:
                pool.share(block)
            reach = _blocks(length if group.window is None else min(length, hit + step))
            table = [NULL_BLOCK] * (shared - len(known)) + known
            sequence.tables.append(table)
            table.extend(pool.take() for _ in range(reach - shared))
        sequence.computed = hit
        sequence.cached = min(hit, sequence.prompt_length)
        if self.prefix_cache and not sequence.preemptions:
            self.queries += sequence.prompt_length
            self.hits += sequence.cached
        return True

    def grow(self, sequence: Sequence, tokens: int) -> bool:
        """Blocks for the first `tokens` tokens in every group, all or none; a no-op if it has them."""
        blocks = _blocks(tokens)
        lacking = False
        for table, pool in zip(sequence.tables, self._pools, strict=True):
            if len(table) < blocks:
                lacking = True
                if blocks - len(table) > pool.available:
                    return False
        if lacking:
            for table, pool in zip(sequence.tables, self._pools, strict=True):
                table.extend(pool.take() for _ in range(blocks - len(table)))
        return True

    def advance(self, sequence: Sequence, count: int) -> None:
        """The next `count` tokens are in the cache and good: whole blocks become known, passed ones go back."""
        before, after = sequence.computed, sequence.computed + count
        sequence.computed = after
        first, last = before // BLOCK_TOKENS, after // BLOCK_TOKENS
        if sequence.single_pass:
            # Its answer was computed otherwise than a prompt with the same tokens would be.
            last = min(last, sequence.prompt_length // BLOCK_TOKENS)
        if sequence.pattern is None:
            # Blocks above would hang from a chain whose beginning nobody can name.
            sequence.shareable = False
        elif first < last and self.prefix_cache and sequence.shareable:
            extend(sequence, last)
            for table, pool in zip(sequence.tables, self._pools, strict=True):
                for index in range(first, last):
                    pool.publish(table[index], sequence.chain[index], sequence.pattern)
        for number in self._sliding:
            group, pool, table = self.groups[number], self._pools[number], sequence.tables[number]
            for index in range(group.first_seen(before), group.first_seen(after)):
                pool.drop(table[index])
                table[index] = NULL_BLOCK

    def free(self, sequence: Sequence, *, reusable: bool = True) -> list[tuple[int, int]]:
        """Take all blocks of a sequence back; those at the end of its tables are handed out again first.

        Args:
            reusable: its content may be found by others. If not, none of it can be from now on, not even
                what was known already: a fault that went unseen then must not reach the next request.

        Returns:
            (group, block) of those that became free.
        """
        freed: list[tuple[int, int]] = []
        for number, (table, pool) in enumerate(zip(sequence.tables, self._pools, strict=False)):
            for block in reversed(table):
                if block == NULL_BLOCK:
                    continue
                if not reusable:
                    pool.withdraw(block)
                if pool.drop(block):
                    freed.append((number, block))
        sequence.tables = []
        sequence.computed = 0
        return freed

    def forget(self, key: ExpertKey) -> None:
        """Drop what was computed with a generation; blocks in use stay with their owners and are free after."""
        stale: dict[int, bool] = {}

        def uses(pattern: Pattern) -> bool:
            if id(pattern) not in stale:
                stale[id(pattern)] = key in pattern.experts
            return stale[id(pattern)]

        for pool in self._pools:
            pool.withdraw_all(uses)

    def check(self, sequences: Iterable[Sequence] = ()) -> None:
        """Every block is free, cached or owned, and owned exactly as often as these tables say.

        Raises:
            AssertionError: with the difference. Without sequences: free + cached is not the total.
        """
        tables = [sequence.tables for sequence in sequences]
        for number, pool in enumerate(self._pools):
            held = Counter(block for each in tables for block in each[number])
            del held[NULL_BLOCK]
            pool.check(held)

    def _known(self, chain: list[bytes], blocks: int) -> int:
        """How many leading blocks are enough known: all of them, or in groups with a window those in sight."""
        for group, pool in zip(self.groups, self._pools, strict=True):
            if group.window is None:
                blocks = next((i for i in range(blocks) if pool.find(chain[i]) is None), blocks)
        settled = False
        while not settled:
            settled = True
            for number in self._sliding:
                first = self.groups[number].first_seen(blocks * BLOCK_TOKENS)
                find = self._pools[number].find
                gap = next((i for i in range(blocks - 1, first - 1, -1) if find(chain[i]) is None), None)
                if gap is not None:
                    # Every longer prefix up to here sees the gap as well.
                    blocks, settled = gap, False
        return blocks


def _blocks(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)
