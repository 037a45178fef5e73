"""What a call must do at least, what the machine can do at most, and the time that follows from both."""

from dataclasses import dataclass, field

import torch

from bench.timing import Clock

__all__ = ["Ceilings", "Work", "attention_work"]

PRODUCT = 8192
COPY_NBYTES = 1 << 30
CPU_PRODUCT = 512
CPU_COPY_NBYTES = 32 << 20


@dataclass(frozen=True)
class Work:
    """Operations and bytes that no way of computing a result can avoid.

    Attributes:
        flops: multiplications and additions of matrix products.
        nbytes: bytes read and written in device memory.
        product: number type of the products, a key of `Ceilings.products`.
    """

    flops: float
    nbytes: float
    product: str = "bf16"


def attention_work(
    pairs: int, queries: int, q_heads: int, head_dim: int, history_nbytes: float, product: str = "bf16"
) -> Work:
    """Full attention: QK and PV over `pairs` query-key pairs a head, history read once, queries in, output out.

    Args:
        pairs: sum over sequences of queries times keys.
        queries: of all sequences.
        q_heads: query heads.
        head_dim: channels per head.
        history_nbytes: stored bytes of K and V.
        product: number type of the products.
    """
    return Work(4.0 * pairs * head_dim * q_heads, history_nbytes + 2 * 2 * queries * q_heads * head_dim, product)


@dataclass(frozen=True)
class Ceilings:
    """Best the machine was seen to do in this run.

    Attributes:
        copy: bytes a second of a large device copy, read and written counted.
        products: FLOP a second of a large matrix product by number type.
    """

    copy: float
    products: dict[str, float] = field(default_factory=dict)

    @classmethod
    def measure(cls, clock: Clock) -> "Ceilings":
        """Copy 1 GiB and multiply 8192 x 8192 matrices (small ones on a CPU)."""
        device, cuda = clock.device, clock.device.type == "cuda"
        source = torch.zeros(COPY_NBYTES if cuda else CPU_COPY_NBYTES, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        copied = clock.device_time(lambda _: target.copy_(source))
        size = PRODUCT if cuda else CPU_PRODUCT
        a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
        products = {"bf16": 2 * size**3 / clock.device_time(lambda _: a @ b).median_ms * 1e3}
        if cuda and torch.cuda.get_device_capability(device) >= (8, 9):
            one = torch.ones((), device=device)
            left, right = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t()

            def multiply(_: int) -> torch.Tensor:
                return torch._scaled_mm(left, right, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)

            products["fp8"] = 2 * size**3 / clock.device_time(multiply).median_ms * 1e3
        return cls(2 * source.numel() / copied.median_ms * 1e3, products)

    def least_ms(self, work: Work) -> float:
        """Time that neither the products nor the bytes of `work` could beat."""
        return max(work.flops / self._product(work), work.nbytes / self.copy) * 1e3

    def binds(self, work: Work) -> str:
        """Which of the two is the longer: ``"products"`` or ``"bytes"``."""
        return "products" if work.flops / self._product(work) > work.nbytes / self.copy else "bytes"

    def _product(self, work: Work) -> float:
        return self.products.get(work.product, self.products["bf16"])
