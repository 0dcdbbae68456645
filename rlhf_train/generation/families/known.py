"""Choose a model's description for the static decoder.

A family is a file of this folder with a function `network`, and a row of env/families.toml whose
`static` is the file's name. A model of another family generates by its own forward.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any

from env.settings import Family, load_families
from rlhf_train.generation.families.tensors import UnknownModel
from rlhf_train.kernels.decoder_weights import Network


def network_of(model: Any) -> Network | None:
    """Return a model's tensors, or None if the static decoder cannot use them."""
    try:
        return read_network(model)
    except UnknownModel:
        return None


def read_network(model: Any) -> Network:
    """Return a model's tensors.

    Raises UnknownModel if its family has no description, if that does not know all that the model
    does, or if the tensors are not whole (those of ZeRO-3).
    """
    family = _families().get(str(getattr(model.config, "model_type", None)))
    if family is None or family.static is None:
        raise UnknownModel("its family has no description there")
    if any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        raise UnknownModel("ZeRO 3 has no whole weights")
    found: Network = import_module(f"{__package__}.{family.static}").network(model)
    return found


@cache
def _families() -> dict[str, Family]:
    return load_families()
