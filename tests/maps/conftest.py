import pytest

from mapreuse.maps import _blocked


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
