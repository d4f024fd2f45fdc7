"""The title head: exact log p(title | history) from a trie of titles, read after a history that is read once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import zip_longest
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lwa_helpers.data.history_tokens import check_items, encode
from lwa_helpers.models.item_tokens import ITEM_END
from lwa_helpers.models.vocabulary import check_covered
from lwa_helpers.ranking.model_checks import check_positions, plain_model
from lwa_helpers.ranking.title_trie import TitleTrie, pieces
from lwa_helpers.ranking.tree_reader import TreeReader, check_tree

NO_TITLES = np.empty(0, dtype=np.int64), TitleTrie([])


class TitleRanker:
    """Exact log p(title + separator | header + history) for any causal LM of attention layers.

    A history is read once. Titles are read as a trie, so that shared beginnings are read once; a title's last token is
    never read. Titles with the same tokens have the same score. Items with equal scores rank in catalogue order.

    Whether the model follows a tree's attention mask is measured (see check_tree); a model that does not raises
    LwaError, and so does a prompt longer than the model has positions for.

    Args:
        model: a causal LM.
        tokenizer: the model's tokenizer.
        header: the text before every history.
        titles: the titles of the catalogue, in the order of the item indices.
        batch_size: number of histories that are read together; they have similar lengths.
        tokens_per_batch: maximum number of trie nodes that are read at a time, over all histories of a batch; a single
            title may exceed it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        header: str,
        titles: Sequence[str],
        batch_size: int = 4,
        tokens_per_batch: int = 512,
    ):
        self.model, self.tokenizer = plain_model(model).eval(), tokenizer
        self.titles = list(titles)
        self.batch_size, self.tokens_per_batch = batch_size, tokens_per_batch
        lines = [title + ITEM_END for title in self.titles]
        check_covered(tokenizer, lines)
        self.header, self.tokens = encode(tokenizer, header, lines)

    @cached_property
    def trie(self) -> TitleTrie:
        """The trie of all titles of the catalogue."""
        return TitleTrie(self.tokens)

    def prompt(self, history: Sequence[int]) -> list[int]:
        """Return the token ids of the header and a history.

        The header starts with the beginning-of-text token if the tokenizer adds one.

        Args:
            history: item indices, oldest first.

        Raises:
            ValueError: if an item index is outside the catalogue, or neither header nor history has a token.
        """
        check_items([history], len(self.tokens))
        ids = self.header + [token for item in history for token in self.tokens[item]]
        if not ids:
            raise ValueError("an empty history needs a header, or there is nothing for the first token to follow")
        return ids

    def scores(self, histories: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the log-probability of every title of the catalogue after each history, (B, N) float64."""
        every = self.score(histories, [range(len(self.tokens))] * len(histories))
        return every.reshape(len(histories), len(self.tokens))

    @torch.no_grad()
    def score(self, histories: Sequence[Sequence[int]], candidates: Sequence[Sequence[int]] | np.ndarray) -> np.ndarray:
        """Return the log-probability of each history's candidates, (B, C) float64.

        Args:
            histories: item indices of each history, oldest first.
            candidates: item indices to score after each history, C each.

        Raises:
            ValueError: if there is not one row of candidates per history, or the rows differ in length.
        """
        if len(candidates) != len(histories) or len({len(items) for items in candidates}) > 1:
            raise ValueError(f"need {len(histories)} rows of candidates, all of one length")
        out = np.zeros((len(histories), len(candidates[0]) if len(candidates) else 0))
        for users, reader in self._readers(histories):
            limit = self.tokens_per_batch // len(users)
            parts = [pieces([self.tokens[item] for item in candidates[user]], limit) for user in users]
            for together in zip_longest(*parts, fillvalue=NO_TITLES):
                for user, (columns, trie), total in zip(
                    users, together, read_tries(reader, [trie for _, trie in together])
                ):
                    out[user, columns] = total[trie.ends]
        return out

    @torch.no_grad()
    def search(
        self, histories: Sequence[Sequence[int]], k: int, beam: int = 64, exclude: Sequence[Sequence[int]] | None = None
    ) -> SearchResult:
        """Return the k most probable titles after each history, by beam search over the trie of the catalogue.

        At each step the search extends the `beam` most probable title prefixes. A title is never more probable than its
        prefixes, so a prefix less probable than the k-th title found so far is dropped without loss.

        Args:
            histories: item indices of each history, oldest first.
            k: number of titles to find.
            beam: number of prefixes that are extended, at least k.
            exclude: item indices to leave out, for each history; None leaves out none.

        Raises:
            ValueError: if k is below 1 or above the beam, if fewer than k items are left, or if `exclude` does not have
                one row per history.
        """
        exclude = exclude if exclude is not None else [()] * len(histories)
        if len(exclude) != len(histories):
            raise ValueError(f"need {len(histories)} rows of items left out, got {len(exclude)}")
        left = len(self.tokens) - max((len(set(items)) for items in exclude), default=0)
        if not 1 <= k <= min(beam, left):
            raise ValueError(
                f"k = {k} must be at least 1, at most the beam ({beam}) and the items that are left ({left})"
            )
        shape = len(histories), k
        found = SearchResult(np.zeros(shape, dtype=np.int64), np.zeros(shape), np.zeros(len(histories), dtype=bool))
        for users, reader in self._readers(histories):
            beams = [Beam(self.trie, k, beam, exclude[user]) for user in users]
            read_beams(reader, beams)
            for user, each in zip(users, beams):
                found.items[user], found.scores[user], found.exact[user] = each.result()
        return found

    def _readers(self, histories: Sequence[Sequence[int]]) -> Iterator[tuple[np.ndarray, TreeReader]]:
        """Yield groups of histories of similar length: their indices, and a reader of their prompts."""
        prompts = [self.prompt(history) for history in histories]
        order = np.argsort([len(prompt) for prompt in prompts], kind="stable")
        if prompts and self.tokens:
            self._check(prompts[order[-1]])
        for start in range(0, len(order), self.batch_size):
            users = order[start : start + self.batch_size]
            yield users, TreeReader(self.model, [prompts[user] for user in users])

    def _check(self, longest: list[int]) -> None:
        """Check that the model reads titles right after the longest prompt."""
        title = max(self.tokens, key=len)
        check_positions(self.model, len(longest) + len(title))
        check_tree(self.model, longest, title)


def read_tries(reader: TreeReader, tries: Sequence[TitleTrie]) -> list[np.ndarray]:
    """Return the log-probability of the path to each node of B tries, one trie after each prompt: B arrays (M,)."""
    inner = [trie.inner() for trie in tries]
    shape = len(tries), max(map(len, inner))
    tokens, depths = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    visible = np.broadcast_to(np.eye(shape[1], dtype=bool), (*shape, shape[1])).copy()
    for row, (trie, nodes) in enumerate(zip(tries, inner)):
        n = len(nodes)
        tokens[row, :n], depths[row, :n], visible[row, :n, :n] = (
            trie.tokens[nodes],
            trie.depths[nodes],
            trie.ancestry(nodes),
        )
    logits = reader.read(tokens, depths, visible)
    reader.forget()
    steps = []
    for trie, nodes, own in zip(tries, inner, logits):
        places = np.searchsorted(nodes, trie.parents[1:])
        steps.append(np.concatenate([[0.0], log_probabilities(own, places, trie.tokens[1:])]))
    return [trie.totals(step) for trie, step in zip(tries, steps)]


def log_probabilities(logits: Tensor, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the log-softmax of logits (Q, V) at n pairs of row and token, (n,) float64."""
    at, logits = torch.from_numpy(rows).to(logits.device), logits.float()
    chosen = logits[at, torch.from_numpy(tokens).to(logits.device)]
    return (chosen - logits.logsumexp(1)[at]).double().cpu().numpy()


class SearchResult(NamedTuple):
    """The result of a search.

    Attributes:
        items: the titles found, as item indices, best first, (B, k).
        scores: their log-probabilities, (B, k).
        exact: whether these are certainly the k most probable titles, (B,).
    """

    items: np.ndarray
    scores: np.ndarray
    exact: np.ndarray


class Beam:
    """The beam search of one history: the title prefixes to extend, and the k best titles found so far.

    Args:
        trie: the trie of the catalogue.
        k: number of titles to find.
        width: maximum number of prefixes to extend.
        left_out: item indices to leave out.

    Attributes:
        live: trie nodes of the prefixes, all at the same depth, (n,).
        scores: their log-probabilities, (n,).
        paths: which of the R tokens read so far lie on the path to each, (n, R).
        titles: the best titles found, as pairs of negative log-probability and item index, at most k.
        dropped: the highest log-probability of a prefix that did not fit into the beam.
    """

    def __init__(self, trie: TitleTrie, k: int, width: int, left_out: Sequence[int]):
        self.trie, self.k, self.width, self.left_out = trie, k, width, set(left_out)
        self.gone = Counter(node for item in self.left_out for node in trie.path(trie.ends[item]))
        self.live, self.scores, self.paths = np.zeros(1, int), np.zeros(1), np.zeros((1, 0), bool)
        self.titles: list[tuple[float, int]] = []
        self.dropped = -np.inf

    @property
    def bound(self) -> float:
        """The log-probability of the k-th title found; -inf while there are fewer."""
        return -self.titles[-1][0] if len(self.titles) == self.k else -np.inf

    def advance(self, logits: Tensor, read: int) -> None:
        """Extend the prefixes by one token.

        Args:
            logits: logits after the live nodes, (n, V).
            read: how many tokens the last step read, padding included: tokens R to R + read - 1 of all those read since
                the prompt. The live nodes come first among them.
        """
        kids_of = [
            [kid for kid in self.trie.children(node) if self.trie.below[kid] > self.gone[kid]] for node in self.live
        ]
        owner = np.repeat(np.arange(len(kids_of)), [len(some) for some in kids_of])
        kids = np.array([kid for some in kids_of for kid in some], dtype=np.int64)
        scores = self.scores[owner] + log_probabilities(logits, owner, self.trie.tokens[kids])
        for kid, score in zip(kids, scores):
            self.titles += [(-score, item) for item in self.trie.rows_at(kid) if item not in self.left_out]
        self.titles = sorted(self.titles)[: self.k]
        longer = np.array([len(self.trie.children(kid)) > 0 for kid in kids], dtype=bool)
        best = np.argsort(-scores, kind="stable")
        best = best[longer[best] & (scores[best] >= self.bound)]
        self.dropped = max([self.dropped, *scores[best[self.width :][:1]]])
        best = best[: self.width]
        own = np.eye(len(self.live), read, dtype=bool)
        self.paths = np.concatenate([self.paths, own], 1)[owner[best]]
        self.live, self.scores = kids[best], scores[best]

    def result(self) -> tuple[list[int], list[float], bool]:
        """Return the items found, their log-probabilities, and whether no better title can have been dropped."""
        return [item for _, item in self.titles], [-score for score, _ in self.titles], self.dropped < self.bound


def read_beams(reader: TreeReader, beams: Sequence[Beam]) -> None:
    """Run the searches of B prompts in parallel until no prefix is left to extend."""
    read = 0
    while width := max(len(beam.live) for beam in beams):
        tokens, depths = np.zeros((len(beams), width), int), np.zeros((len(beams), width), int)
        visible = np.zeros((len(beams), width, read + width), bool)
        visible[:, range(width), range(read, read + width)] = True
        searching = [(row, beam, len(beam.live)) for row, beam in enumerate(beams) if len(beam.live)]
        for row, beam, n in searching:
            tokens[row, :n], depths[row, :n] = beam.trie.tokens[beam.live], beam.trie.depths[beam.live]
            visible[row, :n, :read] = beam.paths
        logits = reader.read(tokens, depths, visible)
        for row, beam, n in searching:
            beam.advance(logits[row, :n], width)
        read += width
    reader.forget()
