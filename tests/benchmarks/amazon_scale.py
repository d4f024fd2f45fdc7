"""Time and memory of load_amazon on synthetic reviews, beside a plain-Python version of the same steps.

    python tests/benchmarks/amazon_scale.py --rows 1_000_000 3_000_000 10_000_000

For each size: a CSV of heavy-tailed reviews; load_amazon (5-core, last_out, cold then cached) and, up to 10 million
rows, plain Python, each in a process of its own; equal results or an error. Prints one line per size, then what the 571
million reviews of Amazon Reviews 2023 would need, and exits with status 1 when a limit is missed (of speed and memory:
by the largest size that plain Python ran on).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
from peak_memory import peak_bytes

WHOLE = 571_000_000
PLAIN_UP_TO = 10_000_000
# Reviews per user and per item are about those of Books, the largest category.
PER_USER, PER_ITEM, TAIL = 3, 7, 2.5
MEMORY_LIMIT, SPEED_LIMIT, CACHED_LIMIT = 1.5, 10.0, 1.0
GROWTH_LIMIT = 1.15
CHUNK = 1_000_000


def generate(path: Path, rows: int, seed: int = 0) -> None:
    """Write user_id,parent_asin,rating,timestamp; users and items drawn as n * uniform ** TAIL, so a few have most."""
    import polars as pl

    rng = np.random.default_rng(seed)
    with open(path, "wb") as file:
        for start in range(0, rows, CHUNK):
            n = min(CHUNK, rows - start)
            users = (rows / PER_USER * rng.random(n) ** TAIL).astype(np.int64)
            items = (rows / PER_ITEM * rng.random(n) ** TAIL).astype(np.int64)
            frame = pl.DataFrame({"user": users, "item": items}).select(
                user_id="AE" + pl.col("user").cast(pl.String).str.zfill(26),
                parent_asin="B" + pl.col("item").cast(pl.String).str.zfill(9),
                rating=pl.Series(rng.integers(1, 6, n)).cast(pl.Float64),
                timestamp=pl.Series(rng.integers(10**12, 1_690_000_000_000, n)),
            )
            frame.write_csv(file, include_header=start == 0)


def plain_python(path: Path, k: int = 5) -> dict[str, list[tuple]]:
    """Dedupe, k-core and leave-one-out split with dictionaries and lists."""
    by_user: dict[str, list[tuple]] = {}
    with open(path) as file:
        next(file)
        for line in file:
            user, item, rating, time_ = line.rstrip("\n").split(",")
            by_user.setdefault(user, []).append((user, item, float(rating), int(time_)))
    kept = []
    for events in by_user.values():
        events.sort(key=lambda row: row[3])
        seen = set()
        for row in events:
            if row[1] not in seen:
                seen.add(row[1])
                kept.append(row)
    while True:
        users, items = Counter(row[0] for row in kept), Counter(row[1] for row in kept)
        core = [row for row in kept if users[row[0]] >= k and items[row[1]] >= k]
        if len(core) == len(kept):
            break
        kept = core
    parts: dict[str, list[tuple]] = {"train": [], "valid": [], "test": []}
    left = Counter(row[0] for row in kept)
    for row in kept:
        left[row[0]] -= 1
        parts[("test", "valid")[left[row[0]]] if left[row[0]] < 2 else "train"].append(row)
    return parts


def fingerprint(part, columns) -> str:
    """Hash of one part's rows in their order."""
    digest = hashlib.sha256()
    for row in columns(part):
        digest.update("{},{},{},{}\n".format(*row).encode())
    return digest.hexdigest()


def measure(engine: str, path: Path) -> dict:
    """Run one engine in this process; seconds, peak memory in GB and the hash of what came out."""
    started = time.perf_counter()
    if engine == "python":
        parts = plain_python(path)
        seconds = time.perf_counter() - started
        peak = peak_bytes() / 1e9
        rows, prints = sum(map(len, parts.values())), [fingerprint(part, iter) for part in parts.values()]
    else:
        from lwa_helpers.data.amazon import load_amazon

        started = time.perf_counter()
        warnings.simplefilter("ignore")  # there is no item file
        data = load_amazon(path.parent, path.stem)
        seconds = time.perf_counter() - started
        peak = peak_bytes() / 1e9
        parts = [data.train, data.valid, data.test]
        rows = sum(map(len, parts))
        prints = [fingerprint(part, lambda frame: frame.itertuples(index=False, name=None)) for part in parts]
    return {"seconds": seconds, "memory": peak, "rows": rows, "prints": prints}


