"""Mutation score: one operator or number at a time is changed in the scheduler's core and the pool; do tests notice?

    python benchmarks/stress/mutation.py --mutants 20 --json benchmarks/results/<device>/mutation.json

Mutants are drawn per file, the same for the same seed. Each runs in a process of its own that has everything imported
and trades the code of one function; it counts as found if a test or a checked simulation fails, or does not end. Those
that survive are told with their line: either a test is missing, or the change means nothing. The long runs of many
seeds are left out, and before all else the tests must pass with nothing changed.
"""

import argparse
import ast
import copy
import importlib
import io
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from random import Random
from types import ModuleType
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import pytest
from results_file import result, write

from stress.checker import check_log
from stress.mutants import GOAL, trade
from stress.scenario import draw_scenario
from stress.simulator import simulate

__all__ = ["TARGETS", "Change", "changes", "main"]

ROOT = Path(__file__).resolve().parents[2]
NAMES = "policies line books pressure scheduler plugins simulator bad_input tiers async metrics"
SCHEDULER = tuple(f"test_{name}.py" for name in NAMES.split())
MODULES = ("admission", "books", "core", "entry", "guard", "inputs", "line", "log", "policy", "pressure", "relief",
           "rules", "scheduler", "snapshot", "state", "tenant", "view")  # fmt: skip
TARGETS: dict[str, tuple[str, ...]] = {
    **{f"qvg_paged.scheduler.{name}": SCHEDULER for name in MODULES},
    "qvg_paged.pool": ("test_pool.py", "test_store.py", "test_store_machine.py"),
    "qvg_paged.slab_books": ("test_pool.py", "test_store.py", "test_store_machine.py"),
    "qvg_paged.slabs": ("test_pool.py", "test_store.py", "test_store_machine.py"),
}
"""Modules, and the tests that are to notice."""
QUICK = "not planted and not two_hundred and not documentation"
"""Tests that take seconds, not minutes."""
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult, ast.Div: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


@dataclass(frozen=True)
class Change:
    """One mutant.

    Attributes:
        module: its name.
        line: where.
        text: what the line says, and what was changed in it.
        source: the whole module with it.
    """

    module: str
    line: int
    text: str
    source: str


def changes(module: str) -> list[Change]:
    """All mutants of a module's functions."""
    path = Path(str(importlib.import_module(module).__file__))
    source = path.read_text()
    lines = source.splitlines()
    found = []
    for place, node in enumerate(_nodes(ast.parse(source))):
        tree = ast.parse(source)
        what = _apply(list(_nodes(tree))[place])
        text = f"{lines[node.lineno - 1].strip()}  [{what}]"
        found.append(Change(module, node.lineno, text, ast.unparse(ast.fix_missing_locations(tree))))
    return found


def unchanged(module: str) -> Change:
    """A mutant that is none."""
    path = Path(str(importlib.import_module(module).__file__))
    return Change(module, 0, "nothing", path.read_text())


def _nodes(tree: ast.AST) -> Iterator[Any]:
    """Expressions and statements of functions that can be changed, in order."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for part in function.body:
                for node in ast.walk(part):
                    if _can_change(node):
                        yield node


def _can_change(node: ast.AST) -> bool:
    match node:
        case ast.Compare(ops=[_]) | ast.BoolOp() | ast.UnaryOp(op=ast.Not()) | ast.If() | ast.IfExp():
            return True
        case ast.BinOp(op=op):
            return type(op) in SWAPS
        case ast.Constant(value=value):
            return type(value) in (int, bool)
        case _:
            return False


def _apply(node: Any) -> str:
    """Change a node; what was changed."""
    match node:
        case ast.Compare():
            old, node.ops = type(node.ops[0]), [SWAPS[type(node.ops[0])]()]
            return f"{old.__name__} -> {type(node.ops[0]).__name__}"
        case ast.BinOp() | ast.BoolOp():
            old, node.op = type(node.op), SWAPS[type(node.op)]()
            return f"{old.__name__} -> {type(node.op).__name__}"
        case ast.UnaryOp():
            node.operand = ast.UnaryOp(ast.Not(), copy.deepcopy(node.operand))
            return "not left out"
        case ast.Constant():
            old = node.value
            node.value = (not old) if isinstance(old, bool) else old + 1
            return f"{old} -> {node.value}"
        case _:
            node.test = ast.UnaryOp(ast.Not(), node.test)
            return "condition reversed"


def _notices(module: ModuleType, change: Change) -> str:
    """How the change shows, or nothing."""
    with trade(module, change.source):
        for seed, scenario in [*enumerate(GOAL), *((seed, draw_scenario(seed)) for seed in range(4))]:
            try:
                run = simulate(scenario, seed)
                violations = check_log(run.lines)
            except Exception as error:
                return f"simulation: {type(error).__name__}"
            if violations or not run.drained:
                return f"checker: {violations[0].invariant if violations else 'not drained'}"
        words = ["-x", "-q", "-p", "no:cacheprovider", "--no-header", "-k", QUICK]
        tests = [str(ROOT / "tests" / name) for name in TARGETS[change.module]]
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()):
            code = pytest.main([*words, *tests])
    if code == 0:
        return ""
    failed = [line for line in out.getvalue().splitlines() if line.startswith(("FAILED", "ERROR"))]
    return f"test: {failed[0].split(' - ')[0] if failed else code}"


def _child(change: Change, pipe: Any) -> None:
    os.chdir(ROOT)
    pipe.send(_notices(importlib.import_module(change.module), change))


def _judge(change: Change, seconds: float) -> str:
    """The same in a process of its own; one that does not answer in time is found."""
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_child, args=(change, theirs))
    process.start()
    theirs.close()
    try:
        return str(mine.recv()) if mine.poll(seconds) else "does not end"
    except EOFError:
        return "process ended"
    finally:
        process.kill()
        process.join()


def _write(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """The result file, with what is known so far."""
    ordered = sorted(rows, key=lambda row: (row["module"], row["line"], row["change"]))
    score = sum(bool(row["found"]) for row in rows) / len(rows)
    content = {"score": score, "mutants": len(rows), "rows": ordered}
    write(options.json, result(device="cpu", config=vars(options), results=content))


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mutants", type=int, default=20, help="per module; 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=list(TARGETS), default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=120.0, help="after which a mutant counts as found")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--json", type=Path, help="write a result file")
    options = parser.parse_args()
    for same in {TARGETS[name]: name for name in options.only}.values():
        how = _judge(unchanged(same), 10 * options.seconds)
        if how:
            print(f"with nothing changed in {same}: {how}")
            return 2
    chosen: list[Change] = []
    for module in options.only:
        found = changes(module)
        rng = Random(f"{module} {options.seed}")
        chosen += found if not options.mutants else rng.sample(found, min(options.mutants, len(found)))
    Random(options.seed).shuffle(chosen)
    deadline = time.monotonic() + 60 * options.minutes
    rows: list[dict[str, Any]] = []

    def judge(change: Change) -> None:
        if time.monotonic() > deadline:
            return
        how = _judge(change, options.seconds)
        rows.append({"module": change.module, "line": change.line, "change": change.text, "found": how})
        if options.json:
            _write(options, rows)
        print(f"{'found   ' if how else 'SURVIVED'}  {change.module}:{change.line}  {change.text}  {how}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(judge, chosen))
    score = sum(bool(row["found"]) for row in rows) / max(1, len(rows))
    print(f"{len(rows)} mutants, score {score:.1%}")
    return int(score < 0.85)


if __name__ == "__main__":
    sys.exit(main())
