"""DeepSpeed, and nothing else here imports it: engines that learn (ZeRO 0-3), whole weights out of them, and an EMA.

Where we differ from DeepSpeed's own habits: a loss arrives divided by the count of the whole update over all ranks, so
the mean that DeepSpeed takes over ranks and passes is undone; the learning rate is a pure function of the update.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from jobs.spec import Optimization
from rlhf_train import compat
from rlhf_train.batch import BatchPlan
from rlhf_train.world import World

with compat.no_gpu_in_sight():
    import deepspeed
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.adam import FusedAdam

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def connect(world: World, local_rank: int) -> None:
    """Let DeepSpeed use the process group that this rank has already joined."""
    # Its shared-memory collective for CPUs would be compiled now, for most of a minute, where a compiler is found.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo", auto_mpi_discovery=False, verbose=False, rank=local_rank
    )


def learning_rate_factor(update: int, updates: int, spec: Optimization) -> float:
    """Share of the learning rate at update 0, 1, ...: a linear warm-up, then the schedule down to its final share."""
    if update < spec.warmup_updates:
        return (update + 1) / spec.warmup_updates
    done = (update - spec.warmup_updates) / max(1, updates - spec.warmup_updates)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[spec.schedule]
    return spec.final_learning_rate + (1 - spec.final_learning_rate) * shape if spec.schedule != "constant" else 1.0


def deepspeed_config(plan: BatchPlan, precision: str, zero_stage: int, max_grad_norm: float) -> dict[str, Any]:
    return {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        "bf16": {"enabled": precision == "bfloat16"},
        "fp16": {"enabled": precision == "float16"},
        "gradient_clipping": max_grad_norm,
        # Threshold 0: every parameter lives in its partition, so that an EMA of the partitions is an EMA of the model.
        "zero_optimization": {"stage": zero_stage, "stage3_param_persistence_threshold": 0},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
    }


class Engine:
    """A module with its optimizer. Per micro batch: `loss = ...engine(batch)...; engine.backward(loss); engine.step()`."""

    def __init__(
        self,
        module: nn.Module,
        spec: Optimization,
        learning_rate: float,
        updates: int,
        plan: BatchPlan,
        *,
        precision: str,
        zero_stage: int,
        world: World,
    ) -> None:
        self.spec, self.updates, self.world, self.zero_stage = spec, updates, world, zero_stage
        self.learning_rate = learning_rate
        self.update = 0  # optimizer updates done
        module.train()
        # DeepSpeed clips fp32 gradients at ZeRO 0 without telling their norm, so there we do it.
        self._clips = precision == "float32" and zero_stage == 0
        optimizer = _adamw(_parameter_groups(module, spec.weight_decay), learning_rate, spec.betas, world.device)
        config = deepspeed_config(plan, precision, zero_stage, 0.0 if self._clips else spec.max_grad_norm)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        self.current_learning_rate = learning_rate

    @property
    def module(self) -> nn.Module:
        """The module as it was handed in (an ActorForward or ScoreForward)."""
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor) -> None:
        """loss: this micro batch's share of the update's loss, already divided by the update's global count."""
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)

    def step(self) -> float | None:
        """After each micro batch. On the update's last one: updates the weights, returns the gradient norm before clipping."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return None
        self.current_learning_rate = self.learning_rate * learning_rate_factor(self.update, self.updates, self.spec)
        for group in self.optimizer.param_groups:
            group["lr"] = self.current_learning_rate
        norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.spec.max_grad_norm) if self._clips else None
        self._engine.step()
        self.update += 1
        return float(norm if norm is not None else self._engine.get_global_grad_norm())

    def settle(self) -> None:
        """Under ZeRO-3: wait for parameters still under way to the next forward pass, before weights are read one by one."""
        self._engine.empty_partition_cache()


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices decay; biases and norms (one dimension) do not. Empty groups are left out."""
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2]
    plain = [p for p in trained if p.ndim < 2]
    return [group for group in ({"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}) if group["params"]]


def _adamw(groups: list[dict[str, Any]], learning_rate: float, betas: tuple[float, float], device: torch.device) -> torch.optim.Optimizer:
    """Loshchilov and Hutter 2019, arXiv:1711.05101. On a GPU DeepSpeed's FusedAdam if it is compiled already, as in the image: nothing
    is compiled at start. Else PyTorch's.
    """
    if device.type == "cuda" and installed_ops.get("fused_adam"):
        return FusedAdam(groups, lr=learning_rate, betas=betas, eps=1e-8, adam_w_mode=True)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, eps=1e-8, fused=device.type == "cuda")


def full_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Whole weights on the CPU, one parameter at a time; all ranks take part, those with `keep` get them.

    Tied weights stand once, under their first name.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        with _gathered(tensor):
            if keep:
                state[name] = tensor.detach().to("cpu", copy=True)
    return state


def copy_weights(source: Engine, target: nn.Module) -> None:
    """Whole weights of the engine's module (partitioned under ZeRO-3) into `target`, a plain module of the same shape."""
    source.settle()
    for parameter, own in zip(source.module.parameters(), target.parameters(), strict=True):
        with _gathered(parameter):
            own.data.copy_(parameter.data)


@contextmanager
def _gathered(tensor: Tensor) -> Iterator[None]:
    if hasattr(tensor, "ds_id"):
        with deepspeed.zero.GatheredParameters([tensor]):
            yield
    else:
        yield


class Ema:
    """Exponential moving average of the trained parameters, float32; under ZeRO-3 each rank keeps its partitions."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = [p for p in module.parameters() if p.requires_grad]
        self._shadow = [_local(p).detach().float().clone() for p in self._live]

    @torch.no_grad()
    def update(self) -> None:
        for shadow, parameter in zip(self._shadow, self._live, strict=True):
            shadow.lerp_(_local(parameter).float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The module holds the average inside the block."""
        kept = [_local(p).detach().clone() for p in self._live]
        self._write(self._shadow)
        try:
            yield
        finally:
            self._write(kept)

    @torch.no_grad()
    def _write(self, values: list[Tensor]) -> None:
        for parameter, value in zip(self._live, values, strict=True):
            _local(parameter).copy_(value)


def _local(parameter: Any) -> Tensor:
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data
