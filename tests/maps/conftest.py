import pytest
import torch

from mapreuse.maps import _blocked, _c_kernel

KERNELS = {"any C": 0, "AVX2": 1, "AVX512": 2, "PyTorch": None}
"""Kernels by the newest instruction set of the C code. On a processor without it, an older one is tested."""


@pytest.fixture(
    scope="module",
    autouse=True,
    params=[pytest.param(name, marks=pytest.mark.full if name in ("any C", "AVX2") else ()) for name in KERNELS],
)
def kernel(request):
    """Run every test with the C kernels and, as if there were no C compiler, with their twin in PyTorch."""
    max_isa = KERNELS[request.param]
    if max_isa is not None and _c_kernel.library() is None:
        pytest.skip("the package was installed without a C compiler")
    with pytest.MonkeyPatch.context() as patch:
        if max_isa is None:
            patch.setattr(_c_kernel, "library", lambda: None)
        else:
            patch.setattr(_c_kernel, "_MAX_ISA", max_isa)
        yield request.param


@pytest.fixture(scope="module", autouse=True)
def used_memory():
    """New memory is filled with NaN or the largest integer, so that a missing write shows."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks of at most 48 rows, so that 130 rows make three blocks; only the shortest attentions have none."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocked, "_BLOCK_SCORES", 1 << 12)
        patch.setattr(_blocked, "_MIN_ROWS", 48)
        patch.setattr(_blocked, "_MAX_ROWS", 48)
        patch.setattr(_blocked, "_MAX_SHORT", 1 << 5)
        yield
