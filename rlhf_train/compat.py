"""This module holds all that differs between the library versions that we support.

They are PyTorch 2.0 with transformers 4.x, and today's.
"""

from __future__ import annotations

import gc
import inspect
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import transformers
from torch import Tensor, nn

_MAJOR = int(transformers.__version__.split(".")[0])
_TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
READS_OLD_SPELLINGS = _MAJOR < 5  # of a model's files: rlhf_train/models/spellings.py
FUSES_ADAMW_ON_CPU = _TORCH >= (2, 4)
KNOWS_DTYPE_OF_NORMS = _TORCH >= (2, 4)  # torch._foreach_norm(..., dtype=)


LIBRARIES = ("torch", "transformers", "deepspeed", "peft")  # whose versions a plan and a checkpoint name


def versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that train."""
    found = {"Python": platform.python_version()}
    for library in LIBRARIES:
        with suppress(PackageNotFoundError):
            found[library] = version(library)
    return found


def dtype_argument(dtype: torch.dtype) -> dict[str, Any]:
    """Return the dtype argument of from_pretrained and from_config.

    transformers 5 renamed `torch_dtype`, and its default is the dtype of the file.
    """
    return {"dtype" if _MAJOR >= 5 else "torch_dtype": dtype}


@contextmanager
def no_gpu_in_sight() -> Iterator[None]:
    """Hide the GPUs while DeepSpeed is imported.

    Where DeepSpeed sees a GPU, it runs nvcc for every operator that it could compile, and 0.15
    fails without nvcc. Neither the image nor a rented box has nvcc, and we compile nothing: we use
    the operators that are compiled already, and else PyTorch's own.
    """
    is_available = torch.cuda.is_available
    torch.cuda.is_available = lambda: False
    try:
        yield
    finally:
        torch.cuda.is_available = is_available


@contextmanager
def nothing_compiled() -> Iterator[None]:
    """Turn `@torch.compile` off for imports of functions that we do not use."""
    compiler = torch.compile
    torch.compile = lambda function: function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler


def has_onednn_linear() -> bool:
    """Return whether `onednn_linear` works: PyTorch 2.0 needs a function after the product."""
    try:
        onednn_linear(torch.ones(1, 1), torch.ones(1, 1), None)
    except (AttributeError, RuntimeError):
        return False
    return True


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute x W^T + b by oneDNN, in float32 on a CPU, without a gradient.

    x: (n, k), weight: (m, k), with any strides; bias: (m,), contiguous.
    """
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def checkpointing_arguments() -> dict[str, Any]:
    """Return the arguments of gradient checkpointing.

    PyTorch 2.0's checkpoints that are not reentrant break at ZeRO 3: the backward pass finds
    partitioned weights (size 0).
    """
    return {"use_reentrant": _TORCH < (2, 1)}


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether memory ran out.

    PyTorch 2.0 has the class in torch.cuda only; cuBLAS and cuDNN raise RuntimeError with messages
    of their own.
    """
    words = str(error)
    return type(error).__name__ == "OutOfMemoryError" or (
        isinstance(error, RuntimeError) and ("CUBLAS_STATUS_ALLOC_FAILED" in words or "out of memory" in words)
    )


def free_gpu_memory() -> None:
    """Return the memory that PyTorch keeps for later to the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def takes_position_ids(model: nn.Module) -> bool:
    """Return whether the model takes positions: transformers 4's OPT derives them from the mask."""
    return "position_ids" in inspect.signature(model.forward).parameters


def without_cudnn_attention() -> None:
    """Turn cuDNN's attention (from PyTorch 2.5 on) off: it builds a plan for each new length."""
    if hasattr(torch.backends.cuda, "enable_cudnn_sdp"):
        torch.backends.cuda.enable_cudnn_sdp(False)


def capture_arguments() -> dict[str, Any]:
    """Return the arguments of torch.cuda.graph that let other threads call CUDA meanwhile.

    The thread that writes a checkpoint does. PyTorch 2.0 does not have the argument.
    """
    if "capture_error_mode" not in inspect.signature(torch.cuda.graph.__init__).parameters:
        return {}
    return {"capture_error_mode": "thread_local"}


def keep_rows(cache: Any, rows: Tensor) -> Any:
    """Return the KV cache with only these rows: tuples of tensors (transformers 4), or a Cache."""
    if hasattr(cache, "batch_select_indices"):
        cache.batch_select_indices(rows)
        return cache
    return tuple(tuple(tensor.index_select(0, rows) for tensor in layer) for layer in cache)


def hands_keywords_to_layers() -> bool:
    """Return whether a model of transformers hands unknown keywords of its call to its layers.

    Rows are packed only there; what needs PyTorch 2.5 (attention of grouped heads) is there, too.
    """
    return _MAJOR >= 5 and _TORCH >= (2, 5)


def has_varlen_attention() -> bool:
    """Return whether PyTorch has flash attention over rows of any lengths, as we need it.

    It needs Ampere, and has `scale` and `window_size` from PyTorch 2.11 on.
    """
    if _TORCH < (2, 11) or not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 0):
        return False
    from torch.nn.attention.varlen import varlen_attn

    return {"scale", "window_size"} <= inspect.signature(varlen_attn).parameters.keys()


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, ends: Tensor, longest: int, scale: float, window: int | None
) -> Tensor:
    """Compute causal attention over packed rows, in 16 bit on a GPU.

    The result is that of `packed_attention.run_by_run`. query: (N, H, D); key, value: (N, H or
    fewer, D). ends: int32 (B + 1,), cumulated lengths from 0. window: as in `within_rows`.
    """
    from torch.nn.attention.varlen import varlen_attn

    more: dict[str, Any] = {}
    if (repeats := query.shape[1] // key.shape[1]) > 1:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:
            more = {"enable_gqa": True}
        else:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    sides = (-1 if window is None else window - 1, 0)
    output: Any = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scale, window_size=sides, **more)
    return output
