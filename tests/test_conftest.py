"""What other tests measure with."""

import torch
from conftest import TensorBytes


def test_tensors_are_counted_once_and_while_they_live():
    x = torch.ones(1000)
    with TensorBytes() as held:
        a = x + 1
        b = a.view(10, 100).T.mul_(2)  # a view, written in place
        assert (held.held, held.peak) == (4000, 4000)
        del a
        c = b.clone()
        assert (held.held, held.peak) == (8000, 8000)
        del b, c
        assert (held.held, held.peak) == (0, 8000)
