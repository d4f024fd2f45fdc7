"""A token trie of titles: a beginning that titles share is stored once, and read by a model once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os.path import commonprefix

import numpy as np


class TitleTrie:
    """The trie of N rows of token ids. Node 0 is the root; a parent comes before its children.

    Equal rows end at the same node, and a row may be a prefix of another.

    Attributes:
        tokens: the token at each node, (M,); -1 at the root.
        parents: the parent of each node, (M,); -1 at the root.
        depths: the depth of each node, (M,); 0 at the root.
        ends: the node where each row ends, (N,).
        below: how many rows pass through each node or end there, (M,).
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
        """Return the children of `node`."""
        return self._by_parent[self._first[node] : self._first[node + 1]]

    def rows_at(self, node: int) -> np.ndarray:
        """Return the indices of the rows that end at `node`, in increasing order."""
        return self._by_end[self._first_end[node] : self._first_end[node + 1]]

    def path(self, node: int) -> list[int]:
        """Return the nodes from `node` up to the root, both included."""
        nodes = [node]
        while nodes[-1]:
            nodes.append(int(self.parents[nodes[-1]]))
        return nodes

    def inner(self) -> np.ndarray:
        """Return the nodes with children: a model must read these to compute the probability of every row."""
        return np.flatnonzero(np.diff(self._first) > 0)

    def ancestry(self, nodes: np.ndarray) -> np.ndarray:
        """Return a mask, (n, n): whether the column's node is the row's node or one of its ancestors.

        Args:
            nodes: nodes in increasing order, (n,); all ancestors of each are among them.
        """
        place = np.full(len(self) + 1, -1)
        place[nodes] = np.arange(len(nodes))
        mask = np.eye(len(nodes), dtype=bool)
        for row, above in enumerate(place[self.parents[nodes]]):
            if above >= 0:
                mask[row] |= mask[above]
        return mask

    def totals(self, steps: np.ndarray) -> np.ndarray:
        """Sum `steps` (M,) over the path from the root to each node, (M,); the root's own step counts as 0."""
        sums = np.where(self.depths > 0, steps, 0.0)
        for depth in range(2, self.depths.max() + 1):
            here = self.depths == depth
            sums[here] += sums[self.parents[here]]
        return sums


def pieces(rows: Sequence[list[int]], limit: int) -> Iterator[tuple[np.ndarray, TitleTrie]]:
    """Cut rows into groups whose tries have at most `limit` nodes below the root, or one row each.

    Rows are grouped in sorted order, in which neighbours share the longest prefixes.

    Args:
        rows: token ids of each row.
        limit: maximum number of nodes below the root.

    Yields:
        The row indices of a group, and its trie.
    """
    order = sorted(range(len(rows)), key=lambda i: rows[i])
    group: list[int] = []
    size = 0
    for last, i in zip([-1, *order], order):  # -1 is not read: the first group is still empty
        shared = commonprefix([rows[last], rows[i]]) if group else []  # noqa: RUF071 - token lists, not paths
        new = len(rows[i]) - len(shared)
        if group and size + new > limit:
            yield np.array(group), TitleTrie([rows[j] for j in group])
            group, size, new = [], 0, len(rows[i])
        group.append(i)
        size += new
    if group:
        yield np.array(group), TitleTrie([rows[j] for j in group])


def _grouped(keys: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the indices sorted by key, and the place where each key 0 … n-1 begins among them (n + 1 places)."""
    order = np.argsort(keys, kind="stable")
    return order, np.searchsorted(keys[order], np.arange(n + 1))
