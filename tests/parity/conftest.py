"""What several parity tests go through twice."""

import pytest

from ftray.infer.torch_engine.cpu import kernels as cpu_kernels


@pytest.fixture(scope="module", params=["our kernels", "torch's operations"])
def step_operations(request):
    """An engine made while this is in force computes its steps by the one or by the other."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "our kernels":
            assert cpu_kernels.compiled() is not None, "gcc and torch's OpenMP library are needed for this test"
        else:
            patch.setattr(cpu_kernels, "compiled", lambda: None)
        yield request.param
