"""Test forward passes against Hugging Face, LoRA's merge against PEFT's forward, and tokenizers."""

import copy
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers.normalizers import Lowercase
from tokenizers.processors import TemplateProcessing
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from jobs.errors import ExitCode, ToolkitError
from jobs.spec import Lora, Scratch
from rlhf_train import compat
from rlhf_train.data.sequences import Sequences
from rlhf_train.models.adapters import add_lora
from rlhf_train.models.networks import (
    ActorForward,
    ScoreForward,
    check_lengths,
    check_same_tokenizer,
    checkpoint_activations,
    last_scores,
    load_causal,
    load_config,
    load_scorer,
    load_tokenizer,
    padding,
    train_tokenizer,
)
from tests import tiny
from tests.hub import Hub

pytestmark = pytest.mark.pinned

CPU = torch.device("cpu")
CONFIG = {
    "model_type": "opt",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "word_embed_proj_dim": 32,
    "init_std": 0.2,
}
SCRATCH = Scratch(config=CONFIG | {"max_position_embeddings": 64})
TEXTS = ["\n\nHuman: What colour is snow?\n\nAssistant:", " The colour of snow is white.", " I do not know </s> that."]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS * 20, 320)


@pytest.fixture(scope="module")
def actor(tokenizer):
    return load_causal(SCRATCH, tokenizer, torch.float32, seed=0)


@pytest.fixture
def texts():
    """Prompts and responses."""
    rng = np.random.RandomState(0)
    draw = lambda low, high: [rng.randint(5, 300, rng.randint(low, high)) for _ in range(4)]  # noqa: E731
    return draw(2, 9), draw(1, 7)


@pytest.fixture
def batch(texts):
    return Sequences.of(*texts, 1, CPU)


def rows_of(batch):
    """Each row without padding: (ids, prompt length)."""
    return [
        (batch.input_ids[i, : batch.lengths[i]][None], int(batch.prompt_lengths[i]))
        for i in range(len(batch.input_ids))
    ]


@pytest.mark.parametrize("from_prompt", [False, True])
def test_actor_log_probs_are_those_of_unpadded_rows(actor, batch, from_prompt):
    log_probs, entropies = ActorForward(actor)(batch, from_prompt=from_prompt, temperature=0.7, with_entropy=True)
    expected, spread = [], []
    for ids, prompt in rows_of(batch):
        logits = actor(ids).logits[0, :-1] / 0.7
        start = 0 if from_prompt else prompt - 1
        p = logits.softmax(-1)[start:]
        expected.append(p.log()[torch.arange(len(p)), ids[0, start + 1 :]])
        spread.append(-(p * p.log()).sum(-1))
    torch.testing.assert_close(log_probs, torch.cat(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropies, torch.cat(spread), rtol=1e-4, atol=1e-4)


def test_dropout_is_off_so_that_training_mode_changes_nothing(actor, batch):
    assert actor.config.dropout == 0.0
    assert actor.config.attention_dropout == 0.0
    actor.train()
    first, second = ActorForward(actor)(batch)[0], ActorForward(actor)(batch)[0]
    actor.eval()
    assert torch.equal(first, second)


@pytest.fixture(scope="module")
def scorer(tokenizer):
    return load_scorer(SCRATCH, tokenizer, torch.float32, seed=0).eval()


def test_last_score_is_the_logit_of_transformers_classifier(scorer, batch):
    ours = last_scores(ScoreForward(scorer)(batch)[0], batch)
    theirs = scorer(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits.squeeze(-1)
    torch.testing.assert_close(ours, theirs)
    alone = torch.stack([scorer(input_ids=ids).logits[0, 0] for ids, _ in rows_of(batch)])
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-5)


def test_shift_and_scale_apply_to_every_score(scorer, batch):
    plain, _ = ScoreForward(scorer)(batch)
    scaled, _ = ScoreForward(scorer, shift=2.0, scale=4.0)(batch)
    torch.testing.assert_close(scaled, (plain - 2.0) / 4.0)


def test_lm_head_of_the_reward_model_is_the_tied_embedding(tokenizer, batch):
    causal = load_causal(SCRATCH, tokenizer, torch.float32, seed=3).eval()
    scorer = load_scorer(SCRATCH, tokenizer, torch.float32, seed=4).eval()
    scorer.model.load_state_dict(causal.model.state_dict())
    _, log_probs = ScoreForward(scorer, with_lm=True)(batch, lm_rows=2)
    expected = ActorForward(causal)(
        Sequences(batch.input_ids[:2], batch.host_prompt_lengths[:2], batch.host_response_lengths[:2])
    )[0]
    torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)


