"""The `lwa` command."""

from __future__ import annotations

import argparse
import gc
import json
import sys
from typing import Any

import yaml

from lwa_helpers.config import PROFILES
from lwa_helpers.errors import LwaError


def main(argv: list[str] | None = None) -> int:
    """Run one command; returns its exit status (2: a problem that the user can mend, its message on stderr)."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv[:1] == ["recommend"]:
            from lwa_helpers import recommender

            return recommender.main(argv[1:]) or 0
        arguments = _parser().parse_args(argv)
        return arguments.command(arguments) or 0
    except LwaError as error:
        print(f"lwa: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lwa: interrupted; finished notebooks keep their results", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lwa", description="Reproduce, publish and compare the experiments.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("reproduce", help="run the notebooks that are stale, in order")
    run.add_argument("--profile", default="quick", help=f"{', '.join(PROFILES)} (default: quick)")
    run.add_argument("--only", metavar="02,03", help="only these notebooks")
    run.add_argument("--force", action="store_true", help="run current ones too")
    run.add_argument("--publish", action="store_true", help="publish the results afterwards")
    run.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="a setting, e.g. data.name=All_Beauty"
    )
    run.set_defaults(command=_reproduce)

    publish = commands.add_parser("publish", help="copy a profile's results to figures/ and paper/")
    publish.add_argument("profile")
    publish.set_defaults(command=_publish)

    compare = commands.add_parser(
        "compare", help="compare a run's numbers with a reference's; exit status 1 when they differ"
    )
    compare.add_argument("run", help="a results folder, results.tex or manifest.json")
    compare.add_argument("reference", help="likewise")
    compare.add_argument("--tolerance", type=float, default=0.05, help="relative (default: 0.05)")
    compare.add_argument("--ignore", metavar="REGEX", help="names to leave out, e.g. 'Seconds|Speedup'")
    compare.add_argument("--json", action="store_true", help="print JSON")
    compare.set_defaults(command=_compare)

    data = commands.add_parser("data", help="fetch datasets, convert the embedded models").add_subparsers(
        required=True, metavar="ACTION"
    )
    fetch = data.add_parser("download", help="fetch a category of Amazon Reviews 2023")
    fetch.add_argument("category")
    fetch.add_argument("--root", help="default: dataset/amazon")
    fetch.set_defaults(command=_download)
    convert = data.add_parser(
        "convert", help="check the embedded models and convert each once, which `make setup` does"
    )
    convert.set_defaults(command=_convert)

    export = commands.add_parser("export", help="write a model as GGUF with a Modelfile, for `ollama create`")
    export.add_argument("model", help="a checkpoint directory, e.g. results/quick/models/student, or a registered name")
    export.add_argument("directory", help="where model.gguf and Modelfile go")
    export.add_argument("--dtype", choices=("f16", "f32"), default="f16", help="of the matrices (default: f16)")
    export.set_defaults(command=_export)

    status = commands.add_parser("status", help="what is current, what is stale and why, which models can be used")
    status.set_defaults(command=_status)
    commands.add_parser("recommend", help="recommend items to a user (lwa recommend --help)", add_help=False)
    return parser


def _export(arguments: argparse.Namespace) -> None:
    from lwa_helpers.models.gguf_export import export_gguf
    from lwa_helpers.models.loading import load_teacher

    path = export_gguf(load_teacher(arguments.model), arguments.directory, arguments.dtype)
    print(f"{path}\nserve it with: ollama create NAME -f {path.parent / 'Modelfile'}")


def _download(arguments: argparse.Namespace) -> None:
    from lwa_helpers.data.download import download

    print("\n".join(map(str, download(arguments.category, arguments.root))))


def _convert(_: argparse.Namespace) -> None:
    from lwa_helpers.models.loading import load_teacher
    from lwa_helpers.models.registry import registry

    for name, spec in registry().items():
        if spec.backend == "embedded":
            print(f"{name}: {load_teacher(name).sha256}")


def _reproduce(arguments: argparse.Namespace) -> None:
    from lwa_helpers.pipeline.reproduce import reproduce

    reproduce(arguments.profile, parse_overrides(arguments.set), arguments.only, arguments.force, arguments.publish)


def parse_overrides(assignments: list[str]) -> dict[str, Any]:
    """["a.b=1"] -> {"a.b": 1}; values are read as YAML 1.1, to which 1e-4 is a text and 1.0e-4 a number."""
    overrides = {}
    for assignment in assignments:
        key, equals, value = assignment.partition("=")
        if not (key and equals):
            raise LwaError(f"--set {assignment!r}: write it as KEY=VALUE")
        try:
            overrides[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise LwaError(f"--set {assignment!r}: the value is not YAML: {error}") from None
    return overrides


def _publish(arguments: argparse.Namespace) -> None:
    from lwa_helpers.pipeline.publish import publish

    publish(arguments.profile)


def _compare(arguments: argparse.Namespace) -> int:
    from lwa_helpers.pipeline.compare import agrees, compare, report

    found = compare(arguments.run, arguments.reference, arguments.tolerance, arguments.ignore)
    print(json.dumps(found, indent=1) if arguments.json else report(found))
    return 0 if agrees(found) else 1


def _status(_: argparse.Namespace) -> None:
    gc.disable()  # syntax trees have very many nodes, none of which is garbage: looking for it takes a quarter of the time
    try:
        _print_status()
    finally:
        gc.enable()


def _print_status() -> None:
    from lwa_helpers.paths import RESULTS
    from lwa_helpers.pipeline.staleness import status

    for profile in PROFILES:
        if (RESULTS / profile / "state").exists():
            print("\n".join([f"profile {profile}", *(f"  {line}" for line in status(profile))]))
        else:
            print(f"profile {profile}\n  not run yet: lwa reproduce --profile {profile}")
    from lwa_helpers.teachers.availability import status_lines

    print("\n".join(["models", *(f"  {line}" for line in status_lines())]))


if __name__ == "__main__":
    sys.exit(main())
