"""Files that are timed for an instant."""

from collections.abc import Iterator

import pytest

from timm_igkd.export import verification


@pytest.fixture(scope="module")
def quick_timing() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(verification, "TIMING_S", 0.0)
        yield
