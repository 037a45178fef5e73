"""What the host pays for launches, calls of `attend` and a chunk of Wan 1.3B, and what the device is busy with.

    python benchmarks/host_time.py --json runs/host_time.json

Decoding ahead across layers is first checked to change no bit. A chunk is that of the chunk loop of `qvg-paged bench`.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import results_file  # noqa: E402
from bench import chunk_loop  # noqa: E402
from bench.settings import Bench, BenchOptions  # noqa: E402

from qvg_paged import Chunk, Stream  # noqa: E402
from qvg_paged.kernels import AttentionPath  # noqa: E402

PATHS = {"staged": AttentionPath.STAGED, "staged fp8": AttentionPath.STAGED_FP8}
SLEEP_CYCLES = 100_000_000


def median_us(run: Callable[[int], object], count: int, together: int = 5) -> float:
    """Median host time of a call; the device is let to catch up every few calls."""
    times = []
    for i in range(count):
        start = time.perf_counter()
        run(i)
        times.append((time.perf_counter() - start) * 1e6)
        if i % together == together - 1:
            torch.cuda.synchronize()
    return round(statistics.median(times), 1)


def device_ms(run: Callable[[], object]) -> float:
    """Device time of what `run` launches, all of it queued before the first starts."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def launches() -> dict[str, float]:
    """The same launch of the kernel that merges, by Triton, by ours and repeated, beside an operation of PyTorch."""
    from qvg_paged.kernels import _merge_triton  # noqa: PLC0415
    from qvg_paged.kernels import launch as module  # noqa: PLC0415

    out, lse = torch.zeros(1, 64, 12, 1, 128, device="cuda").bfloat16(), torch.zeros(1, 64, 12, 1, device="cuda")
    seen: list[Any] = []
    original, _merge_triton.launch = _merge_triton.launch, lambda *args, **constants: seen.append((args, constants))
    try:
        _merge_triton.merge_pieces([(out, lse)] * 3, out, lse)
    finally:
        _merge_triton.launch = original
    ((kernel, grid, *args), constants) = seen[0]
    module.launch(kernel, grid, *args, **constants)
    with module.recorded() as recorded:
        module.launch(kernel, grid, *args, **constants)
    stream = torch.cuda.current_stream().cuda_stream
    return {
        "Triton": median_us(lambda _: kernel[grid](*args, **constants), 200),
        "launch": median_us(lambda _: module.launch(kernel, grid, *args, **constants), 200),
        "repeated": median_us(lambda _: recorded[0](stream), 200),
        "torch.add": median_us(lambda _: lse.add_(1.0), 200),
    }


def passes(chunk: Chunk, tensors: list[torch.Tensor], layers: int, count: int) -> list[torch.Tensor]:
    """Results of some passes, all layers."""
    return [chunk.attend(layer, *tensors) for _ in range(count) for layer in range(layers)]


def changed_bits(stream: Stream, tensors: list[torch.Tensor], layers: int) -> int:
    """Results that differ where decoding does not run ahead across layers."""
    lookahead = stream.manager._lock.lookahead
    with stream.begin_chunk() as chunk:
        ahead = passes(chunk, tensors, layers, 2)
        lookahead.settle()
        lookahead._captured = True
        alone = passes(chunk, tensors, layers, 1)
        lookahead._captured = False
        return sum(not torch.equal(one, alone[i % layers]) for i, one in enumerate(ahead))


def parts(stream: Stream, tensors: list[torch.Tensor], layers: int) -> dict[str, float]:
    """Begin, attend and commit of a chunk."""
    start = time.perf_counter()
    chunk = stream.begin_chunk()
    begun = time.perf_counter()
    first = median_us(lambda layer: chunk.attend(layer, *tensors), layers)
    later = median_us(lambda i: chunk.attend(i % layers, *tensors), 2 * layers)
    device = device_ms(lambda: passes(chunk, tensors, layers, 1)) / layers
    committing = time.perf_counter()
    chunk.commit()
    launched = time.perf_counter()
    torch.cuda.synchronize()
    return {
        "begin_host_ms": (begun - start) * 1e3, "first_attend_host_us": first, "attend_host_us": later,
        "attend_device_ms": device, "commit_host_ms": (launched - committing) * 1e3,
        "commit_ms": (time.perf_counter() - committing) * 1e3,
    }  # fmt: skip


def wall_ms(run: Callable[[int], object], count: int = 4) -> float:
    """Median time of a chunk until the device is done."""
    times = []
    for i in range(count + 1):
        start = time.perf_counter()
        run(i)
        torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[1:])


def measure() -> dict[str, Any]:
    """Everything."""
    bench, shape = Bench(BenchOptions(device="cuda")), chunk_loop.WanShape()
    model = chunk_loop.WanModel(shape, bench.device)
    found: dict[str, Any] = {"launches_us": launches(), "paths": {}}
    dense = chunk_loop._dense_loop(bench, model)
    found["chunk_ms"] = {"BF16 history": wall_ms(dense)}
    del dense
    torch.cuda.empty_cache()
    found["model_without_attention_ms"] = device_ms(lambda: model.run(lambda _, q, *__: q)) / shape.layers
    stream = chunk_loop._filled_stream(bench, shape)
    tensors = model.projected(0, model.x)
    for name, path in PATHS.items():
        stream.manager.config = replace(stream.manager.config, path=path)
        changed = changed_bits(stream, tensors, shape.layers)
        assert changed == 0, f"{name}: {changed} results changed by decoding ahead"
        found["chunk_ms"][name] = wall_ms(chunk_loop._quantised_loop(model, stream))
        found["paths"][name] = parts(stream, tensors, shape.layers)
    return found


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, default=Path("runs/host_time.json"))
    arguments = parser.parse_args()
    found = measure()
    results_file.write(arguments.json, results_file.result(device="cuda", config=vars(arguments), results=found))
    for name, value in found.items():
        print(name, value)
    return 0


if __name__ == "__main__":
    sys.exit(main())
