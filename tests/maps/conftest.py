import pytest
import torch

from mapreuse.maps import _blocked, _c_kernel

CORES = {"any C": 0, "AVX2": 1, "AVX512": 2, "PyTorch": None}
"""The cores in C by their newest instructions; a processor that lacks them computes with older ones."""


@pytest.fixture(scope="module", autouse=True, params=CORES)
def core(request):
    """Everything is computed by every core, also by the twin in PyTorch of those in C."""
    newest = CORES[request.param]
    if newest is not None and _c_kernel.library() is None:
        pytest.skip("the package was installed without a C compiler")
    with pytest.MonkeyPatch.context() as patch:
        if newest is None:
            patch.setattr(_c_kernel, "library", lambda: None)
        else:
            patch.setattr(_c_kernel, "_NEWEST", newest)
        patch.setattr(_c_kernel, "map_memory", _used_memory)
        yield request.param


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    """Blocks so small that short attentions are computed in several: of 130 rows, 48, 48 and 34.

    Only the shortest count as short.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_blocked, "_BLOCK_SCORES", 1 << 12)
        patch.setattr(_blocked, "_FEWEST_ROWS", 48)
        patch.setattr(_blocked, "_MOST_ROWS", 48)
        patch.setattr(_blocked, "_SHORT", 1 << 5)
        yield


def _used_memory(scores, dtype):
    """Fresh memory is clean more often than not."""
    return torch.full(scores.shape, 0xAB if dtype == torch.uint8 else float("nan"), dtype=dtype)
