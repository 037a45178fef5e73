"""Where kernels written in Gluon are used, asked of GPUs that are made up."""

import sys
from types import ModuleType

import pytest
import torch
from test_kmeans import row_group

from qvg_paged import kernels
from qvg_paged.kernels import few_queries, many_queries
from qvg_paged.kernels.gluon import GluonKernel

GPU = torch.device("cuda", 3)


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[int, int]]:
    """The capability of any GPU, to be changed; kernels that import and were never given up."""
    found = {"capability": (9, 0)}
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: found["capability"])
    for module, name in ((few_queries, "_few_queries_gluon"), (many_queries, "_many_queries_gluon")):
        monkeypatch.setattr(module, "KERNEL", GluonKernel(name, "slower"))
        monkeypatch.setitem(sys.modules, f"qvg_paged.kernels.{name}", ModuleType(name))
    return found


@pytest.mark.parametrize(
    ("capability", "few", "many"),
    [((8, 0), False, False), ((8, 9), True, False), ((9, 0), True, True), ((10, 0), True, False)],
)
def test_each_kernel_runs_where_its_instructions_are(
    made_up: dict[str, tuple[int, int]], capability: tuple[int, int], few: bool, many: bool
) -> None:
    made_up["capability"] = capability
    assert (few_queries.has_gluon(GPU), many_queries.has_wgmma(GPU)) == (few, many)
    assert not few_queries.has_gluon(torch.device("cpu"))


@pytest.mark.usefixtures("made_up")
def test_one_that_was_given_up_leaves_other_devices_and_kernels_alone() -> None:
    with pytest.warns(RuntimeWarning, match=r"^slower on cuda:3: .*\(RuntimeError: no\)$"):
        many_queries.KERNEL.give_up(GPU, RuntimeError("no\nwhy"))
    assert not many_queries.has_wgmma(GPU)
    assert many_queries.has_wgmma(torch.device("cuda", 0))
    assert few_queries.has_gluon(GPU)


@pytest.mark.usefixtures("made_up")
def test_a_release_of_triton_that_does_not_know_what_it_imports_is_asked_once() -> None:
    kernel = GluonKernel("_nothing_gluon", "slower")
    with pytest.warns(RuntimeWarning, match="ModuleNotFoundError") as told:
        answers = [kernel.runs_on(GPU, (8, 0)) for _ in range(2)]
    assert (answers, len(told)) == ([False, False], 1)


def test_clusters_are_summed_by_another_kernel_where_the_one_for_hopper_does_not_compile(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if torch.cuda.is_available():
        pytest.skip("Triton's interpreter is off where there is a GPU")
    _kmeans_triton = pytest.importorskip("qvg_paged.kernels._kmeans_triton")
    count, dim = 130, 128
    group = row_group(torch.randn(1, 64, dim).bfloat16(), count)
    group.ids.random_(0, count)

    def summed() -> tuple[torch.Tensor, torch.Tensor]:
        sums, counts = torch.zeros(1, 1, count, dim), torch.zeros(1, 1, count, dtype=torch.int32)
        _kmeans_triton.sum_tokens(group, 0, sums, counts)
        return sums, counts

    other = summed()
    kernel = GluonKernel("_sum_gluon", "slower")
    monkeypatch.setattr(_kmeans_triton, "HOPPER_KERNEL", kernel)
    monkeypatch.setattr(_kmeans_triton, "on_hopper", lambda device: device not in kernel.given_up)
    monkeypatch.setattr(kernels, "_sum_gluon", ModuleType("another release"), raising=False)
    with pytest.warns(RuntimeWarning, match="slower on cpu.*AttributeError"):
        found = summed()
    assert torch.equal(found[0], other[0])
    assert torch.equal(found[1], torch.bincount(group.ids.flatten().long(), minlength=count)[None, None])
    summed()  # without a word
