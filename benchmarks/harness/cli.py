"""The commands of the league."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from msa2conv.files import check_writable

from ..methods import methods
from .checking import problems
from .config import Experiment, find_experiments, read_experiment
from .documents import update
from .measuring import answers, quality
from .parents import PARENTS, load_parent, parent_of, save_parent
from .reading import read
from .result import RESULTS
from .runner import Stage, run_all
from .training import Schedule, train

MICRO_DATA = {"fashion": "fashion_mnist", "cifar": "cifar10"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    args = _parser().parse_args(arguments)
    code: int = args.command(args)
    return code


def _run(args: argparse.Namespace) -> int:
    names = []
    for tier, experiment in find_experiments(args.experiment):
        matrix = read_experiment(tier, experiment)
        names += matrix.runs(tier, experiment, args.methods, args.budgets, args.seeds)
    names.sort(key=lambda name: name.seed)  # a first look at everything before the second seed
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # a convolution's answers would depend on the batch
    prepare = partial(_prepare, args)
    failed = run_all(names, prepare, out=args.out, again=args.again, progress=not args.quiet)
    return 1 if failed else 0


def _prepare(args: argparse.Namespace, experiment: Experiment) -> Stage:
    return Stage.prepare(experiment, args.data, args.weights, args.device, args.time_on)


def _list(args: argparse.Namespace) -> int:
    for tier, experiment in find_experiments(args.experiment):
        for name in read_experiment(tier, experiment).runs(tier, experiment):
            done = (
                "done  " if name.path(args.out).is_file() else "failed" if name.path(args.out, True).is_file() else ""
            )
            print(f"{done:7}{tier}/{experiment} {name.stem}")
    print("\nmethods:", ", ".join(sorted(methods())))
    return 0


def _train(args: argparse.Namespace) -> int:
    parent = parent_of(args.parent)
    path = check_writable(args.output or parent.weights or f"{args.parent}.safetensors")
    data = read(MICRO_DATA[args.parent.rpartition("_")[2]], args.data, parent.input[1])
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    model = parent.build().to(args.device)
    train(model, data.train, Schedule(parent.epochs, parent.lr, 128), seed=args.seed, what=args.parent, progress=True)
    about = {"parent": args.parent, "epochs": str(parent.epochs), "seed": str(args.seed), "data": data.name}
    save_parent(model, path, about)
    found, labels = answers(load_parent(args.parent, path), data.test)
    print(f"{path}: top-1 {quality(found, found, labels).top1:.2f} on {len(labels):,} test images of {data.name}")
    return 0


def _documents(args: argparse.Namespace, plots: bool) -> int:
    for path in update(args.tiers, args.out, plots=plots):
        print(path)
    return 0


def _check(args: argparse.Namespace) -> int:
    found = problems(args.out)
    for problem in found:
        print(problem)
    return 1 if found else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: object, text: str) -> argparse.ArgumentParser:
        found = commands.add_parser(name, help=text, description=text)
        found.set_defaults(command=run)
        return found

    run = command("run", _run, "run what is not done yet of a tier or an experiment")
    run.add_argument("experiment", help="a tier, or TIER/EXPERIMENT")
    run.add_argument("--data", type=Path, required=True, help="the folder that holds the images")
    run.add_argument("--weights", type=Path, help="of a parent whose weights are not in the repository")
    run.add_argument("--methods", nargs="+", default=[], help="of those in the config; all by default")
    run.add_argument("--budgets", nargs="+", type=float, default=[])
    run.add_argument("--seeds", nargs="+", type=int, default=[])
    run.add_argument("--device", default="cpu")
    run.add_argument("--time-on", help="another device to time on, for a GPU that several processes share")
    run.add_argument("--threads", type=int, default=torch.get_num_threads())
    run.add_argument("--again", action="store_true", help="also what is done")
    run.add_argument("--quiet", action="store_true")
    listed = command("list", _list, "the runs of a tier or an experiment, and what is done of them")
    listed.add_argument("experiment")
    trained = command("train", _train, "train a micro parent and write its weights")
    trained.add_argument("parent", choices=[name for name, parent in PARENTS.items() if parent.epochs])
    trained.add_argument("--data", type=Path, required=True)
    trained.add_argument("-o", "--output", type=Path)
    trained.add_argument("--device", default="cpu")
    trained.add_argument("--threads", type=int, default=torch.get_num_threads())
    trained.add_argument("--seed", type=int, default=0)
    table = command("table", partial(_documents, plots=False), "write the tables of docs/benchmarks and README")
    plot = command("plot", partial(_documents, plots=True), "write the tables and the plots")
    for each in (table, plot):
        each.add_argument("tiers", nargs="*", help="by default all that have results")
    check = command("check", _check, "fail if a shown figure has no result file behind it")
    for each in (run, listed, table, plot, check):
        each.add_argument("--out", type=Path, default=RESULTS, help="where results lie")
    return parser
