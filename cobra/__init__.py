"""Cobra: a vision-language model with a Mamba language model, on the kernels of `cobra_kernels`.

    import cobra

    vlm = cobra.load("path/to/checkpoint")            # or cobra.from_preset("cobra-laptop"): random weights
    prompt = vlm.get_prompt_builder()
    prompt.add_turn("human", "What is in the picture?")
    print(vlm.generate("photo.jpg", prompt.get_prompt(), max_new_tokens=64))

Importing opens no socket, writes no file and compiles nothing; nothing is ever downloaded.
"""

from __future__ import annotations

import json
import os
import warnings
from typing import TYPE_CHECKING, Any

from cobra.errors import CheckpointError, CobraError, ImageError, PromptError, RequestError

if TYPE_CHECKING:
    import torch

    from cobra.model import CobraVLM

__version__ = "0.1.0"

__all__ = [
    "CheckpointError",
    "CobraError",
    "ImageError",
    "PromptError",
    "RandomWeightsWarning",
    "RequestError",
    "__version__",
    "available_model_names",
    "available_models",
    "from_preset",
    "get_model_description",
    "load",
]


class RandomWeightsWarning(UserWarning):
    """The model was made, not trained: good for measuring speed and memory, useless for answers."""


def load(model_path: str | os.PathLike[str], *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> CobraVLM:
    """Load a checkpoint directory as a frozen model in eval mode; raises `CheckpointError` and says what to do if it cannot.

    device: where the model goes. dtype: of its weights, as stored if None. Nothing is downloaded and nothing unpickled:
    an official directory has to be converted once, with `cobra convert`.
    """
    from cobra.checkpoint import load as load_checkpoint

    return load_checkpoint(model_path, device=device, dtype=dtype)


def from_preset(name: str, seed: int = 0, *, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> CobraVLM:
    """A model of a preset's shape with **random weights**: for tests and benchmarks. Warns with `RandomWeightsWarning`.

    name: one of `available_models()`. seed: of the weights; torch's own generators are left as they were.
    """
    import torch

    from cobra.config import preset
    from cobra.model import CobraVLM
    from cobra.tokenizer import byte_tokenizer

    config = preset(name)
    device = torch.device(device)
    warnings.warn(
        f"{name}: the weights are random, the answers will be noise; cobra.load(directory) reads trained ones",
        RandomWeightsWarning,
        stacklevel=2,
    )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        vlm = CobraVLM(config, byte_tokenizer(config.lm.vocab_size), device=device, dtype=dtype)
    return vlm.eval().requires_grad_(False)


def available_models() -> list[str]:
    """Ids that `from_preset` and `get_model_description` know."""
    from cobra.config import PRESETS

    return list(PRESETS)


def available_model_names() -> list[tuple[str, dict[str, Any]]]:
    """(id, description) of every model; see `get_model_description`."""
    return [(name, _describe(name)) for name in available_models()]


def get_model_description(model_id: str) -> dict[str, Any]:
    """Print and return what a model is made of. Upstream's "cobra+3b" is "cobra-3b" here; both are understood."""
    description = _describe(model_id.replace("+", "-"))
    print(json.dumps(description, indent=2))
    return description


def _describe(model_id: str) -> dict[str, Any]:
    from cobra.config import preset

    config = preset(model_id)
    return {
        "id": config.model_id,
        "vision": {tower.name: f"{tower.kind}, width {tower.width}, {tower.blocks_run} blocks" for tower in config.vision.towers},
        "image_size": config.vision.towers[0].image_size,
        "image_tokens": config.num_image_tokens,
        "projector": config.projector_kind,
        "projector_parameters": config.projector.num_parameters,
        "language_model": f"Mamba, d_model {config.lm.d_model}, {config.lm.n_layer} layers",
        "language_model_parameters": config.lm.num_parameters,
        "prompt": config.prompt,
        "note": config.note,
    }
