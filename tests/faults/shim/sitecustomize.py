"""This shim puts faults into real ranks.

With this folder on PYTHONPATH and a fault in the file FAULT (see tests/faults/scene.py), a rank
meets the fault by itself; each reads it when it is forked. Faults come where ids are looked up in
the token embedding, which every forward pass of a model does once: memory runs out, a number is not
finite, a process stops. They may also come at a decode step, or where a checkpoint's file is put
together. How the ranks and their launcher react is not changed.
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

file = os.environ.get("FAULT")
fault: dict[str, Any] = {}


def wait_for(name: str) -> None:
    """Until the test has made this file."""
    deadline = time.monotonic() + PATIENCE_S
    while not Path(name).exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the test has not made {name}")
        time.sleep(0.02)


def is_here() -> bool:
    """Return whether this process is the rank that meets the fault; the importer has no number."""
    return os.environ.get("RANK") == str(fault["rank"])


def meet(out: Any, rows: int) -> Any:
    """Cause the fault if this is the pass, counted by its rows, that it belongs to.

    out: what the pass would have returned.
    """
    import torch

    what = fault["what"] if is_here() else ""
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

    from rlhf_train.generation.decoder import Decoder

    plain, plain_save = torch.nn.functional.embedding, safetensors.torch.save
    plain_step = Decoder._step
    passes = 0  # passes of the fault's kind
    longest = 1  # tokens of a row so far: the trial update, which is first, has the longest

    def save(tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> bytes:
        if fault["kind"] == "saving" or (fault.get("saving_too") and passes >= fault["first"]):
            meet(None, len(tensors) + fault.get("rows", 0))
        return plain_save(tensors, metadata)

    safetensors.torch.save = save

    def embedding(ids: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        nonlocal passes, longest
        out = plain(ids, weight, padding_idx, *args, **kwargs)
        kind = "training" if torch.is_grad_enabled() else "judging"
        if padding_idx is None or kind != fault["kind"]:  # None: OPT's positions, and the decoder
            return out
        passes, longest = passes + 1, max(longest, ids.shape[1])
        return meet(out, math.ceil(ids.numel() / longest)) if fault["first"] <= passes <= fault["last"] else out

    def step(self: Decoder, count: int, width: int) -> None:
        nonlocal passes
        if fault["kind"] == "generating":
            passes += 1
            if fault["first"] <= passes <= fault["last"]:
                meet(None, count)
        plain_step(self, count, width)

    torch.nn.functional.embedding = embedding  # type: ignore[assignment]
    Decoder._step = step  # type: ignore[method-assign]


def begin() -> None:
    """Called in each process that is forked: of the ranks, one meets the fault."""
    assert file is not None
    fault.update(json.loads(Path(file).read_text(encoding="utf-8")))
    if not is_here():
        return
    if fault["kind"] == "start":
        wait_for(fault["file"])
    if fault["what"] == "no memory":
        from rlhf_train.models import packed_attention

        packed_attention.DTYPES["cpu"] = ()  # rows are padded, not packed: so they can be counted


if file is not None:
    install()  # before all other imports, which may take the functions by name
    os.register_at_fork(after_in_child=begin)
