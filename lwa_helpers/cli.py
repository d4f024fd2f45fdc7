"""The `lwa` command."""

from __future__ import annotations

import errno
import gc
import io
import json
import os
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.exceptions import TyperException

from lwa_helpers import files, paths
from lwa_helpers.config import PROFILES
from lwa_helpers.errors import LwaError
from lwa_helpers.pipeline.overrides import parse_overrides

INTERRUPTED = 130  # 128 + SIGINT, as shells have it

app = typer.Typer(
    help="Reproduce, publish and compare the experiments.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data = typer.Typer(help="Fetch datasets, convert the embedded models.", no_args_is_help=True)
app.add_typer(data, name="data")


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after `lwa`; those of this process by default.

    Returns:
        The exit status. 2 stands for a problem that the user can fix, whose message is on stderr.
    """
    if argv is None:
        _own_the_process()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace" if stream is sys.stdout else "backslashreplace")
    command = typer.main.get_command(app)
    try:
        with files.explained(paths.ROOT):
            return command.main(sys.argv[1:] if argv is None else argv, prog_name="lwa", standalone_mode=False) or 0
    except LwaError as error:
        print(f"lwa: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        print("lwa: interrupted; finished notebooks keep their results", file=sys.stderr)
        return INTERRUPTED
    except TyperException as error:
        error.show()  # type: ignore[attr-defined]  # all that parsing raises can be shown; the public base class is silent on it
        return error.exit_code


class _Lasting(io.FileIO):
    """A standard stream whose reader may go away (`| head`, a closed terminal): what follows is written nowhere."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def _own_the_process() -> None:
    """Make warnings one plain line each, and let nothing that happens to stdout or stderr end a run of hours."""
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:  # it was closed: the next file that is opened would take its place, and what is printed
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
        if descriptor:
            old = getattr(sys, name)
            lasting = io.BufferedWriter(_Lasting(descriptor, "w", closefd=False))
            encoding, by_line = (old.encoding, old.line_buffering) if old else ("utf-8", False)
            setattr(sys, name, io.TextIOWrapper(lasting, encoding, line_buffering=by_line))


def _at_home(path: str) -> str:
    """Return a path in which ~ is the user's home, which shells leave alone in --model=~/x."""
    return os.path.expanduser(path)


@app.command()
def reproduce(
    profile: Annotated[str, typer.Option(help=", ".join(PROFILES))] = "quick",
    only: Annotated[str | None, typer.Option(metavar="02,03", help="only these notebooks")] = None,
    force: Annotated[bool, typer.Option("--force", help="run current ones too")] = False,
    publish: Annotated[bool, typer.Option("--publish", help="publish the results afterwards")] = False,
    settings: Annotated[
        list[str], typer.Option("--set", metavar="KEY=VALUE", help="a setting, e.g. data.name=All_Beauty")
    ] = [],  # noqa: B006 - typer reads it and never changes it
) -> None:
    """Run the notebooks that are stale, in order."""
    from lwa_helpers.pipeline.reproduce import reproduce

    reproduce(profile, parse_overrides(settings), only, force, publish)


@app.command()
def study(
    name: Annotated[str, typer.Argument(help="a file of lwa_helpers/configs/studies, or the path of a .yaml file")],
    only: Annotated[
        list[str], typer.Option("--only", metavar="POINT", help="only this point or run (deeper/seed-1)")
    ] = [],  # noqa: B006
    engine: Annotated[str, typer.Option(help="local, ray or slurm")] = "local",
    workers: Annotated[int, typer.Option(help="runs at a time")] = 1,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="print what would run, why, and for how long")] = False,
    run: Annotated[
        str | None, typer.Option("--run", metavar="POINT/SEED", help="run this one here", hidden=True)
    ] = None,
) -> None:
    """Run the notebooks of every point of a study with every seed, as far as they are stale."""
    from lwa_helpers.pipeline.studies import run_one, run_study

    if run is not None:
        run_one(name, run)
    else:
        run_study(name, only, engine, workers, dry_run)


@app.command()
def publish(profile: str) -> None:
    """Copy a profile's results to figures/ and paper/."""
    from lwa_helpers.pipeline.publish import publish

    publish(profile)


