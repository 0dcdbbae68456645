"""All that differs between the library versions we run on: PyTorch 2.0 with transformers 4.x, and today's."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_MAJOR = int(transformers.__version__.split(".")[0])
_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])


def dtype_argument(dtype: torch.dtype) -> dict[str, Any]:
    """For from_pretrained and from_config: transformers 5 renamed `torch_dtype`, and by default follows the file."""
    return {"dtype" if _MAJOR >= 5 else "torch_dtype": dtype}


@contextmanager
def no_gpu_in_sight() -> Iterator[None]:
    """For `import deepspeed`: where it sees a GPU it runs nvcc for every operator that it could compile, and 0.15 fails without one.

    Nothing is to be compiled here: what was is used, and else PyTorch's own. Neither the image nor a rented box has nvcc.
    """
    is_available = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = is_available


def checkpointing_arguments() -> dict[str, bool]:
    """PyTorch 2.0's checkpoints that are not reentrant break under ZeRO-3: the backward pass finds partitioned weights (size 0)."""
    return {"use_reentrant": _TORCH < (2, 1)}


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch 2.0 has the class in torch.cuda only; cuBLAS and cuDNN say it in words of their own, as RuntimeError."""
    words = str(error)
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("CUBLAS_STATUS_ALLOC_FAILED" in words or "out of memory" in words)
    )


def free_gpu_memory() -> None:
    """What PyTorch keeps for later goes back to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def takes_position_ids(model: nn.Module) -> bool:
    """OPT derives positions from the mask in transformers 4, and takes them as an argument in 5."""
    return "position_ids" in inspect.signature(model.forward).parameters


def without_cudnn_attention() -> None:
    """cuDNN's attention (PyTorch 2.5 on) builds a plan for each new length, and our batches have many."""
    if hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def capture_arguments() -> dict[str, Any]:
    """For torch.cuda.graph: another thread, such as a checkpoint's, may call CUDA meanwhile. PyTorch 2.0 knows no such argument."""
    return {"capture_error_mode": "thread_local"} if "capture_error_mode" in inspect.signature(torch.cuda.graph.__init__).parameters else {}


def keep_rows(cache: Any, rows: Tensor) -> Any:
    """The key-value cache with only these rows: tuples of tensors (transformers 4), or a Cache object."""
    if hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices(rows)
        return cache
    return tuple(tuple(tensor.index_select(0, rows) for tensor in layer) for layer in cache)
