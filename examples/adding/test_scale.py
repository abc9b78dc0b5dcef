import pytest
import torch

from regraft_kernels.scale import scale, scale_reference


@pytest.mark.parametrize("shape", [(1,), (3, 1025)])
def test_scale_is_its_definition(shape, backend, generator):
    tensor = torch.randn(shape, generator=generator)
    torch.testing.assert_close(scale(tensor, 0.3, backend=backend), scale_reference(tensor, 0.3))
