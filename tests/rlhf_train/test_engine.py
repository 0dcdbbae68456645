"""Real DeepSpeed engines on one rank against plain PyTorch; two ranks are in tests/integration/test_ranks.py and test_export.py."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import deepspeed
import pytest
import torch
from torch import Tensor, nn

from jobs.spec import Optimization, Scratch
from rlhf_train.batch import BatchPlan, Sequences
from rlhf_train.engine import DTYPES, Ema, Engine, copy_weights, full_state, learning_rate_factor
from rlhf_train.models import ActorForward, load_causal, train_tokenizer
from rlhf_train.world import World
from tests import tiny

STAGES = [0, 1, 2, 3]


def spec(**fields: Any) -> Optimization:
    return Optimization(**fields)


@pytest.fixture(scope="module")
def make_model() -> Callable[..., Any]:
    """The same small OPT each time, in a precision."""
    tokenizer = train_tokenizer(tiny.WORDS, 320)
    return lambda precision="float32": load_causal(Scratch(config=tiny.OPT), tokenizer, DTYPES[precision], 5)


def engine(model: Any, world: World, optimization: Optimization, *, micro_batch: int = 4, stage: int = 0, precision: str = "float32") -> Engine:
    plan = BatchPlan.of(4, micro_batch, 1, "sft")
    return Engine(ActorForward(model), optimization, 1e-2, 12, plan, precision=precision, zero_stage=stage, world=world)


def rows(which: slice = slice(None), seed: int = 0) -> Sequences:
    """Some of four prompts with answers of different lengths."""
    numbers = torch.Generator().manual_seed(seed)
    lengths = [(5, 7), (8, 3), (2, 1), (3, 6)]
    made = [[torch.randint(4, 260, (n,), generator=numbers).numpy() for n in pair] for pair in lengths][which]
    return Sequences.of([p for p, _ in made], [r for _, r in made], 1, torch.device("cpu"))


TOKENS = 7 + 3 + 1 + 6


def plain_loss(model: Any, batch: Sequences) -> Tensor:
    """Cross-entropy of the answers, mean over tokens, by transformers and PyTorch alone."""
    logits = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, :-1].float()
    labels = batch.input_ids[:, 1:].clone()
    position = torch.arange(1, batch.input_ids.shape[1])
    labels[(position < batch.prompt_lengths[:, None]) | (position >= batch.lengths[:, None])] = -100
    return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())


def update(trained: Engine, micro_batch: int, seed: int = 0) -> tuple[float, float, list[Tensor]]:
    """One optimizer update -> loss, gradient norm, and the whole gradients before it."""
    loss, norm = 0.0, None
    for start in range(0, 4, micro_batch):
        part = -trained(rows(slice(start, start + micro_batch), seed))[0].sum() / TOKENS
        trained.backward(part)
        loss += part.item()
        if start + micro_batch == 4:
            gradients = [deepspeed.utils.safe_get_full_grad(p).clone() for p in trained.module.parameters()]
            norm = trained.step()
        else:
            assert trained.step() is None
    assert norm is not None
    return loss, norm, gradients


# --- the learning rate ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "expected"),  # of updates 0 to 7 of 8
    [
        ({"schedule": "constant"}, [1, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]),
        ({"schedule": "linear", "warmup_updates": 4}, [0.25, 0.5, 0.75, 1, 1, 0.75, 0.5, 0.25]),
        ({"schedule": "linear", "warmup_updates": 4, "final_learning_rate": 0.2}, [0.25, 0.5, 0.75, 1, 1, 0.8, 0.6, 0.4]),
        # (1 + cos 0°, 45°, 90°, 135°) / 2
        ({"schedule": "cosine", "warmup_updates": 4}, [0.25, 0.5, 0.75, 1, 1, 0.853553, 0.5, 0.146447]),
        ({"schedule": "cosine", "warmup_updates": 4, "final_learning_rate": 0.5}, [0.25, 0.5, 0.75, 1, 1, 0.926777, 0.75, 0.573223]),
        ({"schedule": "constant", "warmup_updates": 2, "final_learning_rate": 0.5}, [0.5, 1, 1, 1, 1, 1, 1, 1]),
        ({"schedule": "cosine", "warmup_updates": 16}, [n / 16 for n in range(1, 9)]),  # the end comes before the top
    ],
)
def test_learning_rate_by_hand(fields: dict[str, Any], expected: list[float]) -> None:
    assert [learning_rate_factor(n, 8, spec(**fields)) for n in range(8)] == pytest.approx(expected, abs=1e-6)


# --- gradients -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_the_gradient_is_that_of_plain_pytorch(world: World, make_model: Callable[..., Any], micro_batch: int, stage: int) -> None:
    plain = make_model()
    expected_loss = plain_loss(plain, rows())
    expected_loss.backward()
    expected = [p.grad for p in plain.parameters()]
    loss, norm, gradients = update(engine(make_model(), world, spec(), micro_batch=micro_batch, stage=stage), micro_batch)

    assert loss == pytest.approx(expected_loss.item(), rel=1e-6)
    for found, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-7)
    # Before clipping (to 1).
    assert norm == pytest.approx(torch.cat([g.flatten() for g in expected]).norm().item(), rel=1e-5)
    assert norm > 1


@pytest.mark.parametrize("stage", STAGES)
def test_updates_are_those_of_plain_adamw(world: World, make_model: Callable[..., Any], stage: int) -> None:
    """Three updates: clipping, the schedule, betas and decay of matrices only."""
    optimization = spec(schedule="linear", warmup_updates=2, weight_decay=0.1, betas=(0.8, 0.9), max_grad_norm=0.3)
    plain = make_model()
    matrices, others = ([p for p in plain.parameters() if (p.ndim >= 2) is wanted] for wanted in (True, False))
    adamw = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}], betas=(0.8, 0.9))
    model = make_model()
    trained = engine(model, world, optimization, micro_batch=2, stage=stage)
    for n, rate in enumerate((0.5e-2, 1e-2, 1e-2)):
        loss, _, _ = update(trained, 2, seed=n)
        expected_loss = plain_loss(plain, rows(seed=n))
        assert loss == pytest.approx(expected_loss.item(), rel=1e-5)
        assert trained.current_learning_rate == pytest.approx(rate)
        adamw.zero_grad()
        expected_loss.backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.3)
        for group in adamw.param_groups:
            group["lr"] = rate
        adamw.step()
    found = full_state(model, keep=True)
    for name, wanted in plain.named_parameters():
        if not name.endswith("k_proj.bias"):  # no attention sees it: its gradient is rounding, which AdamW blows up
            torch.testing.assert_close(found[name], wanted.data, rtol=0, atol=1e-5)  # they moved by about 2.5e-2


@pytest.mark.parametrize("stage", STAGES)
def test_only_matrices_decay(world: World, make_model: Callable[..., Any], stage: int) -> None:
    model = make_model()
    start = full_state(model, keep=True)
    trained = engine(model, world, spec(weight_decay=0.5, schedule="constant"), stage=stage)
    trained.backward(trained(rows())[0].sum() * 0.0)
    trained.step()
    for name, value in full_state(model, keep=True).items():
        torch.testing.assert_close(value, start[name] * (1 - 1e-2 * 0.5 if value.ndim == 2 else 1), rtol=1e-6, atol=0)


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bfloat16_follows_float32(world: World, make_model: Callable[..., Any], stage: int) -> None:
    """Weights, activations and gradients have 8 bits (relative error 2^-9 each); the optimizer's copy has 24."""
    model = make_model("bfloat16")
    small, whole = (engine(m, world, spec(), stage=s, precision=p) for m, s, p in ((model, stage, "bfloat16"), (make_model(), 0, "float32")))
    for _ in range(5):
        (loss, norm, _), (expected_loss, expected_norm, _) = update(small, 4), update(whole, 4)
        assert loss == pytest.approx(expected_loss, rel=0.01)
        assert norm == pytest.approx(expected_norm, rel=0.03)
    assert expected_loss < 4  # of 6 at the start: they went somewhere together
    assert {value.dtype for value in full_state(model, keep=True).values()} == {torch.bfloat16}


