"""The trial of the kernels, where they compute what they should."""

import pytest

from tests.tools.kernels import DEVICE, DTYPES, needs_kernels

pytestmark = needs_kernels


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [16, 64])
def test_trial(dtype, channels):
    from hpcloss.backends.triton.trial import failure

    assert failure(DEVICE, dtype, channels) == ("", True)
