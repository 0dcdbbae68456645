"""The card (README.md) of a saved model: what it is, how it is used, and how it was made."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import yaml

from jobs.spec import Job, Scratch
from jobs.steps import STEPS
from rlhf_train.data import hub
from rlhf_train.data.chat import is_human_assistant, own_template
from rlhf_train.data.dataset import Example
from rlhf_train.disk import read_json

HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")

ANSWER = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."  # run this in the folder of this card, or name that folder here
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder)

prompt = {prompt}
ids = tokenizer(prompt, {plainly}return_tensors="pt").input_ids
answer = model.generate(ids)[0, ids.shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""

SCORE = """\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

folder = "."  # run this in the folder of this card, or name that folder here
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForSequenceClassification.from_pretrained(folder)

prompt = {prompt}
answer = {answer}
ids = tokenizer(prompt + answer{closing}, {plainly}return_tensors="pt").input_ids
print(model(ids).logits.item())
"""


TEXT_FORM = """\
Plain text in the form of the prompt above, which is of the data. The answer follows, and ends with
`{eos}`.{chat}"""

CHAT_FORM = """\
The tokenizer's chat template writes it: `tokenizer.apply_chat_template(messages, tokenize=False,
add_generation_prompt=True)` gives the prompt above, which is of the data, from its messages. The
answer follows, and ends with the token that closes the assistant's turn."""


def model_card(job: Job, step: int, tokenizer: Any, *, example: Example, scores: Mapping[str, float]) -> str:
    """Return a model's card: how to use it, its origin, its held-out scores, the step's job fields.

    The snippet names no path, since the folder may be moved. example: of the data.
    """
    snippet = (SCORE if step == 2 else ANSWER).format(
        prompt=json.dumps(example.prompt),
        answer=json.dumps(example.answer),
        plainly="add_special_tokens=False, " if example.is_chat else "",
        closing="" if example.is_chat else " + tokenizer.eos_token",
    )
    score = "The logit is the score of prompt and answer together; only differences count.\n\n" if step == 2 else ""
    template = own_template(tokenizer)
    is_other = template is not None and not is_human_assistant(template)
    chat = " The tokenizer's chat template was not used." if is_other else ""
    form = CHAT_FORM if example.is_chat else TEXT_FORM.format(eos=tokenizer.eos_token, chat=chat)
    rows = "".join(f"| {name} | {value:.6g} |\n" for name, value in scores.items())
    table = f"| on held-out data | |\n| --- | --- |\n{rows}\n" if scores else ""
    return f"""---
{_yaml(front_matter(job, step))}---
# {job.name}: {STEPS[step].title} (step {step})

Made by rlhf-box from {made_from(job, step)}, on {", ".join(job.data.names)}.

## Use

```python
{snippet}```

{score}## Prompt format

{form}

## How it was made

{table}The job, as far as this step depends on it:

```yaml
{_yaml(job.fields_of_step(step))}```
"""


def made_from(job: Job, step: int) -> str:
    """Say in words what the step's model was before."""
    if step == 3 or (step == 2 and job.critic.model == "actor"):
        return job.own_models.get(1, "this run's step 1")
    source = source_of(job, step)
    return "random weights" if isinstance(source, Scratch) else source


def front_matter(job: Job, step: int) -> dict[str, Any]:
    """Return what a hub reads of a card."""
    task = {"pipeline_tag": "text-classification" if step == 2 else "text-generation"}
    tags = ["rlhf", "reward-model"] if step == 2 else ["rlhf"]
    return {"library_name": "transformers", **task, "tags": tags, **lineage(source_of(job, step))}


def source_of(job: Job, step: int) -> str | Scratch:
    return job.critic_source if step == 2 else job.actor_source


def lineage(source: str | Scratch) -> dict[str, Any]:
    """Return base model and licence of a model that was made from `source`, where they are known.

    They are read from the card and the config of `source`.
    """
    folder = None if isinstance(source, Scratch) else hub.folder_here(source)
    if isinstance(source, Scratch) or folder is None:
        return {}
    card, config = hub.front_matter(folder / "README.md"), read_json(folder / "config.json") or {}
    base = source
    if hub.local(source):
        names = [card.get("base_model"), config.get("_name_or_path")]
        base = next((name for name in names if name and not _is_path(name)), "")
    licence = {key: card[key] for key in ("license", "license_name", "license_link") if card.get(key)}
    if not licence and config.get("license"):
        licence = {"license": config["license"]}
    return ({"base_model": base} if base else {}) | licence


def _is_path(name: Any) -> bool:
    return isinstance(name, str) and (hub.local(name) or not HUB_NAME.fullmatch(name))


def _yaml(fields: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(fields), sort_keys=False, allow_unicode=True)
    return text
