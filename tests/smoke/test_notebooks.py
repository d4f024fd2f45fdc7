"""All five notebooks through the real runner with the real SmolLM2, at the smallest size."""

import json
import os
import re
import shutil
import subprocess
import sys
import zlib
from statistics import median

import pandas as pd
import pytest
from ollama_server import OllamaServer, by_score
from scipy.stats import spearmanr

from lwa_helpers.assets import embedded_file
from lwa_helpers.config import load_config
from lwa_helpers.paths import CACHE, PAPER, RESULTS, ROOT
from lwa_helpers.report.style import COLUMN_IN, TEXT_IN

pytestmark = pytest.mark.smoke
SMOKE = RESULTS / "smoke"


@pytest.fixture(scope="module")
def printed():
    """What `lwa reproduce --profile smoke` prints; stages that are current are skipped."""
    command = [sys.executable, "-m", "lwa_helpers.cli", "reproduce", "--profile", "smoke"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def page_width_inches(path):
    """Width of a PDF page from its MediaBox."""
    left, _, right, _ = map(float, re.search(rb"/MediaBox \[([^]]+)\]", path.read_bytes()).group(1).split())
    return (right - left) / 72


def manifests():
    return [json.loads(path.read_text()) for path in sorted((SMOKE / "manifests").glob("*.json"))]


def test_every_hypothesis_has_a_verdict(printed):
    for number in "1234":
        assert re.search(rf"H{number} (supported|refuted|undecided): .+ \[figures/\w+\.pdf\]", printed)


def test_the_manifests_say_what_made_the_results(printed):
    records = manifests()
    assert len(records) == 5
    for record in records:
        assert record["profile"] == "smoke" and re.fullmatch("[0-9a-f]{40}", record["commit"])
        assert record["packages"]["torch"] and record["device"] and record["seconds"] > 0
        assert re.fullmatch("[0-9a-f]{64}", record["records"]["data_hash"])
        for name, output in record["outputs"].items():
            assert (SMOKE / name).exists() and output["bytes"] > 0


def test_figures_have_acm_widths_and_no_type_3_fonts(printed):
    figures = sorted((SMOKE / "figures").glob("*.pdf"))
    assert len(figures) == 11
    for path in figures:
        assert min(abs(page_width_inches(path) - width) for width in (COLUMN_IN, TEXT_IN)) < 0.01, path
        assert b"/Type3" not in path.read_bytes(), path
        assert path.with_suffix(".png").stat().st_size > 5_000


def test_tables_are_booktabs(printed):
    tables = sorted(path.stem for path in (SMOKE / "tables").glob("*.tex"))
    assert tables == ["ablation", "dataset", "depths", "fisher_rivals", "main_results", "teacher_costs", "teachers"]
    for name in tables:
        assert r"\toprule" in (SMOKE / "tables" / f"{name}.tex").read_text()


def test_the_table_of_the_data_says_what_the_raw_ratings_say(printed):
    lines = embedded_file("ml-100k.inter").read_text().splitlines()[1:]
    events = [(user, item, int(time)) for user, item, _, time in (line.split("\t") for line in lines)]
    by_user = {}
    for user, item, time in sorted(events, key=lambda event: event[2]):
        by_user.setdefault(user, []).append((item, time))
    train = [event for sequence in by_user.values() for event in sequence[:-2]]
    test = [sequence[-1] for sequence in by_user.values()]
    halfway, middle = median(time for *_, time in events), median(time for _, time in test)
    counts = {item: [0, 0] for _, item, _ in events}
    for _, item, time in events:
        counts[item][time > halfway] += 1
    expected = {
        "users": 943, "items in the catalogue": 1682, "interactions": 100_000, "density": 1e5 / 943 / 1682,
        "median interactions per user": median(map(len, by_user.values())),
        "cold share of test items": sum(item not in dict(train) for item, _ in test) / 943,
        "popularity drift (Spearman)": spearmanr(*zip(*counts.values())).statistic,
        "training events after the median test event": sum(time > middle for _, time in train) / len(train),
    }  # fmt: skip
    table = dict(re.findall(r"^(.+) & (.+) \\\\$", (SMOKE / "tables" / "dataset.tex").read_text(), re.MULTILINE))
    shown = {name: float(table[name].replace(",", "")) for name in expected}
    assert shown == pytest.approx(expected, rel=0.01) and table["first / last event"] == "1997-09-20 / 1998-04-22"


def test_every_macro_of_the_paper_is_measured(printed):
    text = (PAPER / "main.tex").read_text()
    preamble = text[: text.index(r"\begin{document}")]
    others = [PAPER / f"{name}.tex" for name in re.findall(r"\\input\{(\w+)\}", preamble) if name != "results"]
    used = set(re.findall(r"\\([A-Z][A-Za-z]+)\{\}", re.sub(r"(?<!\\)%.*", "", text)))
    defined, *benchmarks = (
        dict(re.findall(r"\\newcommand\{\\(\w+)\}\{(.*)\}", path.read_text()))
        for path in (SMOKE / "results.tex", *others)
    )
    assert used <= defined.keys() | set().union(*benchmarks)
    measured = {name: number["text"] for record in manifests() for name, number in record["numbers"].items()}
    assert all(defined[name] == text for name, text in measured.items())
    elsewhere = {"LwaProfile", "RunMinutes", "QuickMinutes"}
    assert {
        name for name in defined if not re.fullmatch("H(One|Two|Three|Four)(Verdict|Sentence)", name)
    } == measured.keys() | elsewhere


def test_a_second_run_does_nothing(printed):
    done = subprocess.run(
        [sys.executable, "-m", "lwa_helpers.cli", "reproduce", "--profile", "smoke"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("is current") == 5 and " runs: " not in done.stdout


def test_the_student_recommends(printed, capsys):
    from lwa_helpers import BaseRecommender

    student = BaseRecommender(model_name=str(SMOKE / "models/student"))
    known, cold = (student.recommend(user_id=user, category="MovieLens", top_k=3) for user in ("1", "nobody"))
    assert [r.rank for r in known] == [1, 2, 3] and not any(r.cold for r in known) and all(r.cold for r in cold)


def test_a_server_fills_its_teachers_rows_and_a_missing_one_stays_marked(printed, tmp_path):
    """Notebook 05 in a copy of the run; speed and memory are what the server says of every model."""
    for name in ("notebooks", "paper", "constraints.txt", "embedded.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(SMOKE, tmp_path / "results/smoke", copy_function=os.symlink)
    (tmp_path / "cache").mkdir()
    for folder in CACHE.iterdir():
        if folder.name != "teachers":  # where answers are kept, which would not be asked for again
            (tmp_path / "cache" / folder.name).symlink_to(folder)
    model = by_score(lambda history, title: zlib.crc32(title.encode()) / 2**32)
    with OllamaServer({"llama3:latest": model}, version="0.12.11") as server:
        environment = os.environ | {
            "LWA_ROOT": str(tmp_path),
            "LWA_CACHE": str(tmp_path / "cache"),
            "OLLAMA_HOST": server.url,
        }
        command = [sys.executable, "-m", "lwa_helpers.cli", "reproduce", "--profile", "smoke", "--only", "05"]
        teachers = 'comparison.teachers=[smollm2-135m, "llama3:latest", qwen3]'
        done = subprocess.run(
            [*command, "--set", teachers], env=environment, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    settings = load_config("smoke").comparison
    data = tmp_path / "results/smoke/data"
    costs = pd.read_parquet(data / "teacher_costs.parquet").set_index("Teacher")
    assert costs.loc["qwen3"].isna().all()
    row = costs.loc["llama3:latest"]
    assert row["memory"] == pytest.approx(5137.025024) and row["speed"] == pytest.approx(50.0)
    assert row["first"] > 0 and 0 < row["median"] <= row["p95"] and row["price"] > 0
    answers = pd.read_parquet(data / "teacher_answers.parquet").query("teacher == 'llama3:latest'")
    assert answers["mode"].value_counts().to_dict() == {
        "labels": settings.n_users,
        "written": 2 * settings.written_users,
    }
    table = (tmp_path / "results/smoke/tables/teachers.tex").read_text()
    lines = {line.split(" & ")[0]: line.split(" & ")[1:] for line in table.splitlines() if " & " in line}
    assert lines["qwen3"][0] == "not reachable" and {cell.strip(" \\") for cell in lines["qwen3"][1:]} == {"--"}
    assert lines["llama3:latest"][0] == "labels" and lines["llama3:latest"][-1].startswith("0.00")
