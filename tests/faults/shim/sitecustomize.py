"""Faults for real ranks: with this folder on PYTHONPATH and a fault in FAULT (see tests/faults/scene.py), a rank meets it by itself.

They come where ids are looked up in the embedding of tokens, which every forward pass does once: memory that ends there, a
number that is none, a process that stops; or where a file of a checkpoint is put together. What the ranks and their launcher
then do is all their own.
"""

from __future__ import annotations

import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

PATIENCE_S = 120.0

fault = json.loads(os.environ.get("FAULT", "null"))


def wait_for(name: str) -> None:
    """Until the test has made this file."""
    deadline = time.monotonic() + PATIENCE_S
    while not Path(name).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the test has not made {name}")
        time.sleep(0.02)


def meet(out: Any, rows: int) -> Any:
    """The fault, in the pass of so many rows that it is to come in; `out`: what the pass would have got."""
    import torch

    what = fault["what"]
    if what == "no memory" and rows > fault["rows"]:
        raise torch.cuda.OutOfMemoryError(f"CUDA out of memory. Tried to allocate 2.00 GiB for {rows} rows (injected)")
    if what == "nan":
        return out * math.nan
    if what == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if what == "wait":
        wait_for(fault["file"])
    return out


def install() -> None:
    import safetensors.torch
    import torch
    from torch import Tensor

    plain, plain_save = torch.nn.functional.embedding, safetensors.torch.save
    passes = 0  # of the kind that the fault comes in

    def save(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
        if fault["kind"] == "saving" or (fault.get("saving_too") and passes >= fault["first"]):
            meet(None, len(tensors) + fault.get("rows", 0))
        return plain_save(tensors, metadata)

    safetensors.torch.save = save

    def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal passes
        out = plain(ids, weight, padding_idx, *args, **kwargs)
        is_generating = not torch.is_grad_enabled() and ids.shape[1] == 1  # a token a row, after the prompts
        kind = "training" if torch.is_grad_enabled() else "generating" if is_generating else "judging"
        if padding_idx is None or kind != fault["kind"]:  # None: OPT's positions
            return out
        passes += 1
        return meet(out, len(ids)) if fault["first"] <= passes <= fault["last"] else out

    torch.nn.functional.embedding = embedding  # type: ignore[assignment]


if fault is not None and os.environ.get("RANK") == str(fault["rank"]):
    if fault["kind"] == "start":
        wait_for(fault["file"])
    else:
        install()
