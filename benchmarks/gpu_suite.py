"""Everything that only a GPU can show, in one go: tests, comparison with the released code, demo, evaluation, speed,
parking, memory checks.

    python benchmarks/gpu_suite.py --out runs/gpu [--official PATH] [--only tests --only eval] [--weights FILE]

Each step runs in a process of its own under a time limit; its output goes to ``OUT/<step>.log``, its result file to
``OUT/<step>.json``. A table and ``OUT/summary.json`` say what held. Exit status 0 only if every step did.
"""

import argparse
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import results_file

BENCHMARKS = Path(__file__).resolve().parent
ROOT = BENCHMARKS.parent


@dataclass(frozen=True)
class Step:
    """One process.

    Attributes:
        name: of its files.
        command: what is run, from the root of the checkout.
        seconds: time limit.
    """

    name: str
    command: list[str]
    seconds: int


def steps(out: Path, official: Path | None, weights: Path | None, eval_arguments: list[str]) -> list[Step]:
    """All steps, cheapest evidence first."""
    python = sys.executable
    cli = [python, "-m", "qvg_paged"]
    model = ["--weights", str(weights)] if weights else []
    bench = [*cli, "bench", "--out", str(out / "bench"), "--json", str(out / "bench.json"), "--seconds", "200"]
    bench += ["--official", str(official)] if official else []
    listed = [
        Step("tests", [python, "-m", "pytest", "-m", "gpu", "-q", "-rA", "-p", "no:cacheprovider", *gpu_tests()], 240),
        Step("demo", [*cli, "demo", "--out", str(out / "demo"), "--json", str(out / "demo.json"), *model], 120),
        Step(
            "eval",
            [*cli, "eval", "--out", str(out / "eval"), "--json", str(out / "eval.json"), *model, *eval_arguments],
            560,
        ),
        Step("bench", bench, 260),
        Step("park", [python, str(BENCHMARKS / "park_bench.py"), "--json", str(out / "park.json")], 120),
        Step("sanitize", [python, str(BENCHMARKS / "sanitize.py"), "--json", str(out / "sanitize.json")], 500),
    ]
    if official is not None:
        compare = [python, str(BENCHMARKS / "compare_released.py"), "--official", str(official)]
        listed.insert(1, Step("compare", [*compare, "--json", str(out / "compare.json")], 120))
    return listed


def gpu_tests() -> list[str]:
    """Files with tests that need a GPU; others may import what a GPU machine lacks."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return [str(path.relative_to(ROOT)) for path in files if "pytest.mark.gpu" in path.read_text()]


def run_step(step: Step, out: Path) -> dict[str, object]:
    """Run one step; what became of it."""
    start = time.monotonic()
    with (out / f"{step.name}.log").open("w") as log:
        try:
            code = subprocess.run(
                step.command, cwd=ROOT, stdout=log, stderr=log, timeout=step.seconds, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            code = 124
    seconds = round(time.monotonic() - start, 1)
    last = [line for line in (out / f"{step.name}.log").read_text(errors="replace").splitlines() if line.strip()]
    print(
        f"{step.name:8s} {'ok' if code == 0 else f'FAILED ({code})':12s} {seconds:6.1f} s  {last[-1] if last else ''}",
        flush=True,
    )
    return {"step": step.name, "held": code == 0, "exit_status": code, "seconds": seconds, "command": step.command}


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--official", type=Path, help="checkout of the released Quant VideoGen code")
    parser.add_argument("--weights", type=Path, help="world model (default: the checkout's)")
    parser.add_argument("--only", action="append", default=[], help="run this step; repeatable")
    parser.add_argument("--seconds", type=int, help="stop starting steps after this long")
    parser.add_argument("eval_arguments", nargs="*", help="passed on to qvg-paged eval, after --")
    arguments = parser.parse_args()
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    rows = []
    for step in steps(out, arguments.official, arguments.weights, arguments.eval_arguments):
        if arguments.only and step.name not in arguments.only:
            continue
        left = None if arguments.seconds is None else int(arguments.seconds - (time.monotonic() - start))
        if left is not None and left < 5:
            rows.append(
                {"step": step.name, "held": False, "exit_status": None, "seconds": 0.0, "command": step.command}
            )
            continue
        limit = step.seconds if left is None else min(step.seconds, left)
        rows.append(run_step(Step(step.name, step.command, limit), out))
    content = results_file.result(device="cuda", config=vars(arguments), results=rows)
    results_file.write(out / "summary.json", content)
    return 0 if rows and all(row["held"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
