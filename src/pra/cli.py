"""The command ``pra``. Each subcommand is a function whose docstring is its help and whose keywords are its options."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import tyro

from pra.commands.average import average_command
from pra.commands.bench import bench_command, bench_train_command
from pra.commands.compare import compare_command
from pra.commands.complete import complete_command
from pra.commands.data import check_command, pack_command
from pra.commands.demo import demo_command
from pra.commands.distill import distill_command
from pra.commands.eval import evaluate_command
from pra.commands.grid import grid_command
from pra.commands.pareto import pareto_command
from pra.commands.probe import features_command, probe_command
from pra.commands.program import is_rank_0, parse_command, run_program
from pra.commands.report import report_command
from pra.commands.sample import sample_command
from pra.commands.share import export_command, push_command
from pra.commands.show import show_command
from pra.commands.sweep import sweep_command
from pra.commands.train import train_command
from pra.errors import PraError, nearest
from pra.utils.provenance import DISTRIBUTION, package_version

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train_command,
    "distill": distill_command,
    "sample": sample_command,
    "complete": complete_command,
    "grid": grid_command,
    "average": average_command,
    "eval": evaluate_command,
    "sweep": sweep_command,
    "probe": probe_command,
    "features": features_command,
    "report": report_command,
    "compare": compare_command,
    "data check": check_command,
    "data pack": pack_command,
    "demo": demo_command,
    "push": push_command,
    "export": export_command,
    "bench sample": bench_command,
    "bench train": bench_train_command,
    "bench pareto": pareto_command,
    "show": show_command,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command of ``pra`` and return its exit code, as :func:`pra.commands.program.run_program` does."""
    return run_program("pra", parse, argv)


def parse(args: list[str]) -> Callable[[], object]:
    """Parse a command line of ``pra``, without ``-v``, into a call. Help is ``SystemExit``, a mistake ``PraError``."""
    version = package_version(DISTRIBUTION) or "(not installed)"
    if args == ["--version"]:
        return partial(print, f"pra {version}")
    for count in (2, 1):
        name = " ".join(args[:count])
        if name in COMMANDS:
            return parse_command(f"pra {name}", COMMANDS[name], args[count:])
    group = f"{args[0]} " if any(name.startswith(f"{args[0]} ") for name in COMMANDS if args) else ""
    program, rest = f"pra {group}".strip(), args[1:] if group else args
    known = {name.removeprefix(group): command for name, command in COMMANDS.items() if name.startswith(group)}
    if not rest:
        raise PraError(
            f"{program}: a command is missing. Known: {', '.join(known)}; see `{program} --help`", code="missing"
        )
    if not {"-h", "--help"} & set(rest):
        raise PraError(f"no command '{group}{rest[0]}'{nearest(rest[0], known)}", code="unknown", name=rest[0])
    tyro.extras.subcommand_cli_from_dict(
        known,
        prog=program,
        args=["--help"],
        description=f"Autoregressive image generation in pixel space (PRA), version {version}. "
        "With -v or --verbose every command says more of how it works.",
        console_outputs=is_rank_0(),
    )
    raise AssertionError("the help ends the process")
