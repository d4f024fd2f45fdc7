"""A token trie of titles: what titles share at their beginning is held, and read by a model, once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os.path import commonprefix

import numpy as np


class TitleTrie:
    """The trie of N rows of token ids. Node 0 is the root; a parent comes before its children.

    tokens, parents, depths (M,): what stands at each node (root: -1, -1, 0); ends (N,): the node where each row ends;
    below (M,): how many rows pass or end there. Equal rows end at one node; a row may end inside another.
    """

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        known: dict[tuple[int, int], int] = {}
        nodes, ends, below = [(-1, -1, 0)], [], [0]
        for row in rows:
            node, below[0] = 0, below[0] + 1
            for depth, token in enumerate(row, start=1):
                child = known.setdefault((node, token), len(nodes))
                if child == len(nodes):
                    nodes.append((token, node, depth))
                    below.append(0)
                node = child
                below[node] += 1
            ends.append(node)
        self.tokens, self.parents, self.depths = np.array(nodes).T
        self.ends, self.below = np.array(ends, dtype=np.int64), np.array(below)
        self._by_parent, self._first = _grouped(self.parents, len(nodes))
        self._by_end, self._first_end = _grouped(self.ends, len(nodes))

    def __len__(self) -> int:
        return len(self.tokens)

    def children(self, node: int) -> np.ndarray:
        """The nodes right below `node`."""
        return self._by_parent[self._first[node] : self._first[node + 1]]

    def rows_at(self, node: int) -> np.ndarray:
        """The rows that end at `node`, in their order."""
        return self._by_end[self._first_end[node] : self._first_end[node + 1]]

    def path(self, node: int) -> list[int]:
        """The nodes from `node` up to the root, both included."""
        nodes = [node]
        while nodes[-1]:
            nodes.append(int(self.parents[nodes[-1]]))
        return nodes

    def inner(self) -> np.ndarray:
        """The nodes with children: what a model must read to know the probability of every row."""
        return np.flatnonzero(np.diff(self._first) > 0)

    def ancestry(self, nodes: np.ndarray) -> np.ndarray:
        """Mask (n, n): whether the column's node lies on the path from the root to the row's node, both included.

        nodes (n,) rising, with the ancestors of each.
        """
        place = np.full(len(self) + 1, -1)
        place[nodes] = np.arange(len(nodes))
        mask = np.eye(len(nodes), dtype=bool)
        for row, above in enumerate(place[self.parents[nodes]]):
            if above >= 0:
                mask[row] |= mask[above]
        return mask

    def totals(self, steps: np.ndarray) -> np.ndarray:
        """Sum of steps (M,) over the path from the root, whose own step counts as 0, to each node: (M,)."""
        sums = np.where(self.depths > 0, steps, 0.0)
        for depth in range(2, self.depths.max() + 1):
            here = self.depths == depth
            sums[here] += sums[self.parents[here]]
        return sums


def pieces(rows: Sequence[Sequence[int]], limit: int) -> Iterator[tuple[np.ndarray, TitleTrie]]:
    """Cut rows into groups whose tries have at most `limit` nodes below the root, or one row each.

    Rows are taken in sorted order, in which neighbours share most. Yields the row indices of a group and its trie.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    group: list[int] = []
    size = 0
    for last, i in zip([None, *order], order):
        new = len(rows[i]) - len(commonprefix([rows[last], rows[i]]) if group else [])
        if group and size + new > limit:
            yield np.array(group), TitleTrie([rows[j] for j in group])
            group, size, new = [], 0, len(rows[i])
        group.append(i)
        size += new
    if group:
        yield np.array(group), TitleTrie([rows[j] for j in group])


def _grouped(keys: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices ordered by key, and where each key 0 … n-1 begins among them (n + 1 places)."""
    order = np.argsort(keys, kind="stable")
    return order, np.searchsorted(keys[order], np.arange(n + 1))