def test_lm_coef_is_refused_without_tied_embeddings(tokenizer):
    config = {
        "model_type": "llama",
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 64,
    }
    scorer = load_scorer(Scratch(config=config), tokenizer, torch.float32, seed=0)
    with pytest.raises(ToolkitError, match=r"reward\.lm_coef needs a model"):
        ScoreForward(scorer, with_lm=True)


def test_new_score_head_is_drawn_with_the_stated_spread(tokenizer):
    wide = Scratch(config=CONFIG | {"hidden_size": 1024, "word_embed_proj_dim": 1024, "num_hidden_layers": 1})
    weight = load_scorer(wide, tokenizer, torch.float32, seed=0).score.weight
    assert weight.std().item() == pytest.approx(1 / math.sqrt(1025), rel=0.1)
    assert abs(weight.mean().item()) < 3 / 1025


def test_a_head_of_16_bits_computes_in_float32(tokenizer):
    scorer = load_scorer(Scratch(config=tiny.OPT), tokenizer, torch.bfloat16, 1)
    states = torch.randn(1024, scorer.score.in_features, generator=torch.Generator().manual_seed(0)).bfloat16()
    scores = scorer.score(states)
    assert scores.dtype == torch.float32 and scorer.score.weight.dtype == torch.bfloat16
    exact = states.double() @ scorer.score.weight.double().T
    torch.testing.assert_close(scores.double(), exact, rtol=0, atol=1e-5)
    assert len(scores.unique()) > 1000  # in bfloat16: some 500


def test_a_trained_head_is_kept_and_a_causal_model_gets_a_new_one(tokenizer, scorer, actor, tmp_path):
    scorer.save_pretrained(tmp_path / "scorer")
    actor.save_pretrained(tmp_path / "actor")
    again = load_scorer(str(tmp_path / "scorer"), tokenizer, torch.float32, seed=99)
    assert torch.equal(again.score.weight, scorer.score.weight)
    fresh = load_scorer(str(tmp_path / "actor"), tokenizer, torch.float32, seed=99)
    assert fresh.score.weight.shape == (1, 32)
    assert torch.equal(fresh.model.decoder.embed_tokens.weight, actor.model.decoder.embed_tokens.weight)


def test_a_head_that_the_weights_lack_is_refused_or_drawn_whatever_the_config_says(tokenizer, scorer, tmp_path):
    state = {name: value for name, value in scorer.state_dict().items() if name != "score.weight"}
    scorer.save_pretrained(tmp_path, state_dict=state)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ToolkitError, match=r"it has no head: its weights lack `score\.weight`"):
        load_scorer(str(tmp_path), tokenizer, torch.float32, seed=5, needs_head=True)
    head = load_scorer(str(tmp_path), tokenizer, torch.float32, seed=5).score.weight
    drawn = torch.randn(head.shape, generator=torch.Generator().manual_seed(5)) / math.sqrt(head.shape[1] + 1)
    torch.testing.assert_close(head.detach(), drawn, rtol=0, atol=0)


def test_trained_tokenizer_round_trips_any_text(tokenizer, tmp_path):
    text = "Grüße, 你好 \x00\t</s> 🙂 snow"
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer("snow")["input_ids"][0] == tokenizer.bos_token_id == tokenizer.eos_token_id
    tokenizer.save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()


def test_padding_gets_a_token_of_its_own(tokenizer, tmp_path):
    without = copy.deepcopy(tokenizer)
    without.pad_token = without.eos_token
    without.save_pretrained(tmp_path)
    loaded = load_tokenizer(str(tmp_path))
    assert loaded.pad_token == "<pad>"
    assert loaded.pad_token_id != loaded.eos_token_id


def test_embeddings_grow_for_an_added_padding_token(tmp_path, tokenizer):
    config = OPTConfig(
        **{k: v for k, v in CONFIG.items() if k != "model_type"},
        vocab_size=len(tokenizer) - 1,
        max_position_embeddings=64,
    )
    OPTForCausalLM(config).save_pretrained(tmp_path)
    assert load_causal(str(tmp_path), tokenizer, torch.float32, seed=0).get_input_embeddings().num_embeddings == len(
        tokenizer
    )