# --- weights out of an engine ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_whole_weights(world: World, make_model: Callable[..., Any], stage: int) -> None:
    model, copied = make_model(), make_model()
    expected = {name: value.clone() for name, value in model.state_dict().items() if name != "lm_head.weight"}  # tied: it stands once
    for parameter in copied.parameters():
        parameter.data.zero_()
    trained = engine(model, world, spec(), stage=stage)
    state = full_state(model, keep=True)
    assert list(state) == list(expected)
    assert all(state[name].equal(value) for name, value in expected.items())
    assert full_state(model, keep=False) == {}
    copy_weights(trained, copied)
    assert all(copied.state_dict()[name].equal(value) for name, value in expected.items())
    update(trained, 4)
    assert all(state[name].equal(value) for name, value in expected.items())  # a copy, not a view
    assert not full_state(model, keep=True)["model.decoder.final_layer_norm.weight"].equal(state["model.decoder.final_layer_norm.weight"])


def test_ema_by_hand() -> None:
    module = nn.Linear(2, 1)
    module.bias.requires_grad_(False)  # not trained: not averaged
    with torch.no_grad():
        module.weight.fill_(1.0)
        module.bias.fill_(7.0)
        ema = Ema(module, 0.75)
        for value in (2.0, 3.0):
            module.weight.fill_(value)
            ema.update()
    with pytest.raises(KeyboardInterrupt), ema.applied():
        assert module.weight.tolist() == [[1.6875, 1.6875]]  # 0.75 (0.75 x 1 + 0.25 x 2) + 0.25 x 3
        assert module.bias.tolist() == [7.0]
        raise KeyboardInterrupt
    assert module.weight.tolist() == [[3.0, 3.0]]


def test_ema_of_bfloat16_is_kept_in_float32() -> None:
    """In bfloat16 0.01 of a step of 2^-8 would be lost each time."""
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        module.weight.fill_(1.0)
        ema = Ema(module, 0.99)
        module.weight.fill_(1.0 + 2**-7)
        for _ in range(500):
            ema.update()
    with ema.applied():
        assert module.weight.item() == 1.0 + 2**-7  # 1 - 0.99^500 = 0.993 of the way, rounded
    assert copy.deepcopy(module).weight.dtype == torch.bfloat16
