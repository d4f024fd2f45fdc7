"""What does a teacher go by? Memorised titles, the order of the history, the words of titles. MovieLens, full ranking.

    python tests/benchmarks/probes.py [--profile quick] [--users 200] [--titles 600] [--set data.reading=items]

Memorised: the untuned model completes a title from the first half of its words, token by token the most probable one;
beside it the same beginnings with the second half of another title, which nobody can have memorised, and the year
alone.

Order and words: the tuned teacher of results/<profile> (notebook 02, --set data.reading=titles) ranks the catalogue for
the same users from histories as they are, in random order, with the newest title left in place, and with every title
replaced by four numbers of its own. Writes results/<profile>/probes.csv, and a manifest beside it.
"""

from __future__ import annotations

import argparse
import re
import time
from itertools import islice, product

import numpy as np
import pandas as pd
import tuned_run
from row_file import keep_record

from lwa_helpers.data.history_tokens import Reading
from lwa_helpers.data.loading import load_data
from lwa_helpers.data.prompts import prompt_for
from lwa_helpers.errors import LwaError
from lwa_helpers.evaluation.baselines import Popularity
from lwa_helpers.evaluation.metrics import ndcg_at_k, rank_of_target
from lwa_helpers.evaluation.protocol import Cases, cases, shuffled
from lwa_helpers.evaluation.statistics import mean_interval, paired_difference
from lwa_helpers.files import atomic_write
from lwa_helpers.models.language_model import LanguageModel
from lwa_helpers.models.loading import load_teacher
from lwa_helpers.paths import results_dir
from lwa_helpers.ranking.item_head import ItemRanker
from lwa_helpers.teachers.memorised import memorised


def rates(lm: LanguageModel, titles: list[str], header: str, seed: int) -> list[dict]:
    """Rates of completion of real titles, of titles put together from two, and of the year of a title."""
    names = {"title": "second half of a title", "control": "of another title", "year": "year of a title"}
    found = {name: hits.astype(float) for name, hits in memorised(lm, titles, header, seed).items() if len(hits)}
    return [
        row("memorised: " + names[name], *mean_interval(hits, seed=seed), len(hits)) for name, hits in found.items()
    ]


def histories_probed(histories: list[list[int]], seed: int) -> dict[str, list[list[int]]]:
    """The histories as they are, shuffled, and shuffled but for the newest title."""
    return {
        "as they are": histories,
        "shuffled": shuffled(histories, seed),
        "shuffled, newest in place": shuffled(histories, seed, 1),
    }


def anonymous(titles: list[str]) -> list[str]:
    """As many different titles without a word, such as "101 2 3 2".

    The numbers are those that stand in titles, so that a cut vocabulary has them.
    """
    first = sorted({match[0] for title in titles if (match := re.match(r"\d+(?=\s|$)", title))})
    later = sorted({number for title in titles for number in re.findall(r"(?<=\S) (\d+)(?=\s|$)", title)})
    made = [" ".join(numbers) for numbers in islice(product(first, later, later, later), len(titles))]
    if len(made) < len(titles):
        raise LwaError(f"{len(first)} and {len(later)} numbers in the titles do not make {len(titles)} titles of four")
    return made


def ndcg(system, eval_cases: Cases, histories: list[list[int]]) -> np.ndarray:
    """NDCG@10 of each case for what a system reads, (B,); all that the user has seen is left out, read or not."""
    return ndcg_at_k(rank_of_target(system.scores(histories), eval_cases.targets, eval_cases.histories), 10)


def row(probe: str, value: float, low: float, high: float, n: int) -> dict:
    return {"probe": probe, "value": value, "low": low, "high": high, "n": n}


def probe_teacher(config, data, users: int) -> list[dict]:
    """NDCG@10 under each change, and its paired difference to the histories as they are."""
    lm, every, cut = tuned_run.tuned_teacher(config), cases(data), config.evaluation
    some = np.sort(np.random.default_rng(config.seed).permutation(len(every.targets))[:users])
    eval_cases = Cases(*([values[i] for i in some] for values in every[:2]), every.targets[some])
    newest = [history[-cut.history_items :] for history in eval_cases.histories]
    ranker, nameless = (
        ItemRanker(lm, Reading.of(titles, lm, prompt_for(data.name)), cut.batch_size, cut.bf16)
        for titles in (data.titles, anonymous(data.titles))
    )
    probed = histories_probed(newest, config.seed)
    found = {name: ndcg(ranker, eval_cases, histories) for name, histories in probed.items()}
    found["numbers for titles"] = ndcg(nameless, eval_cases, newest)
    found["popularity"] = ndcg(Popularity().fit(data), eval_cases, newest)
    rows = [row("teacher, NDCG@10: " + name, *mean_interval(v, seed=config.seed), len(v)) for name, v in found.items()]
    base = found.pop("as they are")
    changes = {name: paired_difference(values, base, seed=config.seed) for name, values in found.items()}
    return rows + [row("difference: " + name, *change, len(base)) for name, change in changes.items()]


def main(options: argparse.Namespace) -> None:
    began, config = time.perf_counter(), tuned_run.settings(options)
    data = load_data(config.data)
    chosen = np.random.default_rng(config.seed).permutation(len(data.titles))[: options.titles]
    titles = [data.titles[i] for i in chosen]
    untuned = load_teacher(config.teacher.model)
    rows = rates(untuned, titles, prompt_for(data.name).header, config.seed)
    frame = pd.DataFrame(rows + probe_teacher(config, data, options.users))
    file = results_dir(options.profile) / "probes.csv"
    with atomic_write(file) as path:
        frame.to_csv(path, index=False)
    keep_record(file, vars(options), began, config, data_hash=data.sha256, model_hash=untuned.sha256)
    print(frame.round(4).to_string(index=False))


if __name__ == "__main__":
    parser = tuned_run.parser(__doc__)
    parser.add_argument("--users", type=int, default=200)
    parser.add_argument("--titles", type=int, default=600)
    main(parser.parse_args())