def test_missing_models_are_named_with_a_next_step(tmp_path):
    with pytest.raises(ToolkitError) as caught:
        load_tokenizer(str(tmp_path / "nothing"))
    assert str(tmp_path / "nothing") in caught.value.what
    assert "name a model's folder" in caught.value.hint


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("config", "what", "why"),
    [
        ({"model_type": "qwen3"}, "cannot be trained with transformers 4", "it has no Qwen 3"),
        (
            {"model_type": "qwen2", "max_position_embeddings": 64, "rope_parameters": YARN},
            "is another model for transformers 4",
            "its rope_scaling is YaRN from 16 positions to 64, which this version does otherwise",
        ),
    ],
)
def test_what_transformers_4_lacks_or_misreads_is_refused_before_a_download(
    tmp_path: Path, config: dict[str, Any], what: str, why: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    if not compat.READS_OLD_SPELLINGS:
        assert load_config(str(tmp_path)).model_type == config["model_type"]
        return
    with pytest.raises(ToolkitError) as refused:
        load_config(str(tmp_path))
    assert refused.value.exit_code == ExitCode.UNFIT and what in refused.value.what
    assert refused.value.why == why and "cu130" in refused.value.hint


def test_bad_config_is_refused(tokenizer):
    with pytest.raises(ToolkitError, match="refused by transformers"):
        load_causal(Scratch(config={"model_type": "no-such-family"}), tokenizer, torch.float32, seed=0)


def test_lengths_beyond_the_positions_are_refused(actor):
    check_lengths(actor, 32, 32)
    with pytest.raises(ToolkitError, match="do not fit the model"):
        check_lengths(actor, 33, 32)


def test_other_tokenizers_are_refused(tokenizer):
    check_same_tokenizer(tokenizer, tokenizer)
    with pytest.raises(ToolkitError, match="different tokenizers"):
        check_same_tokenizer(tokenizer, train_tokenizer(["quite another text"] * 20, 300))


def other_end(tokenizer):
    tokenizer.eos_token = "<pad>"


def nothing_in_front(tokenizer):
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="$A")


def one_more(tokenizer):
    tokenizer.add_tokens(["<tool>"])


def lower_case(tokenizer):
    tokenizer.backend_tokenizer.normalizer = Lowercase()


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (other_end, "an answer of the actor ends with </s>, one of the reward model with <pad>"),
        (nothing_in_front, "the actor begins a text with the tokens ['</s>'], the reward model with []"),
        (one_more, "the reward model has 1 token that the actor lacks: <tool>"),
        (lower_case, "the actor and the reward model cut the same text into other tokens"),
    ],
)
def test_the_reason_why_two_tokenizers_differ_is_true(tokenizer, change, why):
    """All tokens that both have keep their numbers."""
    other = copy.deepcopy(tokenizer)
    change(other)
    with pytest.raises(ToolkitError) as caught:
        check_same_tokenizer(tokenizer, other)
    assert caught.value.why == why


WIDE_OPT = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "dropout": 0.0,
    "init_std": 0.2,
}
LLAMA_LIKE: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {"sliding_window": 4, "head_dim": 12},  # a row of 9 tokens is longer
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 3},
    "qwen3": {"head_dim": 12, "num_key_value_heads": 1, "tie_word_embeddings": True},
    "smollm3": {"no_rope_layers": [1, 0], "num_key_value_heads": 4, "pad_token_id": 1},
    "granite": {"residual_multiplier": 0.3, "attention_multiplier": 0.2, "embedding_multiplier": 3.0},
}


