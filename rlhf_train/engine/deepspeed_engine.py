"""The only module that imports DeepSpeed: engines that train (ZeRO 0-3), whole weights, an EMA.

Where we differ from DeepSpeed's own habits:

- A loss arrives divided by the count of the whole update over all ranks, so the mean that DeepSpeed
  takes over ranks and passes is undone.
- The learning rate is a pure function of the update.
- We say which pass is an update's last, so the micro batch may change from one update to the next.
- A checkpoint holds whole float32 tensors by parameter, so it fits any number of ranks and any ZeRO
  stage without a conversion.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from jobs.errors import ExitCode, ToolkitError
from jobs.spec import Optimization
from rlhf_train import compat
from rlhf_train.data.sequences import BatchPlan
from rlhf_train.ranks.collectives import World

with compat.no_gpu_in_sight():
    import deepspeed
    from deepspeed.git_version_info import installed_ops
    from deepspeed.ops.adam import FusedAdam
    from deepspeed.utils import (
        safe_get_full_fp32_param,
        safe_get_full_optimizer_state,
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    # Newer versions' ZeRO imports it before the first update. It imports all of TorchInductor to
    # compile itself, which takes 2 s.
    with compat.nothing_compiled(), suppress(ImportError):
        import deepspeed.runtime.zero.muon.muon_optimizer

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's states of a parameter
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def connect(world: World, local_rank: int) -> None:
    """Let DeepSpeed use the process group that this rank has already joined."""
    # Where there is a compiler, DeepSpeed would compile its shared-memory collective for CPUs now,
    # which takes most of a minute. Newer versions make the table when it is first asked for, by a
    # compiler's run for each operator: 0.1 s of each rank, and that collective alone reads it.
    vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(
        dist_backend="nccl" if world.device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        rank=local_rank,
    )


def learning_rate_factor(update: int, updates: int, spec: Optimization) -> float:
    """Return the learning rate's factor at an update: a linear warm-up, then the schedule."""
    if update < spec.warmup_updates:
        return (update + 1) / spec.warmup_updates
    done = (update - spec.warmup_updates) / max(1, updates - spec.warmup_updates)
    if spec.schedule == "constant":
        return 1.0
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done}[spec.schedule]
    return spec.final_learning_rate + (1 - spec.final_learning_rate) * shape


def deepspeed_config(plan: BatchPlan, precision: str, zero_stage: int, max_grad_norm: float) -> dict[str, Any]:
    return {
        "train_batch_size": plan.global_batch,
        "train_micro_batch_size_per_gpu": plan.micro_batch,
        "gradient_accumulation_steps": plan.gradient_accumulation,
        # Engine checks the norm of all gradients before a step; DeepSpeed would check each gradient
        # for values that are not finite.
        "bf16": {"enabled": precision == "bfloat16", "check_grad_overflow": False},
        "fp16": {"enabled": precision == "float16"},
        "gradient_clipping": max_grad_norm,
        # Threshold 0: every parameter lives in its partition, so that an EMA of the partitions is
        # an EMA of the model. At ZeRO 1 contiguous gradients cost one more copy of each: the
        # backward pass of 388 parameters took 31 instead of 20 ms on a CPU.
        "zero_optimization": {
            "stage": zero_stage,
            "stage3_param_persistence_threshold": 0,
            "contiguous_gradients": zero_stage != 1,
        },
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 2**31,
        "timers": {"throughput": {"enabled": False}},  # it waits for the GPU after every pass
    }


