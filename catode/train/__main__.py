"""Command line of the trainer: ``python -m catode.train``. ``--help`` and flag errors do not load PyTorch."""

from __future__ import annotations

import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from catode._output import out_of_memory, run
from catode.train.settings.commandline import parse
from catode.train.settings.setting import ConfigError
from catode.train.stop import Stopped, terminated

if TYPE_CHECKING:
    from catode.prune.devices.distributed import Group
    from catode.train.loop import Setup

AGAIN = "give the same command again"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 2 for bad input, 1 for a loss that is not finite or a full disk, 3 for a finished run that missed its
        target or was so short that it removed structures with a theta near 1, 128 + its number after a signal.
    """
    try:
        with terminated():
            return _main(argv)
    except KeyboardInterrupt as stop:
        print("stopped before the run began; give the same command again", file=sys.stderr)
        return 128 + (stop.number if isinstance(stop, Stopped) else signal.SIGINT)


def _main(argv: Sequence[str] | None) -> int:
    """The same, but a signal before there is a run to go on with is raised."""
    config, problem = None, ""
    try:
        config = parse(argv)
    except ValueError as error:
        problem = str(error)
        if _single_process():
            print(f"error: {problem}", file=sys.stderr)
            return 2
    from catode.prune.devices import distributed
    from catode.train import data, loop
    from catode.train.loop import preflight

    with distributed.joined() as group:
        setup = None
        try:
            try:
                setup = loop.prepare(config) if config else None
            except ValueError as error:
                problem = str(error)
            problem = group.problem(problem, None if setup is None else setup.alike())
            if problem:
                return _end(group, 2, f"error: {problem}")
            if setup.config.dry_run:
                text = preflight.table(setup)
                loop.make_pruner(setup, loop.make_optimizer(setup.model, setup.config))  # for what it refuses
                return _end(group, 0, text, sys.stdout)
            folder = loop.train(setup, at_end=_report)
            missed = group.leads and bool(_missed(folder) or _removed_unseen(folder))
            return _end(group, 3 if missed else 0, summary(folder) if group.leads else "", sys.stdout)
        except ConfigError as error:  # another process uses the folder
            return _end(group, 2, f"error: {error}")
        except (loop.NotFinite, distributed.Disagreement) as error:
            return _end(group, 1, f"error: {error}")
        except data.DataError as error:  # raised only in the process that reads the image
            print(f"error: {error} Then continue with {_resume(setup.config.out)}", file=sys.stderr)
            return 2
        except distributed.Lost as error:  # every process prints it: rank 0 may be the one that died
            hint = f" Continue with {_resume(setup.config.out)}" if setup else ""
            print(f"error: process {group.rank} of {group.size}: {error}.{hint}", file=sys.stderr)
            return 1
        except BrokenPipeError:
            raise
        except OSError as error:  # in the process that writes, or in all of them before the first step
            print(f"error: {error}{_then_continue(setup)}", file=sys.stderr)
            return 1
        except (MemoryError, RuntimeError) as error:  # of huge images, a huge number of steps, large batches
            if not out_of_memory(error):
                raise
            reason = (str(error).splitlines() or ["no memory is left"])[0].rstrip(".")
            print(f"error: not enough memory: {reason}{_then_continue(setup)}", file=sys.stderr)
            return 1
        except KeyboardInterrupt as stop:
            if setup is None:
                raise
            number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
            return _end(
                group, 128 + number, f"{str(stop) or 'interrupted'}; {_how_to_continue(Path(setup.config.out))}"
            )


def _resume(folder: str | Path) -> str:
    """The flag that continues a run, as a shell reads it."""
    return f"--resume {shlex.quote(str(folder))}"


def _then_continue(setup: Setup | None) -> str:
    """The end of a message about what stopped a run."""
    how = _how_to_continue(Path(setup.config.out)) if setup else AGAIN
    return f". Fix that, then {how}" if how.startswith(("continue", AGAIN)) else f"; {how}"


def _how_to_continue(folder: Path) -> str:
    """What to do after an interruption, as text."""
    if not (folder / "config.json").exists():
        return AGAIN
    if (folder / "result.json").exists() and not list(folder.glob("checkpoint-*.pt")):
        return f"the run in {folder} is finished"
    return f"continue with {_resume(folder)}"


def _single_process() -> bool:
    """Whether this run has no other processes; tells it without PyTorch, from torchrun's environment variable."""
    return "torch" not in sys.modules and "TORCHELASTIC_RUN_ID" not in os.environ