def run(engine: str, path: Path, cache: Path) -> dict:
    """`measure` in a fresh process, whose scratch space is watched."""
    command = [sys.executable, __file__, "--engine", engine, "--file", str(path)]
    environment = os.environ | {"LWA_CACHE": str(cache), "PYTHONPATH": str(Path(__file__).parents[2])}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    disk = 0
    while process.poll() is None:
        disk = max(disk, used(cache))
        time.sleep(0.2)
    if process.returncode:
        raise SystemExit(f"{engine} on {path.name} ended with status {process.returncode}")
    return json.loads(process.stdout.read()) | {"disk": disk / 1e9}


def used(folder: Path) -> int:
    """Bytes in a folder that is being written to."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(place, name)).st_size
            except FileNotFoundError:
                continue
    return total


def compare(rows: int, folder: Path) -> dict:
    """Generate one size, run cold, cached and plain, and print the line."""
    path = folder / f"Reviews{rows}.csv"
    generate(path, rows)
    size = path.stat().st_size / 1e9
    cold, cached = (run("ours", path, folder / "cache") for _ in range(2))
    plain = run("python", path, folder / "cache") if rows <= PLAIN_UP_TO else None
    path.unlink()
    if any(other and other["prints"] != cold["prints"] for other in (cached, plain)):
        raise SystemExit(f"{rows} rows: the results differ")
    line = (
        f"{rows:>11,} rows, {size:5.2f} GB -> {cold['rows']:>10,} | "
        f"ours {cold['seconds']:7.2f} s {cold['memory']:5.2f} GB, "
        f"scratch {cold['disk']:5.2f} GB, again {cached['seconds']:5.2f} s"
    )
    if plain:
        speedup = plain["seconds"] / cold["seconds"]
        line += f" | plain Python {plain['seconds']:7.2f} s {plain['memory']:5.2f} GB | {speedup:4.1f}x"
    print(line, flush=True)
    return cold | {"n": rows, "file": size, "again": cached["seconds"], "speedup": plain and speedup}


def summary(results: list[dict]) -> int:
    """Print growth, extrapolation (straight line through smallest and largest size) and limits; the exit status."""
    smallest, largest = results[0], results[-1]
    judged = [result for result in results if result["speedup"]][-1:]
    failed = any(result["memory"] > MEMORY_LIMIT or result["speedup"] < SPEED_LIMIT for result in judged)
    failed |= any(result["again"] > CACHED_LIMIT for result in results)
    if len(results) > 1:
        print(f"{WHOLE:,} reviews, extrapolated:", end="")
        for key, unit in (
            ("seconds", "s"),
            ("memory", "GB of memory"),
            ("disk", "GB of scratch disk"),
            ("file", "GB of CSV"),
        ):
            rate = (largest[key] - smallest[key]) / (largest["n"] - smallest["n"])
            print(f" {largest[key] + rate * (WHOLE - largest['n']):,.0f} {unit}", end="," if key != "file" else "\n")
        slope = np.log(largest["seconds"] / smallest["seconds"]) / np.log(largest["n"] / smallest["n"])
        print(f"time grows as rows ** {slope:.2f} (limit {GROWTH_LIMIT})")
        failed |= bool(slope > GROWTH_LIMIT)
    print(f"limits: {MEMORY_LIMIT} GB, {SPEED_LIMIT}x, cached {CACHED_LIMIT} s: {'missed' if failed else 'kept'}")
    return int(failed)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000_000])
    parser.add_argument("--engine", choices=("ours", "python"), help=argparse.SUPPRESS)
    parser.add_argument("--file", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        print(json.dumps(measure(arguments.engine, arguments.file)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return summary([compare(rows, Path(folder)) for rows in sorted(arguments.rows)])


if __name__ == "__main__":
    sys.exit(main())
