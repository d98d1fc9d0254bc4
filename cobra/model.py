"""The model: image -> vision -> projector -> splice -> mamba (prefill, decode).

    logits, state = vlm.prefill(input_ids, pixel_values)     # the image, then the prompt
    logits = vlm.decode(tokens, state)                       # one more token per row

These two are the only paths. Since the image comes first, what the model remembers after it does not depend on the
question: `encode_image` keeps that memory, and any number of questions start from it.

    kept = vlm.encode_image(photo)
    vlm.generate(kept, prompt_1), vlm.generate(kept, prompt_2)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cobra.config import CobraConfig
from cobra.errors import RequestError
from cobra.image import ImageTransform
from cobra.projector import Projector
from cobra.prompt import get_prompt_builder
from cobra.splice import IGNORE_INDEX, splice
from cobra.vision import VisionBackbone
from cobra_kernels.errors import ShapeError
from cobra_kernels.modules import MambaConfig, MambaLMHeadModel, MambaState

from . import generate as generation

Pixels = Mapping[str, Tensor] | Tensor  # tower name -> (batch, 3, px, px); with one tower the tensor will do


class CobraOutput(NamedTuple):
    """What `CobraVLM.forward` returns."""

    loss: Tensor | None  # () fp32, mean over the tokens that carry a label; None without labels
    logits: Tensor  # (batch, seqlen, padded vocab), image tokens included; or the last num_last_tokens of them


@dataclass(frozen=True)
class ImageState:
    """All that the model remembers after reading an image and nothing else: one state per image.

    It has the same size for any image (23.6 MB for cobra-3b in bf16, 13.1 MB with `ssm_dtype=torch.bfloat16`) and is never
    written: a question starts from a copy.
    """

    state: MambaState  # batch = number of images
    num_image_tokens: int

    @property
    def nbytes(self) -> int:
        return self.state.nbytes

    def __len__(self) -> int:
        """The number of images."""
        return self.state.batch_size

    def __getitem__(self, index: int) -> ImageState:
        """A copy of the state of one image."""
        return ImageState(self.state.select([range(len(self))[index]]), self.num_image_tokens)

    def expand(self, batch: int) -> ImageState:
        """`batch` copies of the one image."""
        return ImageState(self.state.expand(batch), self.num_image_tokens)

    def to(self, device=None, dtype=None, *, ssm_dtype=None) -> ImageState:
        """Move or convert. `dtype` is for the convolution's part; `ssm_dtype=torch.bfloat16` nearly halves the memory."""
        return ImageState(self.state.to(device, dtype, ssm_dtype=ssm_dtype), self.num_image_tokens)


