"""Do the tests notice? Changes the pure modules one place at a time and runs their direct tests on each change.

    python -m tests.mutation --list                  every mutant, by module and line
    python -m tests.mutation --all --jobs 2          the whole run
    python -m tests.mutation --sample 40 --seed 0    a reproducible part of it
    python -m tests.mutation --module rules          those of one module

A mutant that its tests do not notice has survived. It is printed with its place and its difference, and the exit status
is 1 unless `mutation_survivors.json` says in a line why it cannot or need not be noticed. Names, texts, annotations and
imports are not changed. Mutants run in forks of this process, so that a start costs little: on Linux and macOS. Tests that take
much longer on a mutant than without a change have noticed it: a loop without end need not run for long.
"""

from __future__ import annotations

import argparse
import ast
import collections
import copy
import difflib
import functools
import gc
import importlib.abc
import importlib.machinery
import importlib.util
import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPLAINED = Path(__file__).with_name("mutation_survivors.json")
HERE, BELOW = "tests/decisions/test_", "tests/structures/test_"
TESTS = {
    "catode.decisions.check": [HERE + "check.py"],
    "catode.decisions.evidence": [HERE + "evidence.py", HERE + "limits.py"],
    "catode.decisions.growth": [HERE + "limits.py"],
    "catode.decisions.limits": [HERE + "limits.py"],
    "catode.decisions.motion": [HERE + "motion.py"],
    "catode.decisions.outcomes": [HERE + "outcomes.py"],
    "catode.decisions.priors": [HERE + "priors.py"],
    "catode.decisions.rules": [HERE + "rules.py"],
    "catode.decisions.schedule": [HERE + "schedule.py"],
    "catode.decisions.shadow": [HERE + "shadow.py", HERE + "check.py"],
    "catode.decisions.target": [HERE + "target.py", HERE + "outcomes.py"],
    "catode.structures.complexity": [BELOW + "complexity.py"],
    "catode.structures.description": [BELOW + "inventory.py"],
    "catode.structures.fates": [BELOW + "inventory.py"],
    "catode.structures.inventory": [BELOW + "inventory.py"],
    "catode.structures.layout": ["tests/structures/test_layout.py"],
    "catode.theory.tolerance.measured": ["tests/theory/test_measured.py", HERE + "limits.py", HERE + "rules.py"],
}
"""The pure modules and their direct tests."""

FRESH = ("catode.decisions", "catode.structures", "catode.theory.tolerance.measured")  # imported anew for each mutant
PLAIN = ("-x", "-q", "--noconftest", "--assert=plain", "--tb=no", "-p", "no:cacheprovider", "-o", "addopts=")
START, LONGER = (
    2.0,
    3.0,
)  # seconds of CPU time that a mutant gets, and how many times what its tests take without a change
KILLED, SURVIVED, TIMED_OUT, BROKEN = "killed", "survived", "timed out", "broken"

