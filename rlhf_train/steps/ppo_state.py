"""Where the loop of step 3 stands between two updates, and how a checkpoint holds it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import numpy as np
from torch import Tensor

from jobs.events import Metrics
from rlhf_train.engine.deepspeed_engine import Engine
from rlhf_train.steps.context import Clock
from rlhf_train.steps.experience import Experience
from rlhf_train.steps.held_out import Summary
from rlhf_train.steps.losses import kl_k3

# Sums over a rollout's updates.
SUMS = (
    "policy_loss",
    "value_loss",
    "ratio",
    "clipped",
    "value_clipped",
    "value_error",
    "to_go",
    "to_go_squared",
    "entropy",
    "tokens",
    "trained",
    "computed",
)


@dataclass
class Tally:
    """Sums over one rollout's updates so far, of all ranks.

    They are plain values, since a checkpoint between two updates holds them.
    """

    updates: int = 0  # also the skipped ones
    sums: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SUMS, 0.0))
    norms: list[list[float]] = field(default_factory=list)  # of actor and, if there is one, critic, an update each
    entropy: float | None = None  # mean over responses; None on-policy: it comes from the training passes
    judge_score: float | None = None  # mean over responses; None: there is no judge
    scored: int = 0  # real tokens of the scoring passes
    scored_computed: int = 0  # their tokens with padding
    rollout_s: float = 0.0
    score_s: float = 0.0
    train_s: float = 0.0

    @classmethod
    def read(cls, saved: Mapping[str, Any]) -> Tally:
        """Read a tally from a checkpoint, also from one that another version wrote.

        What the checkpoint lacks gets its default; what is unknown here is ignored.
        """
        sums = dict.fromkeys(SUMS, 0.0) | _known(SUMS, saved.get("sums", {}))
        return cls(**_known(_names(cls), saved) | {"sums": sums})

    @property
    def trained_updates(self) -> int:
        return len(self.norms)

    def add(self, sums: Mapping[str, float], norms: Sequence[float]) -> None:
        self.sums = {name: self.sums[name] + value for name, value in sums.items()}
        self.norms.append(list(norms))

    def metrics(
        self,
        experience: Experience,
        *,
        update: int,
        updates: int,
        elapsed_s: float,
        kl_coef: float,
        actor: Engine,
        critic: Engine | None,
    ) -> Metrics:
        """Return the rollout's numbers, and its training's numbers if any update was applied.

        Without a critic there are no numbers of it.
        """
        rollout = Metrics(
            step=3,
            update=update,
            updates=updates,
            elapsed_s=elapsed_s,
            learning_rate=actor.current_learning_rate,
            tokens_per_s=0.0,
            real_token_share=0.0,
            gpu_peak_bytes=actor.world.gpu_peak_bytes(),
            grad_norm=0.0,
            mean_reward=float(experience.scores.mean()),
            objective=float(experience.objectives.mean()),
            kl=float(experience.kl.mean()),
            kl_k3=float(kl_k3(experience.old_log_probs, experience.ref_log_probs, experience.mask).mean()),
            kl_coef=kl_coef,
            critic_learning_rate=critic.current_learning_rate if critic is not None else None,
            entropy=self.entropy,
            judge_score=self.judge_score,
            response_length=float(experience.mask.sum(1).float().mean()),
            eos_share=float(experience.ended.float().mean()),
            rollout_s=self.rollout_s,
            score_s=self.score_s,
        )
        count, sums = self.trained_updates, self.sums
        if not count:
            return rollout
        if critic is not None:
            rollout = replace(
                rollout,
                critic_grad_norm=float(np.mean([norms[1] for norms in self.norms])),
                value_loss=sums["value_loss"] / count,
                value_clip_fraction=sums["value_clipped"] / sums["tokens"],
                explained_variance=explained_variance(sums),
            )
        return replace(
            rollout,
            tokens_per_s=sums["trained"] / (self.rollout_s + self.score_s + self.train_s),
            real_token_share=(sums["trained"] + self.scored) / (sums["computed"] + self.scored_computed),
            grad_norm=float(np.mean([norms[0] for norms in self.norms])),
            policy_loss=sums["policy_loss"] / count,
            ratio=sums["ratio"] / sums["tokens"],
            clip_fraction=sums["clipped"] / sums["tokens"],
            entropy=self.entropy if self.entropy is not None else sums["entropy"] / len(experience.prompts),
            train_s=self.train_s,
        )


def explained_variance(sums: Mapping[str, float]) -> float | None:
    """Return 1 - mean (G - V)^2 / variance of G, over tokens; None if all G are equal.

    G: the rewards from a token on. V: the critic's value there when the rollout was made. sums: of
    G, G^2 and (G - V)^2, as `to_go`, `to_go_squared` and `value_error`.
    """
    mean = sums["to_go"] / sums["tokens"]
    variance = sums["to_go_squared"] / sums["tokens"] - mean**2
    return 1 - sums["value_error"] / sums["tokens"] / variance if variance > 0 else None


@dataclass
class LoopState:
    """Where the loop stands: the numbers before training, the present rollout, and the clocks."""

    before: Summary  # of the held-out answers, before training
    kl_coef: float
    shift: float  # every reward is (logit - shift) / scale
    scale: float
    clock: Clock  # of the whole step
    training: Clock  # of the loop alone
    rollout_micro_batch: int  # concurrent prompts, on the rank with least memory
    reference: str = ""  # sha256 of its weights; "": a checkpoint of an older version
    tally: Tally = field(default_factory=Tally)
    experience: Experience | None = None  # the rollout; None: the next update begins with a new one
    is_tested: bool = False  # a rollout of this process passed the self-test; not saved: a resume may run elsewhere

    @classmethod
    def read(cls, saved: Mapping[str, Any], tensors: Mapping[str, Tensor], rollout_micro_batch: int) -> LoopState:
        """Read back `numbers` and `tensors` from a checkpoint."""
        tally = Tally.read(saved["tally"])
        return cls(
            before=Summary(**_known(_names(Summary), saved["before"])),
            kl_coef=saved["kl_coef"],
            shift=saved["shift"],
            scale=saved["scale"],
            clock=Clock(saved["seconds"]),
            training=Clock(saved["elapsed_s"]),
            rollout_micro_batch=rollout_micro_batch,
            reference=saved.get("reference", ""),
            tally=tally,
            experience=Experience.from_tensors(tensors) if tally.updates else None,  # between two updates of a rollout
        )

    def numbers(self) -> dict[str, Any]:
        """Return what a checkpoint holds besides tensors, as plain values."""
        return {
            "before": asdict(self.before),
            "kl_coef": self.kl_coef,
            "shift": self.shift,
            "scale": self.scale,
            "reference": self.reference,
            "tally": asdict(self.tally),
            "elapsed_s": self.training(),
            "seconds": self.clock(),
        }

    def tensors(self) -> dict[str, Tensor]:
        """Return the rollout's tensors; none between two rollouts."""
        return self.experience.tensors() if self.experience is not None else {}

    def end_rollout(self) -> None:
        """Forget the rollout: the next update begins with a new one."""
        self.tally = Tally()
        self.experience = None


def _names(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)]


def _known(names: Iterable[str], saved: Mapping[str, Any]) -> dict[str, Any]:
    return {name: saved[name] for name in names if name in saved}