def _end(group: Group, status: int, text: str, file: TextIO | None = None) -> int:
    """Print `text` in rank 0 only; returns `status`."""
    if group.leads:
        print(text, file=file or sys.stderr)
    return status


def _report(folder: Path) -> None:
    """Make the report of a run that is finished but for that; what goes wrong costs a line, not the run."""
    from catode.report import report

    try:
        report.write(folder)
    except Exception as error:  # of a damaged file, a full disk, a drawing library
        reason = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        print(
            f"warning: the run is finished, but its report failed: {reason}. Make it again with catode report "
            f"{shlex.quote(str(folder))}",
            file=sys.stderr,
        )


def _missed(folder: Path) -> str:
    """What is left of the network instead of the target; empty where it was met."""
    from catode.report.report import missed_target

    return missed_target(*(json.loads((folder / name).read_text()) for name in ("config.json", "result.json")))


def _accuracies(result: dict[str, Any]) -> list[str]:
    """Accuracy on the test images, which were read once, and on those for validation, as text."""
    splits = [split for split in ("test", "validation") if result[f"{split}_accuracy"] is not None]
    return [f"{result[f'{split}_accuracy']:.2%} on {result[f'{split}_images']:,} {split} images" for split in splits]


def _removed_unseen(folder: Path) -> int:
    """Structures that a run removed only because its time was out, with a theta near 1."""
    return json.loads((folder / "result.json").read_text()).get("removed_near_one", 0)


def summary(folder: Path) -> str:
    """Results of a finished run, as text."""
    from catode.report.report import waiting

    result = json.loads((folder / "result.json").read_text())
    ema = ", averaged weights" if result["test_accuracy_without_ema"] is not None else ""
    lines = [
        f"accuracy {', '.join(_accuracies(result))}; final epoch{ema}",
        f"MACs     {result['macs_dense']:,} -> {result['macs']:,} ({result['macs'] / result['macs_dense']:.1%})",
        f"params   {result['params_dense']:,} -> {result['params']:,} ({result['params'] / result['params_dense']:.1%})",
        f"layers   {result['layers_total']} -> {result['layers_kept']}, units {result['units_total']} -> {result['units_kept']}",
    ]
    if result["units_kept_for_rounding"]:
        lines.append(f"rounding {result['units_kept_for_rounding']} of the units kept only to round widths")
    if result["decisions"]:
        lines.append("decided  " + ", ".join(f"{n} {state}" for state, n in result["decisions"].items()))
    for batch, key in ((1, "ms"), (128, "ms_128")):
        before, after = result[f"latency_dense_{key}"], result[f"latency_{key}"]
        if before is None:
            lines.append(f"latency  not measured at batch {batch}: not enough memory")
        else:
            lines.append(f"latency  {before:.2f} -> {after:.2f} ms ({after / before:.1%}, batch {batch})")
    with suppress(ValueError, OSError):  # a damaged table, which the failed report named
        lines.append(f"waiting  {waiting(folder)} of the step time, for images")
    if (folder / "report.md").exists():
        lines.append(f"report   {folder / 'report.md'}")
    lines += [f"warning  {line}" for line in result.get("warnings", ())]
    if missed := _missed(folder):
        lines.append(f"target   missed: {missed}; train longer, or choose a larger share")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
