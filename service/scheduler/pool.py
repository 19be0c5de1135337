"""The blocks of one KV group: who owns them, and which of them hold something that can be found again."""

from collections import Counter, OrderedDict
from collections.abc import Callable

from service.core import Pattern

BLOCK_TOKENS = 16
"""Tokens of a block."""

NULL_BLOCK = 0
"""The block that nobody owns: stands for tokens out of the window, and for padding."""


class BlockPool:
    """Reference counts and contents of blocks 1 … `size`.

    Invariant: a block is owned (by one sequence or several), idle (owned by nobody but known by its content)
    or free. Idle blocks are handed out when no free one is left, least recently used first.
    """

    def __init__(self, blocks: int) -> None:
        if blocks < 2:
            raise ValueError(
                f"a pool of {blocks} blocks holds nothing beside the null block; give it 2 or more"
            )
        self.size = blocks - 1
        self._owners = [0] * blocks
        self._free = list(range(self.size, NULL_BLOCK, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._known: dict[bytes, int] = {}
        self._contents: dict[int, tuple[bytes, Pattern]] = {}

    @property
    def available(self) -> int:
        """Blocks that `take` could hand out one after another."""
        return len(self._free) + len(self._idle)

    @property
    def idle(self) -> int:
        """Blocks that nobody owns but whose content is known."""
        return len(self._idle)

    def owners(self, block: int) -> int:
        """How many sequences hold the block."""
        return self._owners[block]

    def find(self, digest: bytes) -> int | None:
        """The block with that content."""
        return self._known.get(digest)

    def take(self) -> int:
        """A block for one owner; its old content is forgotten. Only while something is `available`."""
        if self._free:
            block = self._free.pop()
        else:
            block, _ = self._idle.popitem(last=False)
            self._unknow(block)
        self._owners[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more owner for a known block."""
        self._idle.pop(block, None)
        self._owners[block] += 1

    def drop(self, block: int) -> bool:
        """One owner less; True if that makes the block free."""
        self._owners[block] -= 1
        if self._owners[block]:
            return False
        if block in self._contents:
            self._idle[block] = None
            return False
        self._free.append(block)
        return True

    def publish(self, block: int, digest: bytes, pattern: Pattern) -> None:
        """From now on an owned block can be found. If another one has that content already, it stays private."""
        if block not in self._contents and self._known.setdefault(digest, block) == block:
            self._contents[block] = (digest, pattern)

    def withdraw(self, block: int) -> None:
        """From now on the block can't be found; owners keep it."""
        if block in self._contents:
            self._unknow(block)
            if block in self._idle:
                del self._idle[block]
                self._free.append(block)

    def withdraw_all(self, stale: Callable[[Pattern], bool]) -> None:
        """Withdraw every block of patterns that are stale."""
        for block in [block for block, (_, pattern) in self._contents.items() if stale(pattern)]:
            self.withdraw(block)

    def check(self, owned: Counter[int]) -> None:
        """Compare with what the tables of all sequences hold.

        Raises:
            AssertionError: a block is lost, in two places, or counted wrongly.
        """
        owners = {block: count for block, count in enumerate(self._owners) if count}
        assert owners == owned, f"owners {owners}, tables hold {dict(owned)}"
        places = Counter([*self._free, *self._idle, *owned])
        assert places == Counter(range(1, self.size + 1)), (
            f"{len(self._free)} free + {len(self._idle)} cached + {len(owned)} owned of {self.size} blocks"
        )
        assert self._idle.keys() <= self._contents.keys(), "an unknown block is cached"
        known = {block: digest for digest, block in self._known.items()}
        assert known == {block: digest for block, (digest, _) in self._contents.items()}, "two books differ"

    def _unknow(self, block: int) -> None:
        digest, _ = self._contents.pop(block)
        del self._known[digest]
