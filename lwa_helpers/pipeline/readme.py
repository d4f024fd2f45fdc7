"""The README's table of claims, written from published numbers, never by hand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from lwa_helpers import files, paths
from lwa_helpers.errors import LwaError

START, END = "<!-- claims: written by `lwa publish` -->", "<!-- end of claims -->"


def claims_table(manifest: dict[str, Any]) -> str:
    """Make a Markdown table of the claims in paper/claims.yaml.

    Args:
        manifest: a run's manifest.json.

    Returns:
        A line for each claim: claim, notebook, figure, command, minutes, measured value.

    Raises:
        LwaError: when a claim names a number that the run did not measure.
    """
    claims = yaml.safe_load((paths.PAPER / "claims.yaml").read_text(encoding="utf-8"))
    values = {
        name: str(number["text"]).replace("$-$", "−").replace("\\", "") for name, number in manifest["numbers"].items()
    }
    values |= {name: verdict["outcome"] for name, verdict in manifest["verdicts"].items()}
    profile = manifest["profile"]
    dirty = " with uncommitted changes" if manifest["dirty"] else ""
    commits = ", ".join(f"`{commit[:10]}`" for commit in manifest["commit"].split(", "))
    origin = f"`{profile}` profile, seed {manifest['seed']}, {manifest['device']}, commit {commits}{dirty}"
    rows = [
        f"Measured: {origin}. Brackets hold 95 % intervals.",
        "",
        "| claim | notebook | figure | command | minutes | measured |",
        "|---|---|---|---|---|---|",
    ]
    for entry in claims:
        notebook, figure = entry["notebook"], entry["figure"]
        try:
            claim, measured = (entry[key].format_map(values) for key in ("claim", "measured"))
        except KeyError as missing:
            raise LwaError(f"paper/claims.yaml names {missing}, which no notebook of this run measured") from None
        minutes = manifest["notebooks"][notebook]["seconds"] / 60
        command = f"`lwa reproduce --profile {profile} --only {notebook[:2]}`"
        rows.append(
            f"| {claim} | [{notebook[:2]}](notebooks/{notebook}.ipynb) | [{figure}](figures/{figure}.png) | {command} "
            f"| {minutes:.1f} | {measured} |"
        )
    return "\n".join(rows)


def write_claims(readme: Path, manifest: dict[str, Any]) -> None:
    """Replace the README's block of claims. Raises LwaError when its two markers are not there."""
    write_block(readme, START, END, claims_table(manifest))


def write_block(readme: Path, start: str, end: str, body: str) -> None:
    """Replace what stands between two markers of the README. Raises LwaError when they are not there."""
    text = readme.read_text(encoding="utf-8")
    block = re.compile(re.escape(start) + ".*?" + re.escape(end), re.DOTALL)
    if not block.search(text):
        raise LwaError(f"{readme} lacks the markers {start} … {end}, between which a table is written")
    with files.atomic_write(readme) as temporary:
        temporary.write_text(block.sub(lambda _: f"{start}\n{body}\n{end}", text), encoding="utf-8")
