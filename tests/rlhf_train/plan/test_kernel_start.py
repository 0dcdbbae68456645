"""What a kernel takes to start is measured on a tiny network, whose kernels are counted here."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_train.plan import kernel_start


class Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.started: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        if name not in ("detach", "t", "view", "expand", "empty"):  # these start nothing
            self.started.append(name)
        return func(*args, **(kwargs or {}))


def test_a_layer_of_the_tiny_network_starts_as_many_kernels_as_it_is_divided_by() -> None:
    def started(layers: int) -> int:
        network = nn.Sequential(*(kernel_start._Layer() for _ in range(layers)))
        with Names() as names:
            network(torch.ones(4, kernel_start.WIDTH)).sum().backward()
        return len(names.started)

    # Layers after the first are counted: the network's input has no gradient. On a GPU the norm's
    # backward pass is two kernels, and here one call.
    assert started(3) - started(2) == kernel_start.KERNELS - 1


def test_it_is_measured() -> None:
    assert 1e-7 < kernel_start.kernel_start_s("cpu") < 1e-2


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_not_known() -> None:
    assert kernel_start.in_another_process() is None
