"""Load the four networks as plain Hugging Face models, and run the two forward passes of training.

Dropout is 0 in every model, always: old and new log-probs must come from the same function. Padding
has a token of its own, never the EOS. `ActorForward` and `ScoreForward` exist in training only;
what is saved is the model inside them.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from env.settings import load_families
from jobs.errors import ExitCode, ToolkitError
from jobs.flavours import way_to
from jobs.formatting import plural
from jobs.spec import Scratch
from rlhf_train import compat
from rlhf_train.data import hub
from rlhf_train.data.sequences import Sequences
from rlhf_train.disk import read_json
from rlhf_train.kernels import cpu_matmul
from rlhf_train.models import packed_attention, spellings
from rlhf_train.models.head import LogitTransform, find_transform, transform_of
from rlhf_train.models.log_probs import label_log_probs

# --- tokenizers ----------------------------------------------------------------------------------


def load_tokenizer(source: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a model, with a padding token of its own."""
    try:
        tokenizer = _load(AutoTokenizer.from_pretrained, source, hub.tokenizer_files)
        is_there = bool(tokenizer("a")["input_ids"])  # transformers 5 makes an empty one where there is none
    except TypeError:  # transformers 4 opens a file whose name is None
        is_there = False
    if not is_there:
        raise ToolkitError(
            f"{source} has no tokenizer",
            why="there is no tokenizer.json, nor another file of one",
            hint="copy it from the model that this one was trained from",
        )
    if tokenizer.eos_token_id is None:
        raise ToolkitError(
            f"the tokenizer of {source} has no EOS token",
            why="a response must be able to end",
            hint="choose a model whose tokenizer has one",
        )
    tokenizer.clean_up_tokenization_spaces = False  # transformers 4 takes away spaces; 5 never does
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    return tokenizer