COMPARISONS = {
    ast.Lt: (ast.LtE, ast.GtE),
    ast.LtE: (ast.Lt, ast.Gt),
    ast.Gt: (ast.GtE, ast.LtE),
    ast.GtE: (ast.Gt, ast.Lt),
    ast.Eq: (ast.NotEq,),
    ast.NotEq: (ast.Eq,),
    ast.Is: (ast.IsNot,),
    ast.IsNot: (ast.Is,),
    ast.In: (ast.NotIn,),
    ast.NotIn: (ast.In,),
}
OPERATORS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Div,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
PAIRS = (
    ("maximum", "minimum"),
    ("max", "min"),
    ("argmax", "argmin"),
    ("any", "all"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("subtract", "add"),
    ("lower", "upper"),
    ("benefit_lower", "benefit_upper"),
    ("zero", "safe"),
    ("mean", "error"),
    ("isnan", "isfinite"),
)
SWAPS = {**dict(PAIRS), **{b: a for a, b in PAIRS}}
BOUNDS = {
    "maximum",
    "minimum",
    "max",
    "min",
    "clip",
    "abs",
}  # calls that are also dropped, leaving their first argument


@dataclass(frozen=True)
class Mutant:
    """One changed place.

    Attributes:
        module: Dotted name.
        line: Line of the change.
        key: What identifies it in the list of explained survivors, wherever its line moves.
        source: The changed module.
        original: The module as it is.
    """

    module: str
    line: int
    key: str
    source: str = field(repr=False)
    original: str = field(repr=False)

    def diff(self) -> str:
        """The changed lines."""
        lines = difflib.unified_diff(self.original.splitlines(), self.source.splitlines(), lineterm="", n=0)
        return "\n".join(line for line in lines if not line.startswith(("---", "+++", "@@")))


def changed(node: ast.AST) -> Iterator[ast.AST | None]:
    """What may stand in the place of one node; None: nothing, for a statement."""
    if isinstance(node, ast.Compare):
        for place, operator in enumerate(node.ops):
            for other in COMPARISONS[type(operator)]:
                new = copy.deepcopy(node)
                new.ops[place] = other()
                yield new
    elif isinstance(node, ast.BinOp):
        if type(node.op) in OPERATORS:
            new = copy.deepcopy(node)
            new.op = OPERATORS[type(node.op)]()
            yield new
        yield node.left
        if isinstance(node.op, ast.BitAnd | ast.BitOr | ast.Add | ast.Mult):
            yield node.right
    elif isinstance(node, ast.BoolOp):
        new = copy.deepcopy(node)
        new.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
        yield new
        yield from node.values
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant):
        if isinstance(node.value, bool):
            yield ast.Constant(not node.value)
        elif isinstance(node.value, int):
            yield ast.Constant(node.value + 1)
        elif isinstance(node.value, float):
            yield ast.Constant(2.0 * node.value if node.value else 1.0)
    elif isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in BOUNDS and node.args:
            yield node.args[0]
    elif isinstance(node, ast.Attribute | ast.Name) and isinstance(node.ctx, ast.Load):
        name = node.attr if isinstance(node, ast.Attribute) else node.id
        if name in SWAPS:
            new = copy.deepcopy(node)
            setattr(new, "attr" if isinstance(node, ast.Attribute) else "id", SWAPS[name])
            yield new
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.AugAssign):
        yield None
        if type(node.op) in OPERATORS:
            new = copy.deepcopy(node)
            new.op = OPERATORS[type(node.op)]()
            yield new
    elif (isinstance(node, ast.Expr) and not isinstance(node.value, ast.Constant)) or (
        isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Subscript)
    ):
        yield None


def places(node: ast.AST, owner: str = "") -> Iterator[tuple[ast.AST, str]]:
    """Every node that may be changed, with the dotted name of the function it is in."""
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Import | ast.ImportFrom):
                continue
            if name == "test" and isinstance(node, ast.If | ast.While) and not isinstance(child, ast.BoolOp):
                yield child, f"{owner}?"  # a condition, which may also be taken for granted
            inside = owner
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                inside = f"{owner}.{child.name}".lstrip(".")
            yield child, inside
            yield from places(child, inside)


def parsed(source: bytes) -> str:
    """What Python understands, whatever its spaces and parentheses."""
    return ast.dump(ast.parse(source))


@functools.cache
def mutants(module: str) -> list[Mutant]:
    """Every mutant of a module, in the order of the file."""
    text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
    raw = text.encode()
    starts = [0]
    for line in raw.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))

    def extent(node: ast.AST) -> tuple[int, int]:
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    found, seen, sources, tree = [], collections.Counter(), {text}, ast.parse(text)
    statements = [(*extent(statement), parsed(raw[slice(*extent(statement))])) for statement in tree.body]
    for node, owner in places(tree):
        if not hasattr(node, "lineno"):
            continue
        begin, end = extent(node)
        first, last, whole = next(own for own in statements if own[0] <= begin and end <= own[1])
        old = " ".join(raw[begin:end].decode().split())
        options = [ast.Constant(True), ast.Constant(False)] if owner.endswith("?") else changed(node)
        for new in options:
            told = "pass" if new is None else ast.unparse(new)
            if isinstance(new, ast.expr) and not isinstance(new, ast.Constant | ast.Name | ast.Attribute | ast.Call):
                told_there = f"({told})".encode()
            else:
                told_there = told.encode()
            source = (raw[:begin] + told_there + raw[end:]).decode()
            try:  # of the statement of the module alone: the others stay as they are
                same = source in sources or parsed(raw[first:begin] + told_there + raw[end:last]) == whole
            except SyntaxError:
                continue  # a target of an assignment, a keyword's name: nothing that a value may stand for
            if same:
                continue
            sources.add(source)
            key = f"{module} {owner.rstrip('?')}: {old} -> {told}"
            seen[key] += 1
            key += f" #{seen[key]}" if seen[key] > 1 else ""
            found.append(Mutant(module, node.lineno, key, source, text))
    return sorted(found, key=lambda mutant: mutant.line)