class CobraVLM(nn.Module):
    """A Cobra. Parameters: `vision.towers.*`, `projector.projector.*`, `llm.backbone.*`, `llm.lm_head.weight`.

    The dtype of the weights decides the dtype of the arithmetic, on every device; `torch.autocast` is honoured when the
    caller turns it on. States of the recurrence stay fp32.
    """

    def __init__(self, config: CobraConfig, tokenizer: Any = None, *, device=None, dtype: torch.dtype | None = None):
        """tokenizer: anything with `encode(str) -> list[int]`, `decode(list[int]) -> str`, `eos_token_id` and `len()`; what
        takes or returns text needs one."""
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.vision = VisionBackbone(config.vision, device=device, dtype=dtype)
        self.projector = Projector(config.projector, device=device, dtype=dtype)
        lm = config.lm
        lm_config = MambaConfig(
            d_model=lm.d_model,
            n_layer=lm.n_layer,
            vocab_size=lm.vocab_size,
            ssm_cfg=lm.ssm_cfg,
            residual_in_fp32=lm.residual_in_fp32,
            pad_vocab_size_multiple=lm.pad_vocab_size_multiple,
            tie_embeddings=lm.tie_embeddings,
            norm_epsilon=lm.norm_epsilon,
        )
        self.llm = MambaLMHeadModel(lm_config, device=device, dtype=dtype)
        self.image_transform = ImageTransform(config.vision, config.image_resize_strategy)

    @property
    def device(self) -> torch.device:
        return self.llm.lm_head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.llm.lm_head.weight.dtype

    # --- image -> embeddings ----------------------------------------------------------------------------------------

    def preprocess(self, image: Any) -> dict[str, Tensor]:
        """An image (PIL, path, bytes, array), or a list of them -> pixels {tower: (batch, 3, px, px)} on the model's device."""
        images = image if isinstance(image, (list, tuple)) else [image]
        if not images:
            raise RequestError("preprocess: image is an empty list, expected at least one image")
        pixels = [self.image_transform(one) for one in images]
        return {name: torch.stack([p[name] for p in pixels]).to(self.device) for name in pixels[0]}

    def embed_image(self, pixel_values: Pixels) -> Tensor:
        """Pixels (batch, 3, px, px) per tower -> image embeddings (batch, num_image_tokens, d_model)."""
        if isinstance(pixel_values, Tensor):
            pixel_values = pixel_values.to(self.device)
        else:
            pixel_values = {name: pixels.to(self.device) for name, pixels in pixel_values.items()}
        return self.projector(self.vision(pixel_values))

    @torch.no_grad()
    def encode_image(self, image: Any, *, ssm_dtype: torch.dtype | None = None) -> ImageState:
        """Read an image and keep what the model remembers of it; questions then cost their own tokens only.

        image: an image, a list of images, or pixels as `preprocess` makes them. ssm_dtype: of the kept recurrence state,
        fp32 if None; bf16 saves memory and costs accuracy.
        """
        pixels = image if isinstance(image, (Mapping, Tensor)) else self.preprocess(image)
        embeddings = self.embed_image(pixels).to(self.dtype)
        state = self.llm.prefill(embeddings)[1]
        return ImageState(state if ssm_dtype is None else state.to(ssm_dtype=ssm_dtype), embeddings.shape[1])

    # --- the two inference paths ------------------------------------------------------------------------------------

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        pixel_values: Pixels | None = None,
        *,
        image_state: ImageState | None = None,
        lengths: Tensor | Sequence[int] | None = None,
        image_rows: Sequence[int] | Tensor | None = None,
    ) -> tuple[Tensor, MambaState]:
        """Read the image and the prompt; returns (logits after each row's last token (batch, padded vocab), state).

        input_ids: (batch, text_len) int, right-padded when lengths (batch,) says so.
        pixel_values: one image per row, or for the rows in image_rows. None: text alone.
        image_state: the images instead of their pixels, one per row or one for all; it is copied, not written.
        """
        if image_state is None:
            prompt, lengths = self.embed_prompt(input_ids, pixel_values, lengths, image_rows)
            return self.llm.prefill(prompt, lengths=lengths)
        if pixel_values is not None or image_rows is not None:
            raise RequestError("prefill: image_state is given with pixel_values or image_rows, expected one or the other")
        return self.llm.prefill(input_ids, self.start_from(image_state, len(input_ids)), lengths=lengths)

    @torch.no_grad()
    def decode(self, input_ids: Tensor, state: MambaState, *, rows: Tensor | None = None) -> Tensor:
        """One more token per row: (batch,) int -> logits (batch, padded vocab). `state` is **written in place**.

        rows: (batch,) int, the rows of the state that the tokens belong to. None: all.
        """
        return self.llm.decode(input_ids, state, rows=rows)

    def embed_prompt(self, input_ids: Tensor, pixel_values: Pixels | None, lengths: Any, image_rows: Any) -> tuple[Tensor, Tensor]:
        """What `llm.prefill` reads: embeddings (batch, seqlen, d_model) of image and text, and the length of each row.

        Arguments as in `prefill`.
        """
        image = None if pixel_values is None else self.embed_image(pixel_values)
        spliced = splice(image, self.llm.backbone.embedding(input_ids), lengths, image_rows=image_rows)
        return spliced.embeddings, spliced.lengths

    def start_from(self, image_state: ImageState, batch: int) -> MambaState:
        """A state to write into: that of the image, copied; one image serves every row, else there is one for each."""
        if len(image_state) not in (1, batch):
            raise ShapeError(f"prefill: image_state has {len(image_state)} images, expected 1 or batch={batch}; batch comes from input_ids")
        mine = self.llm.backbone.layers[0].mixer
        theirs = tuple(image_state.state.ssm[0].shape[1:])
        if len(image_state.state) != self.config.lm.n_layer or theirs != (mine.d_inner, mine.d_state):
            raise ShapeError(
                f"prefill: image_state is {image_state.state!r}, expected n_layer={self.config.lm.n_layer} layers of "
                f"(d_inner={mine.d_inner}, d_state={mine.d_state}); they come from the model"
            )
        state = image_state.state.to(self.device)
        return state.expand(batch) if len(image_state) == 1 else state.clone()

    # --- training and scoring ---------------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Pixels | None = None,
        labels: Tensor | None = None,
        *,
        multimodal_indices: Sequence[int] | Tensor | None = None,
        num_last_tokens: int = 0,
    ) -> CobraOutput:
        """Logits of every position, and the loss when there are labels. Differentiable; keeps no state.

        input_ids, labels: (batch, text_len) int; labels of IGNORE_INDEX (-100) carry no loss, image tokens never do.
        attention_mask: (batch, text_len), 0 or False where padding is, at either end of a row; tokens are moved to the
            left, so that row b of the logits is [image tokens, tokens, padding].
        multimodal_indices: rows that have an image, in the order of pixel_values; None: all rows. Rows keep their place.
        """
        lengths = None
        if attention_mask is not None:
            input_ids, labels, lengths = _left_align(input_ids, labels, attention_mask)
        image = None if pixel_values is None else self.embed_image(pixel_values)
        text = self.llm.backbone.embedding(input_ids)
        spliced = splice(image, text, lengths, image_rows=multimodal_indices if image is not None else None, labels=labels)
        logits = self.llm(None, inputs_embeds=spliced.embeddings, num_last_tokens=0 if labels is not None else num_last_tokens).logits
        loss = None
        if labels is not None:
            targets = spliced.labels[:, 1:].to(logits.device)  # the logits at t are for the token at t + 1
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE_INDEX)
            logits = logits[:, -num_last_tokens:] if num_last_tokens > 0 else logits
        return CobraOutput(loss, logits)

    # --- text in, text out ------------------------------------------------------------------------------------------

    def get_prompt_builder(self, system_prompt: str | None = None):
        """A builder of the prompt format that this model was trained with: `add_turn(role, message)`, `get_prompt()`."""
        return get_prompt_builder(self.config.prompt, system_prompt)

    @property
    def string2idx(self) -> dict[str, int]:
        """Token ids of True, False, Yes, No and A to Z, of those that are one token of this tokenizer."""
        return generation.answer_tokens(self)

    def generate(self, image: Any, prompt_text: str, **options) -> str:
        """Answer a prompt about an image; see `cobra.generate.stream` for the options. Greedy by default.

        image: an image (PIL, path, bytes, array), an `ImageState`, pixels of batch 1, or None for text alone.
        prompt_text: as a prompt builder's `get_prompt()` returns it.
        """
        return generation.generate(self, image, prompt_text, **options)

    def stream(self, image: Any, prompt_text: str, **options) -> Iterator[str]:
        """`generate`, yielding pieces of text as they come; joined they are what `generate` returns."""
        return generation.stream(self, image, prompt_text, **options)

    def generate_batch(
        self, images: Any, texts: Sequence[str], return_string_probabilities: Sequence[str] | None = None, **options
    ) -> list[str] | tuple[list[str], list[list[float]]]:
        """Answer many prompts at once, of any lengths; each answer is what `generate` gives for it alone.

        images: pixels of batch len(texts), a list of images, or an `ImageState`; one image serves all texts; None: text alone.
        return_string_probabilities: strings of one token each, see `string2idx`; then returns (answers, probabilities), the
            latter (batch, strings): how likely each is as the first token, among these strings.
        """
        return generation.generate_batch(self, images, texts, return_string_probabilities, **options)


def _left_align(input_ids: Tensor, labels: Tensor | None, attention_mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """Move the tokens of each row to its start, in order; returns (input_ids, labels, lengths (batch,))."""
    if attention_mask.shape != input_ids.shape:
        raise ShapeError(
            f"forward: attention_mask has shape {tuple(attention_mask.shape)}, expected (batch, text_len)="
            f"{tuple(input_ids.shape)}; both come from input_ids"
        )
    mask = attention_mask.to(torch.bool)
    order = torch.argsort(~mask, dim=1, stable=True)  # tokens first, in their order
    labels = None if labels is None else labels.gather(1, order)
    return input_ids.gather(1, order), labels, mask.sum(dim=1)