@app.command()
def compare(
    run: Annotated[str, typer.Argument(help="a results folder, results.tex or manifest.json")],
    reference: Annotated[str, typer.Argument(help="likewise")],
    ignore: Annotated[str | None, typer.Option(metavar="REGEX", help="names to leave out: 'Seconds|Speedup'")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> int:
    """Compare a run's numbers with a reference's and its intervals; exit status 1 when some have changed."""
    from lwa_helpers.pipeline.compare import agrees, compare, report

    found = compare(_at_home(run), _at_home(reference), ignore)
    print(json.dumps(found, indent=1) if as_json else report(found))
    return 0 if agrees(found) else 1


@app.command()
def trace(
    macro: Annotated[str, typer.Argument(help="the name of a number of the paper, e.g. TeacherNdcg")],
    run: Annotated[str | None, typer.Option(help="a results folder [default: the published run]")] = None,
) -> None:
    """Say which notebook and cell recorded a number, and the command that makes it again."""
    from lwa_helpers.pipeline.trace import trace

    print(trace(macro, run and _at_home(run)))


@data.command()
def download(
    category: str,
    root: Annotated[str | None, typer.Option(help="folder for the files [default: dataset/amazon]")] = None,
) -> None:
    """Fetch a category of Amazon Reviews 2023."""
    from lwa_helpers.data.download import download

    print("\n".join(map(str, download(category, root and _at_home(root)))))


@data.command()
def convert() -> None:
    """Check the embedded models and convert each once, which `make setup` does."""
    from lwa_helpers.models.loading import load_teacher
    from lwa_helpers.models.registry import registry

    for name, spec in registry().items():
        if spec.backend == "embedded":
            print(f"{name}: {load_teacher(name).sha256}")


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="a checkpoint directory, e.g. results/quick/models/student, or a name")],
    directory: Annotated[str, typer.Argument(help="where model.gguf and Modelfile go")],
    dtype: Annotated[Literal["f16", "f32"], typer.Option(help="of the matrices")] = "f16",
) -> None:
    """Write a model as GGUF with a Modelfile, for `ollama create`."""
    from lwa_helpers.models.gguf_export import export_gguf
    from lwa_helpers.models.loading import load_teacher

    path = export_gguf(load_teacher(model), _at_home(directory), dtype)
    print(f"{path}\nserve it with: ollama create NAME -f {path.parent / 'Modelfile'}")


@app.command()
def recommend(
    user: Annotated[list[str], typer.Option(help="user id; may be given more than once")],
    category: Annotated[str, typer.Option(help="MovieLens or an Amazon category")] = "MovieLens",
    model: Annotated[str, typer.Option(help="registered or served name, directory or .gguf")] = "smollm2-135m",
    top_k: Annotated[int, typer.Option(help="items per user")] = 10,
    root: Annotated[Path | None, typer.Option(help="folder of the Amazon files [default: dataset/amazon]")] = None,
    host: Annotated[str | None, typer.Option(help="Ollama server [default: OLLAMA_HOST, else this machine]")] = None,
) -> None:
    """Recommend catalogue items to a user."""
    from lwa_helpers.recommender import BaseRecommender, repairs, table

    recommender = BaseRecommender(model, root and Path(_at_home(str(root))), host=host)
    found = recommender.recommend_many(user, category, top_k, progress=len(user) > 1)
    print("\n\n".join(table(name, recommendations) for name, recommendations in found.items()))
    print(repairs(recommender.answers), end="", file=sys.stderr)


@app.command()
def status() -> None:
    """Say what is current, what is stale and why, and which models can be used."""
    gc.disable()  # no node of the many syntax trees is garbage: looking for it takes a quarter of the time
    try:
        _print_status()
    finally:
        gc.enable()


def _print_status() -> None:
    from lwa_helpers.pipeline.staleness import status

    for profile in PROFILES:
        if (paths.RESULTS / profile / "state").exists():
            print("\n".join([f"profile {profile}", *(f"  {line}" for line in status(profile))]))
        else:
            print(f"profile {profile}\n  not run yet: lwa reproduce --profile {profile}")
    from lwa_helpers.teachers.availability import status_lines

    print("\n".join(["models", *(f"  {line}" for line in status_lines())]))


if __name__ == "__main__":
    sys.exit(main())
