"""Time of both ranking heads, and of the title head's search for the 10 best, beside the naive loop that reads
prompt + title from scratch for every title, in one run. The item head reads the same history as item tokens.

    OMP_NUM_THREADS=2 python tests/benchmarks/ranking_speed.py [--histories 110 28 220] [--catalogues 100 400 2420]
                                                               [--rounds 3]

float32; titles are words drawn from MovieLens titles, about 10 tokens each, so they share little: the trie's worst
case. Systems take turns within a round; the first rows hold the median of the rounds, the others are timed once. The
first history length is timed for every catalogue, the first catalogue for every history length. The naive loop is timed
on 100 titles at most and scaled up. Errors are against the naive loop in float64 on the first titles. Writes
results/benchmarks/ranking_speed.csv, a manifest and a figure beside it; exits with status 1 when a title's log
probability is off by more than 1e-4 or a ratio misses its target.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import time

import numpy as np
import pandas as pd
import torch
from row_file import keep_record

from lwa_helpers.data.history_tokens import Reading
from lwa_helpers.data.movielens import load_movielens
from lwa_helpers.data.prompts import Prompt
from lwa_helpers.files import atomic_write
from lwa_helpers.models.item_tokens import with_item_tokens
from lwa_helpers.models.language_model import ItemTokens, LanguageModel
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.paths import RESULTS
from lwa_helpers.ranking.item_head import ItemRanker
from lwa_helpers.ranking.title_head import TitleRanker
from lwa_helpers.ranking.title_trie import pieces
from lwa_helpers.report import figures

FILE = RESULTS / "benchmarks" / "ranking_speed.csv"
TITLE_TOKENS, NAIVE_TITLES, CHECKED, TOP, TOLERANCE = 10, 100, 40, 10, 1e-4
PROMPT = Prompt("Films this person watched, in order:\n")
TARGETS = [
    ("naive", "title", 0, 8.0),
    ("title", "item", 0, 8.0),
    ("title", "item", -1, 100.0),
]  # slow, fast, catalogue, ratio


def made_titles(lm: LanguageModel, n: int, seed: int) -> list[str]:
    """n distinct titles of TITLE_TOKENS tokens (separator included) as nearly as whole words allow."""
    words = sorted({word for title in load_movielens().titles for word in title.split()})
    rng, titles = np.random.default_rng(seed), {}
    while len(titles) < n:
        title = words[rng.integers(len(words))]
        while len(lm.tokenizer(title + "\n")["input_ids"]) < TITLE_TOKENS:
            title += " " + words[rng.integers(len(words))]
        titles[title] = None
    return list(titles)


def history_of(ranker: TitleRanker, tokens: int) -> list[int]:
    """The first items that make a prompt of at least `tokens` tokens."""
    return next(list(range(n)) for n in range(len(ranker.titles)) if len(ranker.prompt(range(n))) >= tokens)


@torch.no_grad()
def naive(ranker: TitleRanker, history: list[int], items: range, model: torch.nn.Module | None = None) -> np.ndarray:
    """log p of each title by a forward pass over prompt and title, logits only where a title token is predicted."""
    prompt, out = ranker.prompt(history), []
    for item in items:
        tokens = torch.tensor(ranker.tokens[item])
        ids = torch.tensor([prompt + ranker.tokens[item]])
        logits = (model or ranker.model)(input_ids=ids, use_cache=False, logits_to_keep=len(tokens) + 1).logits[0, :-1]
        out.append(logits.log_softmax(-1).gather(1, tokens[:, None]).sum().item())
    return np.array(out)


def timed(call) -> tuple[float, np.ndarray]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


class Bench:
    """Both heads over one made catalogue."""

    def __init__(self, sizes: list[int], rounds: int, seed: int):
        self.lm, self.rounds, self.rows = load_teacher("smollm2-135m"), rounds, []
        self.titles = made_titles(self.lm, max(sizes), seed)
        self.vectors = torch.randn(
            max(sizes), self.lm.model.config.hidden_size, generator=torch.Generator().manual_seed(seed)
        )
        self.exact = copy.deepcopy(self.lm.model).double()

    def measure(self, tokens: int, n: int) -> None:
        """One history of about `tokens` tokens, a catalogue of n titles."""
        titles, rows = self.titles[:n], self.vectors[:n]
        title = TitleRanker(self.lm.model, self.lm.tokenizer, PROMPT.header, titles)
        history = history_of(title, tokens)
        lm = with_item_tokens(self.lm, titles, rows, rows, ItemTokens(titles))
        item = ItemRanker(lm, Reading.of(titles, lm, PROMPT))
        some = range(min(n, NAIVE_TITLES))
        calls = {
            "naive": lambda: naive(title, history, some),
            "title": lambda: title.scores([history])[0],
            "search": lambda: title.search([history], TOP),
            "item": lambda: item.scores([history])[0],
        }
        title.score([history], [range(20)])
        item.scores([history])
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        results = {}
        for _ in range(1 if self.rows else self.rounds):
            for name, call in calls.items():
                took, results[name] = timed(call)
                seconds[name].append(took * (n / len(some) if name == "naive" else 1))
        exact = naive(title, history, range(CHECKED), self.exact)
        error = {name: np.abs(results[name][:CHECKED] - exact).max() for name in ("naive", "title")}
        found, best = results["search"], np.argsort(-results["title"], kind="stable")[:TOP]
        print(
            f"search sure of its {TOP} best: {found.exact[0]}; "
            f"the same as by scoring all: {(found.items[0] == best).all()}"
        )
        self.add(title, history, n, {name: statistics.median(values) for name, values in seconds.items()}, error)

    def add(
        self, title: TitleRanker, history: list[int], n: int, seconds: dict[str, float], error: dict[str, float]
    ) -> None:
        """A row for each system."""
        prompt, rows = len(title.prompt(history)), title.tokens[:n]
        tries = sum(len(trie.inner()) for _, trie in pieces(rows, title.tokens_per_batch))
        read = {
            "naive": sum(prompt + len(row) for row in rows),
            "title": prompt - 1 + tries,
            "search": np.nan,
            "item": len(history),
        }
        for name, took in seconds.items():
            self.rows.append(
                {
                    "system": name,
                    "history_tokens": prompt,
                    "items": n,
                    "tokens_read": read[name],
                    "seconds": took,
                    "ratio_to_naive": seconds["naive"] / took,
                    "token_ratio": read["naive"] / read[name],
                    "max_error": error.get(name, np.nan),
                }
            )
        with atomic_write(FILE) as path:
            pd.DataFrame(self.rows).assign(threads=torch.get_num_threads()).to_csv(path, index=False)
        print(pd.DataFrame(self.rows[-4:]).round(5).to_string(index=False, header=len(self.rows) == 4), flush=True)


def check(frame: pd.DataFrame, sizes: list[int]) -> bool:
    """Print each target beside what was measured; whether all hold."""
    first = frame[frame.history_tokens == frame.history_tokens.iloc[0]].set_index(["system", "items"]).seconds
    error = frame[frame.system == "title"].max_error.max()
    held = error <= TOLERANCE
    print(f"largest error of a title's log probability: {error:.1e}, at most {TOLERANCE:.0e}: {held}")
    for slow, fast, size, target in TARGETS:
        ratio = first[slow, sizes[size]] / first[fast, sizes[size]]
        held &= ratio >= target
        print(
            f"{sizes[size]} items: {fast} is {ratio:.1f} times as fast as {slow}, "
            f"target {target:.0f}: {ratio >= target}"
        )
    return held


def main(options: argparse.Namespace) -> int:
    began, bench = time.perf_counter(), Bench(options.catalogues, options.rounds, options.seed)
    for n in options.catalogues:
        bench.measure(options.histories[0], n)
    for tokens in options.histories[1:]:
        bench.measure(tokens, options.catalogues[0])
    frame = pd.read_csv(FILE)
    figures.ranking_cost(frame).savefig(FILE.with_suffix(".pdf"))
    keep_record(FILE, vars(options), began, model_hash=bench.lm.sha256)
    return 0 if check(frame, options.catalogues) else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--histories", type=int, nargs="+", default=[110, 28, 220], help="tokens")
    parser.add_argument("--catalogues", type=int, nargs="+", default=[100, 400, 2420], help="titles, rising")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0, help="of titles and item vectors")
    sys.exit(main(parser.parse_args()))
