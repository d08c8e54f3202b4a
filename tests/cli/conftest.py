"""Training here measures its layers on a few held-out inputs: figures need not be exact."""

import pytest


@pytest.fixture(autouse=True, scope="module")
def _few_held_out():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sd_hyena.distill.trainer.VALIDATION_SAMPLES", 8)
        yield