NAMED = (
    ("catode.theory.tolerance.measured", "np.subtract(price, margin)", "np.asarray(price)"),
    ("catode.decisions.rules", "price = limits.benefit_lower,", "price = limits.benefit_upper,"),
    ("catode.decisions.rules", "last[near_one] = lower[near_one]", "last[near_one] = upper[near_one]"),
    ("catode.decisions.rules", "slope[0] + float(", "slope[0] - float("),
    ("catode.decisions.rules", "MOST_OF_A_SITE = 0.25", "MOST_OF_A_SITE = 1.0"),
)
"""Changes that once went unnoticed; they are tried in every run, whatever the sample."""


def named() -> list[Mutant]:
    """The mutants of `NAMED`.

    Raises:
        ValueError: if the code no longer has such a place.
    """
    found = []
    for module, old, new in NAMED:
        text = (ROOT / f"{module.replace('.', '/')}.py").read_text()
        if text.count(old) != 1:
            raise ValueError(f"`NAMED` must name one place each; got {text.count(old)} of {old!r} in {module}")
        line = text[: text.index(old)].count("\n") + 1
        found.append(Mutant(module, line, f"{module}: {old} -> {new}", text.replace(old, new), text))
    return found


class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports one module from changed text."""

    def __init__(self, mutant: Mutant):
        self.mutant = mutant

    def find_spec(self, fullname, path=None, target=None):
        if fullname == self.mutant.module:
            origin = str(ROOT / f"{fullname.replace('.', '/')}.py")
            return importlib.util.spec_from_loader(fullname, self, origin=origin)
        return None

    def exec_module(self, module):
        exec(compile(self.mutant.source, f"{self.mutant.module} (mutant)", "exec"), module.__dict__)


def attempt(mutant: Mutant | None, tests: list[str], limit: int, work: float | None = None) -> int:
    """Run tests in a fork; returns its process id. Its exit status is pytest's.

    Args:
        mutant: The change; None for none.
        tests: Files.
        limit: Seconds until it is ended.
        work: Seconds of CPU time until it is ended, however busy the machine is; None for any.
    """
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        signal.alarm(limit)  # ends the process: a loop without end is noticed as well
        if work is not None:
            signal.setitimer(signal.ITIMER_PROF, work)
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        sys.stdout, sys.stderr = io.StringIO(), io.StringIO()
        for name in [name for name in sys.modules if name.startswith(FRESH)]:
            del sys.modules[name]
            package, _, short = name.rpartition(".")
            vars(sys.modules.get(package, sys)).pop(short, None)  # else `from package import module` finds the old one
        if mutant is not None:
            sys.meta_path.insert(0, Changed(mutant))
        import pytest

        status = int(pytest.main([*PLAIN, *tests]))
    finally:
        os._exit(status)


def verdict(status: int) -> str:
    """What the wait status of an attempt says: pytest ends with 1 where a test fails, with 2 where one cannot be imported."""
    if os.WIFSIGNALED(status):
        return TIMED_OUT if os.WTERMSIG(status) in (signal.SIGALRM, signal.SIGPROF) else KILLED
    return {0: SURVIVED, 1: KILLED, 2: KILLED}.get(os.WEXITSTATUS(status), BROKEN)


def unchanged(tests: Iterable[str], jobs: int, limit: int) -> Iterator[tuple[str, float, bool]]:
    """Run each file of tests without a change, several at a time; yields its seconds of CPU time and whether it passes."""
    todo, running = sorted(tests), {}
    while todo or running:
        while todo and len(running) < jobs:
            test = todo.pop()
            running[attempt(None, [test], limit)] = test
        child, status, used = os.wait4(-1, 0)
        yield running.pop(child), used.ru_utime + used.ru_stime, status == 0


def run(
    chosen: list[Mutant], jobs: int, limit: int, work: Mapping[str, float] | None = None
) -> Iterator[tuple[Mutant, str]]:
    """Try mutants, several at a time, and yield them as they end.

    Args:
        chosen: The mutants.
        jobs: How many at a time.
        limit: Seconds for each.
        work: Seconds of CPU time for each mutant of a module.
    """
    todo, running = list(reversed(chosen)), {}
    while todo or running:
        while todo and len(running) < jobs:
            mutant = todo.pop()
            running[attempt(mutant, TESTS[mutant.module], limit, (work or {}).get(mutant.module))] = mutant
        child, status = os.wait()
        yield running.pop(child), verdict(status)


def prepare() -> None:
    """Import what every fork needs, and let hypothesis neither shrink nor remember: the first failure is enough."""
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    for name in ("numpy", "scipy.integrate", "scipy.special", "scipy.stats", "hypothesis", "pytest"):
        importlib.import_module(name)
    importlib.import_module("catode.decisions.check")  # with what of catode stays the same
    from hypothesis import Phase, settings

    settings.register_profile(
        "mutation",
        deadline=None,
        derandomize=True,
        database=None,
        report_multiple_bugs=False,
        phases=[Phase.explicit, Phase.generate],
    )
    settings.load_profile("mutation")
    gc.freeze()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.split("\n")[0])
    parser.add_argument("--all", action="store_true", help="every mutant")
    parser.add_argument("--sample", type=int, default=None, metavar="N", help="so many, drawn at random")
    parser.add_argument("--seed", type=int, default=0, help="of that draw [default: 0]")
    parser.add_argument("--module", action="append", metavar="NAME", help="only modules whose name ends in this")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time [default: 1]")
    parser.add_argument("--limit", type=int, default=60, help="seconds for each mutant [default: 60]")
    given = parser.parse_args(arguments)
    modules = [m for m in TESTS if given.module is None or any(f".{m}".endswith(f".{name}") for name in given.module)]
    if not modules or not (given.all or given.sample or given.module or given.list):
        parser.error("choose --all, --sample N, --module NAME (of the pure modules) or --list")
    reasons = json.loads(EXPLAINED.read_text()) if EXPLAINED.exists() else {}
    everything = [mutant for module in modules for mutant in mutants(module)]
    stale = [key for key in reasons if key.split()[0] in modules and key not in {m.key for m in everything}]
    chosen = everything
    if given.sample is not None:
        chosen = random.Random(given.seed).sample(everything, min(given.sample, len(everything)))
    if given.list:
        for mutant in chosen:
            print(f"{mutant.module.replace('.', '/')}.py:{mutant.line}: {mutant.key}")
        print(f"{len(chosen)} mutants")
        return 0
    began = time.monotonic()
    prepare()
    chosen = [mutant for mutant in named() if mutant.module in modules] + chosen
    tests = {test for mutant in chosen for test in TESTS[mutant.module]}
    seconds = {}
    for test, used, passes in unchanged(tests, given.jobs, 10 * given.limit):
        if not passes:
            print(f"tests fail without any change: {test}")
            return 2
        seconds[test] = used
    work = {m.module: START + LONGER * sum(seconds[test] for test in TESTS[m.module]) for m in chosen}
    counts, unexplained, noticed = collections.Counter(), [], []
    for mutant, end in run(chosen, given.jobs, given.limit, work):
        counts[end] += 1
        if end in (SURVIVED, BROKEN) and mutant.key not in reasons:
            unexplained.append(mutant)
            print(
                f"{end}: {mutant.module.replace('.', '/')}.py:{mutant.line}\n  {mutant.key}\n{mutant.diff()}\n",
                flush=True,
            )
        elif end not in (SURVIVED, BROKEN) and mutant.key in reasons:
            noticed.append(mutant.key)
    for key in stale:
        print(f"explained, but no such mutant: {key}")
    for key in noticed:
        print(f"explained, but noticed: {key}")
    left = counts[SURVIVED] + counts[BROKEN]
    print(
        f"{len(chosen)} mutants: {counts[KILLED] + counts[TIMED_OUT]} noticed ({counts[TIMED_OUT]} by the time limit), "
        f"{left - len(unexplained)} survived and explained, {len(unexplained)} survived; "
        f"{time.monotonic() - began:.0f} s, {given.jobs} at a time"
    )
    return int(bool(unexplained or stale or noticed))


if __name__ == "__main__":
    sys.exit(main())