class Engine:
    """A module with its optimizer.

    Per micro batch: `loss = ...engine(batch)...; engine.backward(loss, last=...)`; then
    `engine.step()`.
    """

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
        first_update: int = 0,
    ) -> None:
        """Make an engine for `module`, at update 0.

        learning_rate: the schedule's highest. updates: of the whole step. first_update: where the
        schedule begins; the updates before it are skipped.
        """
        self.spec, self.updates, self.world, self.zero_stage = spec, updates, world, zero_stage
        self.first_update = first_update
        self.learning_rate = learning_rate
        self.update = 0  # optimizer updates done
        self.intact = True  # false while the weights are being updated
        # Gradients that were not finite have reached the weights: DeepSpeed 0.15 looks for them in
        # float16 only.
        self.is_spoiled = False
        module.train()
        # At ZeRO 0 DeepSpeed clips float32 gradients without reporting their norm: we clip them.
        self._clips = precision == "float32" and zero_stage == 0
        optimizer = _adamw(_parameter_groups(module, spec.weight_decay), learning_rate, spec, world.device)
        config = deepspeed_config(plan, precision, zero_stage, 0.0 if self._clips else spec.max_grad_norm)
        self._engine, self.optimizer, _, _ = deepspeed.initialize(model=module, optimizer=optimizer, config=config)
        if world.size == 1 and zero_stage == 0:
            # It would copy all gradients into one tensor and back, though there is no other rank.
            self._engine.enable_backward_allreduce = False
        if zero_stage in (1, 2):
            # Parameters are views of the flat tensors that a step has written to. DeepSpeed would
            # make all views again, which leaves a GPU idle for 10 ms.
            self.optimizer._update_model_bit16_weights = lambda group: None
        self._squares: Tensor | None = None  # of the update's gradients, where `_sum_squares` knows them
        self._adamw = optimizer
        self._scaler = getattr(self.optimizer, "loss_scaler", None)
        if self._scaler is not None:
            # At the lowest scale too, an update that overflows is skipped and counted.
            self._scaler.raise_error_at_min_scale = False
        self.current_learning_rate = 0.0 if first_update else learning_rate

    @property
    def module(self) -> nn.Module:
        """The module that was handed in (an ActorForward or ScoreForward)."""
        return self._engine.module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._engine(*args, **kwargs)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add one micro batch's gradients to those of the update.

        loss: the micro batch's share of the update's loss, already divided by the update's global
        count. last: whether this is the update's last pass.
        """
        self._engine.set_gradient_accumulation_boundary(last)
        if self.world.size > 1:  # ZeRO 2 and 3 add up gradients in each pass, 0 and 1 in the last
            self.world.meet()
        self._engine.backward(loss * self.world.size, scale_wrt_gas=False)
        if last:
            self._squares = self._sum_squares()  # queued now, before the host waits for the GPU
        else:
            self._engine.step()  # DeepSpeed counts passes there

    def step(self) -> float:
        """Update the weights after the update's last micro batch, and return the gradient norm.

        The norm is that before clipping. In float16 it is inf where the loss scale was too large
        and nothing was updated.
        """
        place, places = self.update - self.first_update, self.updates - self.first_update
        self.current_learning_rate = self.learning_rate * learning_rate_factor(place, places, self.spec)
        norm = self._step(self.current_learning_rate)
        self.update += 1
        return norm

    def _step(self, learning_rate: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        norm = self._known_norm()
        if self._clips:
            norm = nn.utils.clip_grad_norm_(self.module.parameters(), self.spec.max_grad_norm)
        # Clipping has spread a norm that is not finite over all gradients, or has yet to happen.
        if norm is not None and not math.isfinite(norm):
            self._drop_gradients()
            return float(norm)
        self.intact = False
        self._engine.step()
        self.intact = True
        if norm is None:
            norm = self._engine.get_global_grad_norm()
            overflowed = getattr(self.optimizer, "overflow", False)
            if overflowed or not math.isfinite(norm) or norm < 0:  # DeepSpeed 0.15 says -1 for inf
                self.is_spoiled = not overflowed
                return math.inf
        return float(norm)

    def _known_norm(self) -> Tensor | None:
        """Return the norm of all ranks' gradients, on the host, and hand it to DeepSpeed."""
        if self._squares is None:
            return None
        norm = self._squares.cpu().sqrt()
        self.optimizer.scaled_global_norm = lambda *_, **__: norm
        return norm

    def _sum_squares(self) -> Tensor | None:
        """Return the sum of squares of all ranks' gradients; None: DeepSpeed computes their norm.

        This is for ZeRO 1 and 2 in bfloat16 and float32. It takes few kernels. DeepSpeed would
        convert each gradient to float64, which takes a GPU 10 ms for OPT-1.3b.
        """
        is_float16 = self._scaler is not None and hasattr(self._scaler, "min_scale")
        if is_float16 or self.zero_stage not in (1, 2) or not compat.KNOWS_DTYPE_OF_NORMS:
            return None
        gradients = [g for group in self.optimizer.averaged_gradients.values() for g in group or () if g is not None]
        squares = torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)).square().sum()
        if self.world.size > 1:
            self.world.meet()
            dist.all_reduce(squares)
        return squares

    @property
    def scale_can_fall(self) -> bool:
        """Whether a float16 loss scale can go lower: it may be why a gradient is not finite."""
        return (
            self._scaler is not None
            and hasattr(self._scaler, "min_scale")
            and self._scaler.cur_scale > self._scaler.min_scale
        )

    def skip(self) -> None:
        """Skip an update after any of its passes.

        Its gradients are dropped, and its place in the schedule is used up.
        """
        self._drop_gradients()
        self.update += 1

    def _drop_gradients(self) -> None:
        self.module.zero_grad()
        if self.zero_stage > 0:
            self.optimizer.zero_grad()
        # As in DeepSpeed's own step when the loss scale was too large; at ZeRO 3 zero_grad does it.
        if self.zero_stage in (1, 2):
            self.optimizer.micro_step_id = -1
            for kept in (self.optimizer.averaged_gradients, getattr(self.optimizer, "all_grad_tensors", {})):
                for group in kept:
                    kept[group] = None

    def _trial_step(self, scaler: Mapping[str, Any]) -> None:
        """Make a step that changes nothing: learning rate 0, gradients of 0.

        Raises ToolkitError if the loss was not finite.
        """
        norm = self._step(0.0)
        if not math.isfinite(norm):
            raise ToolkitError(
                "the longest rows give numbers that are not finite, before anything was learned",
                why=f"the gradient norm of 0 times their loss is {norm}",
                hint="look at the model that training starts from; "
                "in float16, try hardware.precision: bfloat16 or float32",
                exit_code=ExitCode.TRAINING,
            )
        if self.zero_stage in (1, 2):
            # DeepSpeed links parameters with their moments after the first parameter group's step,
            # when the second group has no moments yet.
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()
        for state in self._adamw.state.values():
            for moment in MOMENTS:
                state[moment].zero_()
        self._set_adamw_steps(0)
        self._set_scaler_state(scaler)

    # --- for checkpoints ---

    def numbers(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides tensors, as plain values."""
        return {"update": self.update, "adamw_steps": self._adamw_steps(), "loss_scale": self._scaler_state()}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole float32 tensor) of every trained parameter and of its moments.

        Call it after `trial_update`, on all ranks: they gather one tensor at a time. The tensor may
        be the live one: copy it before the next update.
        """
        self.settle()
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                for kind in ("weight", *MOMENTS):
                    tensor = self._whole(parameter, kind)
                    if tensor is not None:
                        yield f"{name}/{kind}", tensor.detach()

    def model_bytes(self) -> int:
        """Return the size of the module as it is saved in the end."""
        return sum(getattr(p, "ds_numel", p.numel()) * p.element_size() for p in self.module.parameters())

    def size_bytes(self) -> int:
        """Return the size of all tensors that `tensors` yields."""
        return sum(12 * getattr(p, "ds_numel", p.numel()) for p in self.module.parameters() if p.requires_grad)

    def restore(self, tensor: Callable[[str], Tensor], numbers: Mapping[str, Any]) -> None:
        """Set the state that `tensors` and `numbers` gave, bit by bit.

        Call it after `trial_update`. The ZeRO stage and the number of ranks may be others.
        """
        self.settle()
        for name, parameter in self.module.named_parameters():
            if parameter.requires_grad:
                self._set_weight(parameter, tensor(f"{name}/weight"))
                for moment in MOMENTS:
                    self._set_moment(parameter, moment, tensor(f"{name}/{moment}"))
        self.update = numbers["update"]
        self._set_adamw_steps(numbers["adamw_steps"])
        self._set_scaler_state(numbers["loss_scale"])

    def _whole(self, parameter: Any, kind: str) -> Tensor | None:
        if self.zero_stage == 0:  # in float32 only
            return parameter.data if kind == "weight" else self._adamw.state.get(parameter, {}).get(kind)
        if kind == "weight":
            return safe_get_full_fp32_param(parameter)
        return safe_get_full_optimizer_state(parameter, kind)

    @torch.no_grad()
    def _set_weight(self, parameter: Any, value: Tensor) -> None:
        value = value.to(self.world.device)
        if self.zero_stage == 3:
            safe_set_local_fp32_param(parameter, partition(parameter, value, self.world.rank))
        elif self.zero_stage:
            safe_set_full_fp32_param(parameter, value)
        _local(parameter).copy_(partition(parameter, value, self.world.rank) if self.zero_stage == 3 else value)

    @torch.no_grad()
    def _set_moment(self, parameter: Any, moment: str, value: Tensor) -> None:
        value = value.to(self.world.device)
        if self.zero_stage == 3:
            safe_set_local_optimizer_state(parameter, partition(parameter, value, self.world.rank), moment)
        elif self.zero_stage:
            safe_set_full_optimizer_state(parameter, value, moment)
        else:
            self._adamw.state[parameter][moment].copy_(value)

    def _adamw_steps(self) -> int:
        """Return the updates that AdamW has made: skipped ones do not count for bias correction."""
        counted = [*self._adamw.state.values(), *self._adamw.param_groups]
        return max((int(holder["step"]) for holder in counted if "step" in holder), default=0)

    def _set_adamw_steps(self, steps: int) -> None:
        # PyTorch's AdamW counts in its states, FusedAdam in its groups.
        for holder in (*self._adamw.state.values(), *self._adamw.param_groups):
            if "step" in holder:
                holder["step"] = torch.full_like(holder["step"], steps) if isinstance(holder["step"], Tensor) else steps

    def _scaler_state(self) -> dict[str, Any]:
        if self._scaler is None:
            return {}
        return {name: value for name, value in vars(self._scaler).items() if isinstance(value, int | float)}

    def _set_scaler_state(self, state: Mapping[str, Any]) -> None:
        for name in self._scaler_state().keys() & state.keys():
            setattr(self._scaler, name, state[name])

    def settle(self) -> None:
        """Wait for the parameters that ZeRO 3 is gathering for the next forward pass.

        Call it before weights are read one by one.
        """
        self._engine.empty_partition_cache()


def _parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices decay, biases and norms (one dimension) do not.

    Empty groups are left out.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    decayed = {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay}
    plain = {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0}
    return [group for group in (decayed, plain) if group["params"]]


def _adamw(
    groups: list[dict[str, Any]], learning_rate: float, spec: Optimization, device: torch.device
) -> torch.optim.Optimizer:
    """Make AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101).

    On a GPU it is DeepSpeed's FusedAdam if that is compiled already, as in the image: nothing is
    compiled at start. Else it is PyTorch's.
    """
    if device.type == "cuda" and installed_ops.get("fused_adam"):
        return FusedAdam(groups, lr=learning_rate, betas=spec.betas, eps=spec.eps, adam_w_mode=True)
    is_fused = device.type == "cuda" or compat.FUSES_ADAMW_ON_CPU
    return torch.optim.AdamW(groups, lr=learning_rate, betas=spec.betas, eps=spec.eps, fused=is_fused)


def trial_update(*updates: tuple[Engine, Callable[[], Tensor]]) -> None:
    """Make updates that change nothing, to prove that training fits into memory.

    updates: engines that train together, each with its forward pass (any scalar). Each engine runs
    its forward and backward pass, then all make their steps.

    AdamW makes its states at its first step, so after this they can be restored. There are two
    updates, since passes and steps have to fit next to these states: a step's gradients in float32
    were 2.5 GiB for OPT-1.3b on two GPUs.
    """
    scalers = [engine._scaler_state() for engine, _ in updates]
    for _ in range(2):
        for engine, forward in updates:
            engine.backward(forward() * 0.0, last=True)
        for (engine, _), scaler in zip(updates, scalers, strict=True):
            engine._trial_step(scaler)


def full_state(model: nn.Module, *, keep: bool) -> dict[str, Tensor]:
    """Return the whole weights on the CPU.

    All ranks take part, one parameter at a time; those with `keep` get the weights. Tied weights
    stand once, under their first name.
    """
    state: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        with gathered(tensor):
            if keep:
                state[name] = tensor.detach().to("cpu", copy=True)
    return state


@torch.no_grad()
def copy_weights(source: Engine, target: nn.Module) -> None:
    """Copy the trained weights of the engine's module, whole, into `target`.

    target: a plain copy of the module, with adapters if it has them. The engine's module may be
    partitioned (ZeRO 3). Adapters stay next to their weights: merged in bfloat16, small changes
    would be lost.
    """
    source.settle()
    own = dict(target.named_parameters())
    for name, parameter in source.module.named_parameters():
        if parameter.requires_grad:
            with gathered(parameter):
                own[name].data.copy_(parameter.data)


@contextmanager
def gathered(*tensors: Tensor) -> Iterator[None]:
    """Let tensors be whole for the length of the block. All ranks take part."""
    parts = [tensor for tensor in tensors if hasattr(tensor, "ds_id")]
    with deepspeed.zero.GatheredParameters(parts) if parts else nullcontext():
        yield


@contextmanager
def replaced(values: Iterable[tuple[Any, Tensor]]) -> Iterator[None]:
    """Put other values into parameters for the length of the block. All ranks take part.

    values: each parameter with its whole new value, made one by one. The old ones wait in main
    memory.
    """
    kept = list[tuple[Tensor, Tensor]]()
    try:
        for parameter, value in values:
            own = _local(parameter).detach()
            kept.append((own, own.to("cpu", copy=True)))
            own.copy_(partition(parameter, value, dist.get_rank()) if hasattr(parameter, "ds_tensor") else value)
        yield
    finally:
        for own, value in kept:
            own.copy_(value)


class Ema:
    """Exponential moving average of the trained parameters, in float32.

    At ZeRO 3 each rank keeps the average of its own partitions.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay, self.intact = decay, True
        self._live = [p for p in module.parameters() if p.requires_grad]
        self._shadow = [_local(p).detach().float().clone() for p in self._live]

    @torch.no_grad()
    def update(self) -> None:
        for shadow, parameter in zip(self._shadow, self._live, strict=True):
            shadow.lerp_(_local(parameter).float(), 1 - self.decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the module for the length of the block."""
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

    # --- for checkpoints ---

    def numbers(self) -> dict[str, Any]:
        return {}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, whole tensor) of every average; all ranks take part."""
        for number, (parameter, shadow) in enumerate(zip(self._live, self._shadow, strict=True)):
            yield str(number), _joined(parameter, shadow) if hasattr(parameter, "ds_tensor") else shadow

    def size_bytes(self) -> int:
        return sum(4 * getattr(p, "ds_numel", p.numel()) for p in self._live)

    def restore(self, tensor: Callable[[str], Tensor], numbers: Mapping[str, Any]) -> None:
        for number, (parameter, shadow) in enumerate(zip(self._live, self._shadow, strict=True)):
            value = tensor(str(number)).to(shadow.device)
            shadow.copy_(partition(parameter, value, dist.get_rank()) if hasattr(parameter, "ds_tensor") else value)


def partition(parameter: Any, tensor: Tensor, rank: int) -> Tensor:
    """Return the rank's part of a whole tensor at ZeRO 3, padded with zeros as in DeepSpeed."""
    count = parameter.ds_tensor.numel()
    part = tensor.flatten()[rank * count : (rank + 1) * count]
    return nn.functional.pad(part, (0, count - part.numel()))


def _joined(parameter: Any, part: Tensor) -> Tensor:
    """Join every rank's part to the whole tensor, at ZeRO 3."""
    parts = [torch.empty_like(part) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, part)
    return torch.cat([p.flatten() for p in parts])[: parameter.ds_numel].view(parameter.ds_shape)


def _local(parameter: Any) -> Tensor:
    return parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter.data
