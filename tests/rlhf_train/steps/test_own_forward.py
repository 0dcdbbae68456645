"""A model whose own forward does what is not known here is refused before training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.modeling_outputs import CausalLMOutput, SequenceClassifierOutput

from jobs.errors import ExitCode, ToolkitError
from jobs.events import Event, Metrics
from jobs.run_dir import RunDir
from jobs.spec import Job
from rlhf_train.data.dataset import Ragged, Table
from rlhf_train.engine.deepspeed_engine import DTYPES
from rlhf_train.models.head import find_transform
from rlhf_train.models.networks import ActorForward, ScoreForward, padding, train_tokenizer
from rlhf_train.plan.placement import Placement
from rlhf_train.ranks.collectives import World
from rlhf_train.steps.context import StepContext
from rlhf_train.steps.own_forward import check_log_probs, check_scores, example_rows, own_score, rounding_of
from tests import in_process, tiny

CPU = torch.device("cpu")
IDS: dict[str, Any] = {"vocab_size": 300, "pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 2}
SIZES: dict[str, dict[str, Any]] = {  # packed, and padded
    "llama": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0},
}
numbers = np.random.RandomState(0)
ROWS = [tuple(numbers.randint(5, 300, count) for count in counts) for counts in ((9, 6), (3, 7), (5, 2), (2, 1))]


def context_of(folder: Path, precision: str) -> StepContext:
    placement = Placement("cpu", "", 1, precision, 0, 0, (4, 4, 4), 8, 1)
    job = Job.model_validate(tiny.job(folder))
    return StepContext(job, RunDir(folder), World(0, 1, CPU), placement, folder, lambda event: None)


def make(auto: Any, family: str, precision: str) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES[family], **IDS, initializer_range=0.2, num_labels=1)
    return auto.from_config(config).to(DTYPES[precision])


def scaled_states(self: Any, input_ids: Any = None, **kwargs: Any) -> CausalLMOutput:
    """As MiniCPM: it scales the head's input, where no transform of logits shows."""
    states = self.base_model(input_ids=input_ids, **kwargs).last_hidden_state
    return CausalLMOutput(logits=self.lm_head(states * 0.5))


def mean_of_all(self: Any, input_ids: Any = None, **kwargs: Any) -> SequenceClassifierOutput:
    scores = self.score(self.base_model(input_ids=input_ids, **kwargs).last_hidden_state)
    return SequenceClassifierOutput(logits=scores.mean(1))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", SIZES)
@pytest.mark.parametrize(
    ("auto", "forward", "check", "other", "what"),
    [
        (AutoModelForCausalLM, ActorForward, check_log_probs, scaled_states, "log-probs"),
        (AutoModelForSequenceClassification, ScoreForward, check_scores, mean_of_all, "scores"),
    ],
    ids=["actor", "reward model"],
)
def test_rows_tell(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    auto: Any,
    forward: Any,
    check: Callable[..., None],
    other: Callable[..., Any],
    what: str,
    family: str,
    precision: str,
) -> None:
    context, model = context_of(tmp_path, precision), make(auto, family, precision)
    pad_id = padding(train_tokenizer(tiny.WORDS, 320), model)
    assert (pad_id is None) == (family == "llama")
    check(context, forward(model), ROWS, pad_id)
    monkeypatch.setattr(type(model), "forward", other)
    if auto is AutoModelForCausalLM:
        find_transform(model)  # it feeds the head by itself, so it sees nothing
    with pytest.raises(ToolkitError, match=f"computes its {what} in a way that is not known") as caught:
        check(context, forward(model), ROWS, pad_id)
    assert f"in the worst of 4 rows; {'0.001' if precision == 'float32' else '0.0'}" in caught.value.why
    assert caught.value.exit_code == ExitCode.USAGE


def test_the_rows_are_of_all_lengths(tmp_path: Path) -> None:
    prompts, answers = Ragged.of([[5] * n for n in range(1, 41)]), Ragged.of([[6]] * 40)
    order = np.random.RandomState(0).permutation(40)
    table = Table(prompts, answers, answers, answers, {1: order[order != 39]}, {})  # one row is not the step's
    rows = example_rows(context_of(tmp_path, "float32"), 1, table, answers)
    assert [len(prompt) for prompt, _ in rows] == [39, 27, 14, 1]


def test_step_1_ends_before_it_learns(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokenizer = tmp_path / "model", train_tokenizer(tiny.WORDS, 320)
    make(AutoModelForCausalLM, "llama", "float32").save_pretrained(model)
    tokenizer.save_pretrained(str(model))
    tree = tiny.job(tiny.write_rows(tmp_path / "rows", train=24))
    tree["actor"], events = {"model": str(model)}, list[Event]()
    monkeypatch.setattr("transformers.LlamaForCausalLM.forward", scaled_states)
    with pytest.raises(ToolkitError, match="LlamaForCausalLM computes its log-probs in a way"):
        in_process.train(world, tmp_path / "run", tree, 1, events=events)
    assert events and not any(isinstance(event, Metrics) for event in events)


def test_the_rounding_of_either_way_counts(tmp_path: Path) -> None:
    """A score is one number: ours may be exact by chance, where the model's own is not."""
    model, row = make(AutoModelForSequenceClassification, "llama", "bfloat16").eval(), ROWS[0]
    plain = make(AutoModelForSequenceClassification, "llama", "float32").eval()
    plain.load_state_dict({name: weight.float() for name, weight in model.state_dict().items()})
    exact, rounded = own_score(plain, *row), own_score(model, *row)
    expected = abs(float(exact[0]) - float(rounded[0]))
    assert expected > 0
    ways = [(numbers, lambda twin: own_score(twin, *row)) for numbers in (exact, rounded)]
    assert rounding_of(context_of(tmp_path, "bfloat16"), model, ways) == pytest.approx(expected, rel=1e-3)
    assert rounding_of(context_of(tmp_path, "bfloat16"), model, ways[:1]) < expected / 10