def train_tokenizer(texts: Any, vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer with OPT's special tokens.

    `</s>` begins a prompt and ends an answer.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    # Every byte is in the alphabet: no text is unknown, whatever the training rows lacked.
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single="</s> $A", special_tokens=[("</s>", bpe.token_to_id("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
        # transformers 4 would add token_type_ids, which no model here takes.
        model_input_names=["input_ids", "attention_mask"],
    )


# --- loading ------------------------------------------------------------------------------------


def load_causal(model: str | Scratch, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, seed: int) -> Any:
    """Load an AutoModelForCausalLM from a hub or a folder, or make one with random weights."""
    config, dtype_argument = _config(model, tokenizer), compat.dtype_argument(dtype)
    if isinstance(model, Scratch):
        torch.manual_seed(seed)
        loaded = AutoModelForCausalLM.from_config(config, **dtype_argument)
    else:
        loaded = _load(AutoModelForCausalLM.from_pretrained, model, hub.model_files, config=config, **dtype_argument)
        loaded = _fit_vocabulary(loaded, tokenizer)
    loaded.logit_transform = find_transform(loaded)
    return cpu_matmul.use_in(loaded)


def load_scorer(
    model: str | Scratch, tokenizer: PreTrainedTokenizerFast, dtype: torch.dtype, seed: int, *, needs_head: bool = False
) -> Any:
    """Load or make an AutoModelForSequenceClassification with one label.

    A head that the weights lack starts at N(0, 1/sqrt(d + 1)). needs_head: it is refused instead.
    """
    config, dtype_argument = _config(model, tokenizer), compat.dtype_argument(dtype)
    has_head = False
    if isinstance(model, str):
        _check_labels(model, config)
    config.num_labels = 1
    torch.manual_seed(seed)
    if isinstance(model, Scratch):
        scorer = AutoModelForSequenceClassification.from_config(config, **dtype_argument)
    else:
        load = partial(AutoModelForSequenceClassification.from_pretrained, output_loading_info=True)
        scorer, info = _load(load, model, hub.model_files, config=config, **dtype_argument)
        has_head = HEAD not in info["missing_keys"]
        scorer = _fit_vocabulary(scorer, tokenizer)
    if not isinstance(getattr(scorer, "score", None), nn.Module):
        raise ToolkitError(
            f"a reward model cannot be made from {type(scorer).__name__}",
            why="its head is not the linear layer `score`",
            hint="use OPT, LLaMA, Mistral, Qwen2 or a model built like them",
        )
    if needs_head and not has_head:
        raise no_head(str(model))
    if not has_head:
        head = scorer.score.weight
        values = torch.randn(head.shape, generator=torch.Generator().manual_seed(seed)) / math.sqrt(head.shape[1] + 1)
        head.data.copy_(values)
    if type(scorer.score) is nn.Linear:
        scorer.score.__class__ = Float32Head
    return cpu_matmul.use_in(scorer)


def language_transform(scorer: Any) -> LogitTransform:
    """Return what the causal model of a reward model's family does to its logits.

    It is measured on one layer with random weights.
    """
    config = copy.deepcopy(scorer.config)
    config.num_hidden_layers = 1
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:1]
    return find_transform(AutoModelForCausalLM.from_config(config))


def _config(model: str | Scratch, tokenizer: PreTrainedTokenizerFast) -> Any:
    if isinstance(model, Scratch):
        fields = dict(model.config)
        _check_reading("actor.model.config or critic.model.config", fields)
        try:
            config = AutoConfig.for_model(fields.pop("model_type"), vocab_size=len(tokenizer), **fields)
        except (ValueError, TypeError) as error:
            raise ToolkitError(
                "the model's config is refused by transformers",
                why=str(error).splitlines()[0],
                hint="see actor.model.config and critic.model.config in the job file",
            ) from None
    else:
        config = load_config(model)
    for name, value in config.to_dict().items():
        is_dropout = name.endswith("dropout") or name in ("layerdrop", "attn_pdrop", "embd_pdrop", "resid_pdrop")
        if is_dropout and isinstance(value, float | int):
            setattr(config, name, 0.0)
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    # A padding token that was added has no row in the embedding yet: see `_fit_vocabulary`.
    config.pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id < config.vocab_size else None
    return config


def _fit_vocabulary(model: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Make room in the embedding for a padding token that was added.

    It never gets smaller: OPT keeps 50272 rows for 50265 tokens.
    """
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    model.config.pad_token_id = tokenizer.pad_token_id
    return model


def _load(load: Any, source: str, wanted: hub.Wanted, **kwargs: Any) -> Any:
    folder = hub.model(source, wanted)
    _check_folder(source, Path(folder))
    _check_reading(source, read_json(Path(folder) / "config.json") or {})
    try:
        with (spellings.readable if compat.READS_OLD_SPELLINGS else nullcontext)(Path(folder)) as readable:
            loaded = load(str(readable), trust_remote_code=False, **kwargs)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        hint = "config.json, model.safetensors and tokenizer.json belong there"
        hint = f"look into the folder: {hint}" if hub.local(source) else f"choose another model: {hint}"
        raise ToolkitError(f"cannot load {source}", why=reason, hint=hint, exit_code=ExitCode.USAGE) from error
    (loaded[0] if isinstance(loaded, tuple) else loaded).name_or_path = source
    return loaded


def _check_folder(source: str, folder: Path) -> None:
    """Raise ToolkitError if a folder holds an adapter only, or a model that needs its own code."""
    adapter, config = read_json(folder / "adapter_config.json"), read_json(folder / "config.json")
    if adapter is not None and config is None:
        base = adapter.get("base_model_name_or_path") or "BASE"
        raise ToolkitError(
            f"{source} is a LoRA adapter of {base}, not a whole model",
            why="it has adapter_config.json and no config.json",
            hint="merge the two, and name the folder of the result:\n"
            f"python -c 'from peft import AutoPeftModelForCausalLM as M; from transformers import AutoTokenizer as T; "
            f'M.from_pretrained("{source}").merge_and_unload().save_pretrained("merged"); '
            f'T.from_pretrained("{base}").save_pretrained("merged")\'',
        )
    if config is not None and config.get("auto_map") and config.get("model_type") not in CONFIG_MAPPING:
        raise ToolkitError(
            f"{source} needs program code of its own, which is never run here",
            why=f"transformers has no model of type {config.get('model_type')!r}",
            hint="choose a model that transformers has by itself",
        )


def _check_reading(source: str, config: dict[str, Any]) -> None:
    """Raise ToolkitError if the transformers of this stack lacks the model, or misreads it."""
    here = f"transformers {transformers.__version__}"
    family = load_families().get(str(config.get("model_type")))
    if family is not None and config["model_type"] not in CONFIG_MAPPING:
        raise ToolkitError(
            f"{source} cannot be trained with {here}",
            why=f"it has no {family.title}",
            hint=f"{way_to(family.flavours[0])}; or choose another model",
            exit_code=ExitCode.UNFIT,
        )
    if compat.READS_OLD_SPELLINGS and (why := spellings.misread_by_4(config)):
        raise ToolkitError(
            f"{source} is another model for {here}",
            why=f"{why}, which this version does otherwise",
            hint=f"{way_to('cu130')}, which has transformers 5; or choose another model",
            exit_code=ExitCode.UNFIT,
        )


def check_lengths(model: Any, prompt_tokens: int, response_tokens: int) -> None:
    """Raise ToolkitError if prompt and response together outgrow the positions.

    model: a model or its config.
    """
    limit = getattr(getattr(model, "config", model), "max_position_embeddings", None)
    if limit is not None and prompt_tokens + response_tokens > limit:
        raise ToolkitError(
            f"prompts of {prompt_tokens} and responses of {response_tokens} tokens do not fit the model",
            why=f"{type(model).__name__} here has {limit} positions",
            hint=f"lower data.max_prompt_tokens or data.max_response_tokens to a sum of at most {limit}",
        )


def load_config(source: str) -> Any:
    """Load a model's config from a hub or a folder."""
    return _load(AutoConfig.from_pretrained, source, hub.config_files)


def check_scorer(source: str, *, prompt_tokens: int, response_tokens: int, lm_coef: float) -> None:
    """Raise ToolkitError if no reward model can be made from `source`. Only its config is read.

    Step 1 calls it, so that nobody trains for hours to learn of it in step 2.
    """
    config = load_config(source)
    check_lengths(config, prompt_tokens, response_tokens)
    _check_labels(source, config)
    if type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise ToolkitError(
            f"a reward model cannot be made from {source}",
            why=f"transformers has no sequence classification for {config.model_type}",
            hint="choose a reward model that has: OPT, GPT-2, LLaMA, Mistral, Qwen2 and others do",
        )
    if lm_coef and not getattr(config, "tie_word_embeddings", False):
        raise _untied(source)


def check_causal(source: str) -> None:
    """Raise ToolkitError if `source` is no language model. Only its config is read."""
    config = load_config(source)
    if is_classifier(config) or type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind = next(iter(config.architectures or []), config.model_type)
        raise ToolkitError(
            f"{source} is no language model",
            why=f"it is {kind}, which gives no next token",
            hint="the actor is a causal model: OPT, GPT-2, LLaMA, Mistral, Qwen2 and many others",
        )


def is_classifier(config: Any) -> bool:
    return any("SequenceClassification" in name for name in config.architectures or [])


def _check_labels(source: str, config: Any) -> None:
    if is_classifier(config) and config.num_labels != 1:
        raise ToolkitError(
            f"{source} is no reward model",
            why=f"it is a classifier with {config.num_labels} labels, and a reward is one number",
            hint="choose a model with one label; in critic.model also a causal model, which gets a new head",
        )


HEAD = "score.weight"  # the tensor that makes a score of a hidden state


def no_head(source: str) -> ToolkitError:
    return ToolkitError(
        f"{source} is no reward model",
        why=f"it has no head: its weights lack `{HEAD}`",
        hint="critic.reward_model and ppo.judge_model are trained classifiers with one label; "
        "to train one from a language model, name that in critic.model, and do step 2",
    )


def _untied(name: str) -> ToolkitError:
    return ToolkitError(
        "reward.lm_coef needs a model whose input and output embeddings are one",
        why=f"those of {name} are two, and a reward model has no output embedding",
        hint="set reward.lm_coef: 0",
    )


# Text of several scripts and kinds, to compare two tokenizers.
PROBE = "\n\nHuman: Grüße, 你好! 12.5 %\n\nAssistant: I'm  fine,\tthanks 🙂"


def check_same_tokenizer(
    actor: PreTrainedTokenizerFast, critic: PreTrainedTokenizerFast, role: str = "reward model"
) -> None:
    """Raise ToolkitError unless actor and reward model read the same ids in the same way.

    Step 3 hands the actor's token ids to the reward model, and to the judge. role: of the second.
    """
    names = (actor.name_or_path or "the actor", critic.name_or_path or f"the {role}")
    if why := _tokenizer_difference(actor, critic, *names):
        instead = "critic.model: actor" if role == "reward model" else "leave ppo.judge_model out"
        raise ToolkitError(
            f"the actor and the {role} use different tokenizers",
            why=why,
            hint=f"choose the {role} from the actor's family (e.g. facebook/opt-350m with facebook/opt-1.3b), "
            f"or {instead}",
        )


def reads_alike(actor: PreTrainedTokenizerFast, other: PreTrainedTokenizerFast) -> bool:
    """Return whether two tokenizers give the same ids for the same text."""
    return not _tokenizer_difference(actor, other, "", "")


def _tokenizer_difference(actor: Any, critic: Any, actor_name: str, critic_name: str) -> str:
    own, other = actor.get_vocab(), critic.get_vocab()
    moved = [token for token, number in own.items() if other.get(token, number) != number]
    if moved:
        token = min(moved, key=own.__getitem__)
        return f"{token!r} is number {own[token]} of {actor_name} and number {other[token]} of {critic_name}"
    for missing, in_name, not_in in (
        (own.keys() - other, actor_name, critic_name),
        (other.keys() - own, critic_name, actor_name),
    ):
        if missing:
            some = ", ".join(sorted(missing)[:3])
            return f"{in_name} has {plural(len(missing), 'tokens')} that {not_in} lacks: {some}"
    if actor.eos_token_id != critic.eos_token_id:
        return f"an answer of {actor_name} ends with {actor.eos_token}, one of {critic_name} with {critic.eos_token}"
    if _in_front(actor) != _in_front(critic):
        return f"{actor_name} begins a text with the tokens {_in_front(actor)}, {critic_name} with {_in_front(critic)}"
    ids = [tokenizer(PROBE, add_special_tokens=False)["input_ids"] for tokenizer in (actor, critic)]
    return f"{actor_name} and {critic_name} cut the same text into other tokens" if ids[0] != ids[1] else ""


def _in_front(tokenizer: Any) -> list[str]:
    bare, framed = (tokenizer("a", add_special_tokens=special)["input_ids"] for special in (False, True))
    start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
    return list(tokenizer.convert_ids_to_tokens(framed[:start]))


def checkpoint_activations(model: Any) -> None:
    """Compute layers again in the backward pass to save memory: hardware.gradient_checkpointing."""
    arguments = compat.checkpointing_arguments()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=arguments)
    if arguments["use_reentrant"]:  # with LoRA, a reentrant checkpoint would see nothing to differentiate
        model.enable_input_require_grads()


# --- forward passes -----------------------------------------------------------------------------


class ActorForward(nn.Module):
    """The actor in training: log-probs of the tokens that are asked for.

    Only the hidden states that predict them go through the head, so [B, T, V] logits never exist.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self, batch: Sequences, *, from_prompt: bool = False, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Return log-probs (N,), and entropies (N,) or None.

        They belong to the labels of `batch.predicted(from_prompt=...)`.
        """
        index, labels = batch.predicted(from_prompt=from_prompt)
        states, head = _hidden_states(self.model, batch, index), self.model.get_output_embeddings()
        rows = self.model.config.vocab_size
        return label_log_probs(states, labels, head, rows, temperature, with_entropy, transform_of(self.model))


class Float32Head(nn.Linear):
    """A reward model's head, which computes in float32 also where its weights have 16 bits.

    A score in bfloat16 has 8 bits: of 1024 answers, hundreds would get the score of another one.
    """

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.float(), self.weight.float(), None if self.bias is None else self.bias.float())


class ScoreForward(nn.Module):
    """The reward model or the critic in training: scores after tokens, (score - shift) / scale.

    shift and scale make rewards mean 0 and std 1 on the reference's answers; both models share
    them.
    """

    def __init__(self, model: Any, *, with_lm: bool = False, shift: float = 0.0, scale: float = 1.0) -> None:
        super().__init__()
        self.model: Any = model
        self.shift, self.scale = shift, scale
        self.lm_head: nn.Linear | None = None
        self.transform = transform_of(model)  # of the language model's logits
        if with_lm:
            embedding = model.get_input_embeddings().weight
            if not getattr(model.config, "tie_word_embeddings", False):
                raise _untied(type(model).__name__)
            # A module of its own, so that ZeRO-3 gathers the tied weight where it is used.
            self.lm_head = nn.Linear(embedding.shape[1], embedding.shape[0], bias=False, device="meta")
            self.lm_head.weight = embedding

    def forward(self, batch: Sequences, at: Tensor | None = None, *, lm_rows: int = 0) -> tuple[Tensor, Tensor | None]:
        """Return scores after tokens, and log-probs of responses or None.

        The scores: (n,), after the tokens `at`, an index into S as `Sequences` has it; with None:
        (S,), after all tokens. The log-probs: (N,), of the response tokens of the first `lm_rows`
        rows; for these `at` must be None.
        """
        hidden = _hidden_states(self.model, batch, at)
        scores = (self.model.score(hidden).squeeze(-1) - self.shift) / self.scale
        if not lm_rows or self.lm_head is None:
            return scores, None
        index, labels = batch.predicted()
        assert at is None, "the log-probs are of other tokens than the scores"
        count = int(batch.host_response_lengths[:lm_rows].sum())
        states = hidden.index_select(0, index[:count])
        rows = self.model.config.vocab_size
        return scores, label_log_probs(states, labels[:count], self.lm_head, rows, transform=self.transform)[0]


def last_scores(scores: Tensor, batch: Sequences) -> Tensor:
    """Select each row's score after its last real token, (B,), of the scores after all, (S,)."""
    return scores[batch.last()]


def _hidden_states(model: Any, batch: Sequences, at: Tensor | None) -> Tensor:
    """Return the hidden states of the tokens `at`, in increasing order: (n, d); None: all (S, d).

    Padding is on the right, where causal attention never looks: no mask is needed, and default
    positions are right. Without a mask, attention uses kernels for plain causal attention.
    """
    more = packed_attention.arguments(batch, at) if batch.is_packed else {}
    states = model.base_model(input_ids=batch.input_ids, use_cache=False, **more).last_hidden_state.flatten(0, 1)
    if at is None or (batch.is_packed and packed_attention.leaves_out(model)):
        return states
    return states.index_select(0, at)


def padding(tokenizer: PreTrainedTokenizerFast, *models: Any) -> int | None:
    """Return the padding token for these models, or None after making all of them take packed rows.

    Rows are packed if every model can.
    """
    if not all(packed_attention.can_pack(model) for model in models):
        return tokenizer.pad_token_id
    for model in models:
        packed_attention.keep_rows_apart(model)
    return None