def llama_like(family, **more):
    """Make a tiny model whose norms' weights and biases are not what they start as."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"vocab_size": 300, "intermediate_size": 64, "initializer_range": 0.2}
    config = AutoConfig.for_model(family, **{**sizes, **LLAMA_LIKE[family], **more})
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model


FAMILIES = {
    "opt": lambda: OPTForCausalLM(OPTConfig(**WIDE_OPT, word_embed_proj_dim=32)),
    "opt-350m": lambda: OPTForCausalLM(OPTConfig(**WIDE_OPT, word_embed_proj_dim=16, do_layer_norm_before=False)),
    **{family: partial(llama_like, family) for family in LLAMA_LIKE if family in CONFIG_MAPPING},
}


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


PADDED, PACKED = "padded", "packed"


def laid_out(layout, texts, tokenizer, *models):
    """Packed where these libraries can."""
    pad_id = padding(tokenizer, *models) if layout == PACKED else tokenizer.pad_token_id
    assert (pad_id is None) == (layout == PACKED and compat.hands_keywords_to_layers())
    return Sequences.of(*texts, pad_id, CPU)


@pytest.mark.parametrize("layout", [PADDED, PACKED])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_learns_from_a_batch_what_it_learns_from_rows_alone(family, layout, texts, batch, tokenizer):
    """Values and gradients; no mask hides the padding, and no row sees another."""
    torch.manual_seed(0)
    ours = FAMILIES[family]()
    theirs = copy.deepcopy(ours)
    log_probs, _ = ActorForward(ours)(laid_out(layout, texts, tokenizer, ours))
    rows = [
        theirs(ids).logits[0, :-1].log_softmax(-1)[torch.arange(ids.shape[1] - 1), ids[0, 1:]][prompt - 1 :]
        for ids, prompt in rows_of(batch)
    ]
    expected = torch.cat(rows)
    torch.testing.assert_close(log_probs, expected, rtol=1e-5, atol=1e-5)
    weights = torch.arange(1.0, len(expected) + 1)
    for found in (log_probs, expected):
        (weights * found).sum().backward()
    found, wanted = gradients(ours), gradients(theirs)
    for name in wanted:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layout", [PADDED, PACKED])
def test_layers_that_are_computed_again_give_adapters_the_same_gradient(layout, texts, tokenizer, actor):
    adapted = add_lora(copy.deepcopy(actor), Lora(rank=4), seed=0).train()
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(len(name)))
    again, padded = copy.deepcopy(adapted), copy.deepcopy(adapted)
    checkpoint_activations(again)
    for model, how in ((adapted, layout), (again, layout), (padded, PADDED)):
        ActorForward(model)(laid_out(how, texts, tokenizer, model))[0].sum().backward()
    wanted = {name: gradient for name, gradient in gradients(adapted).items() if gradient is not None}
    assert wanted
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients(again)[name], gradient, rtol=1e-4, atol=1e-5)
        difference = gradients(padded)[name] - gradient  # packed, q is scaled after its product with k
        assert difference.norm() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("family", [name for name in ("qwen3", "smollm3", "granite") if name in FAMILIES])
def test_layers_that_are_computed_again_give_the_same_gradients(family, texts, tokenizer):
    torch.manual_seed(0)
    kept = FAMILIES[family]().train()
    again = copy.deepcopy(kept)
    checkpoint_activations(again)
    log_probs = [ActorForward(model)(laid_out(PACKED, texts, tokenizer, model))[0] for model in (kept, again)]
    assert torch.equal(*log_probs)
    for found in log_probs:
        found.sum().backward()
    for name, gradient in gradients(kept).items():
        torch.testing.assert_close(gradients(again)[name], gradient, rtol=0, atol=0)


def test_scores_of_packed_rows_are_those_of_padded_ones(texts, tokenizer):
    scorer = load_scorer(SCRATCH, tokenizer, torch.float32, seed=0).eval()
    forward = ScoreForward(scorer, with_lm=True)
    padded, packed = (laid_out(layout, texts, tokenizer, scorer) for layout in (PADDED, PACKED))
    found, found_lm = forward(packed, lm_rows=2)
    expected, expected_lm = forward(padded, lm_rows=2)
    torch.testing.assert_close(last_scores(found, packed), last_scores(expected, padded), rtol=1e-5, atol=1e-5)
    real = padded.attention_mask.bool()
    torch.testing.assert_close(packed.by_row(found)[real], padded.by_row(expected)[real], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_lm, expected_lm, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["opt", "opt-350m", "llama"])
def test_the_last_layer_of_packed_rows_ends_with_the_tokens_that_are_asked_of(family, texts, tokenizer):
    torch.manual_seed(0)
    model = FAMILIES[family]()
    packed = laid_out(PACKED, texts, tokenizer, model)
    fed = []
    for layer in model.model.layers if family == "llama" else model.model.decoder.layers:
        first = layer.mlp.up_proj if family == "llama" else layer.fc1
        first.register_forward_pre_hook(lambda _, inputs: fed.append(inputs[0][..., 0].numel()))
    index, _ = packed.predicted()
    ActorForward(model)(packed)
    computed = packed.input_ids.numel()
    assert fed == [computed, len(index) if compat.hands_keywords_to_layers() else computed]
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert ActorForward(copied)(packed)[0].std() > 0  # the copy's last layer reads the copy's weights


@pytest.mark.parametrize("layout", [PADDED, PACKED])
def test_a_score_after_some_tokens_is_theirs_among_all(layout, texts, tokenizer):
    scorer = load_scorer(SCRATCH, tokenizer, torch.float32, seed=0).eval()
    rows, forward = laid_out(layout, texts, tokenizer, scorer), ScoreForward(scorer, shift=2.0, scale=4.0)
    for at in (rows.last(), rows.predicted()[0]):
        torch.testing.assert_close(forward(rows, at)[0], forward(rows)[0][at], rtol=1e-5, atol=1e-5)


def test_a_model_that_takes_packed_rows_is_called_as_before_otherwise(batch, tokenizer, actor, tmp_path):
    """Rollouts call it with a mask; what is saved says nothing of it."""
    packing = copy.deepcopy(actor)
    padding(tokenizer, packing)
    given = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
    assert torch.equal(packing(**given).logits, actor(**given).logits)
    packing.save_pretrained(tmp_path)
    actor.save_pretrained(tmp_path / "actor")
    assert (tmp_path / "config.json").read_text() == (tmp_path / "actor/config.json").read_text()


def test_rows_are_padded_where_one_of_the_models_cannot_have_them_packed(tokenizer, actor):
    gpt = GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=2))
    exact = copy.deepcopy(actor).double()
    for models_ in ([gpt], [copy.deepcopy(actor), gpt], [exact]):
        assert padding(tokenizer, *models_) == tokenizer.pad_token_id
        assert not any(hasattr(module, "is_last") for model in models_ for module in model.modules())


@pytest.mark.parametrize("load", [load_causal, load_scorer])
def test_a_family_without_a_padding_token_gets_one_with_a_row_of_its_own(load, tokenizer, tmp_path):
    """As LLaMA-2's tokenizer: the id that is added is the first beyond the vocabulary."""
    config = LlamaConfig(
        vocab_size=len(tokenizer) - 1, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    padded = copy.deepcopy(tokenizer)
    padded.pad_token = padded.convert_ids_to_tokens(len(tokenizer) - 1)
    model = load(str(tmp_path), padded, torch.float32, seed=0)
    assert model.config.pad_token_id == len(tokenizer) - 1 == model.get_input_embeddings().num_embeddings - 1


def test_a_model_comes_from_the_hub_by_its_name(actor, tokenizer, tmp_path):
    """The weights arrive although the hub fails twice.

    It is a fresh process, since HF_ENDPOINT is read at import.
    """
    for part in (actor, tokenizer):
        part.save_pretrained(tmp_path / "models/some/opt")
    code = (
        "import sys, torch\n"
        "from rlhf_train.models.networks import load_causal, load_tokenizer\n"
        "tokenizer = load_tokenizer('some/opt')\n"
        "model = load_causal('some/opt', tokenizer, torch.float32, 0)\n"
        "torch.save((model.state_dict(), tokenizer.get_vocab()), sys.argv[1])\n"
        "assert tokenizer.name_or_path == model.name_or_path == 'some/opt'"
    )
    with Hub(tmp_path) as hub:
        hub.fail("GET /some/opt/resolve/.*safetensors", 500, times=1)
        hub.fail("GET /some/opt/resolve/.*tokenizer.json", "flip", times=1)
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(Path(__file__).parents[3]),
        }
        command = [sys.executable, "-c", code, str(tmp_path / "got")]
        done = subprocess.run(
            command, env=os.environ | settings, capture_output=True, text=True, check=False, timeout=120
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("trying again") == 2
    state, vocabulary = torch.load(tmp_path / "got")
    assert vocabulary == tokenizer.get_vocab()
    for name, value in actor.state_dict().items():
        assert torch.equal(state[name], value), name
