"""What a vision-language model must do, from its shape alone: parameters, bytes, FLOPs, exponentials. No torch model is built.

    model = SHAPES["tinyllava-3.1b"]                      # or cobra_costs(cobra.config.preset("cobra-3b"))
    model.decode(batch=64, context=8192, itemsize=2)      # Cost(bytes, flops, exps) of one step

The same conventions for every model, so that two limits may be compared:
- a product counts two FLOPs per multiplication and addition, causal attention only the scores below the diagonal;
- bytes are the least that must move: every weight that is used once, states and keys and values once, nothing in between;
- an exponential is one per attention score, and of a Mamba what the scan's bench counts (decays, softplus, SiLU);
- vision runs the blocks that its features need: all of these models read the second-to-last one;
- only the last token's logits are made.

Counts are checked against counted parameters and against torch.utils.flop_counter in tests/bench/test_baselines.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from benchmarks.harness.bench import Cost
from cobra.config import CobraConfig, LMConfig, ProjectorConfig, TowerConfig


def total(*costs: Cost) -> Cost:
    return Cost(*(sum(getattr(c, name) for c in costs) for name in ("bytes", "flops", "exps")))


# --- vision: the same towers for both families ------------------------------------------------------------------------


def tower_parameters(t: TowerConfig, blocks: int) -> int:
    """Of a tower with so many blocks, without the final norm and heads that these models do not use."""
    w = t.width
    patches = 3 * t.patch_size**2 * w + (0 if t.kind == "clip" else w)  # CLIP's patch embedding has no bias, ...
    positions = (t.num_patches + (t.kind != "siglip")) * w
    prefix = t.prefix_tokens * w + (2 * w if t.kind == "clip" else 0)  # ... and a LayerNorm before the blocks
    block = 4 * w * w + 4 * w + 2 * w * t.mlp_width + t.mlp_width + w + 4 * w
    if t.kind == "dinov2":
        block += 2 * w  # LayerScale
    return patches + positions + prefix + blocks * block


def tower_cost(t: TowerConfig, images: int, itemsize: int) -> Cost:
    w, tokens = t.width, t.num_patches + t.prefix_tokens
    products = t.num_patches * 3 * t.patch_size**2 * w + t.blocks_run * tokens * (4 * w * w + 2 * w * t.mlp_width)
    attention = t.blocks_run * 2 * tokens**2 * w
    moved = images * (3 * t.image_size**2 + t.num_patches * w)
    return Cost(
        bytes=itemsize * (tower_parameters(t, t.blocks_run) + moved), flops=2 * images * (products + attention),
        exps=images * t.blocks_run * t.heads * tokens**2,
    )  # fmt: skip


# --- projectors -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MlpProjector:
    """Linear layers with GELU between, on every patch."""

    linears: tuple[tuple[int, int], ...]  # (in, out) of each
    patches: int

    @property
    def tokens(self) -> int:
        return self.patches

    @property
    def parameters(self) -> int:
        return sum(i * o + o for i, o in self.linears)

    def cost(self, images: int, itemsize: int) -> Cost:
        products = self.patches * sum(i * o for i, o in self.linears)
        moved = self.patches * self.linears[0][0] + self.tokens * self.linears[-1][1]
        return Cost(bytes=itemsize * (self.parameters + images * moved), flops=2 * images * products)


@dataclass(frozen=True)
class LdpProjector:
    """LDPv2: two Linear layers with GELU between, average pooling of the patch grid, y = p + depthwise3x3(p).

    The second Linear commutes with the pooling, so no implementation needs it on every patch, and its cost is that of the
    pooled tokens. The plain modules that users run do it before."""

    linears: tuple[tuple[int, int], tuple[int, int]]
    grid: int
    out_grid: int

    @property
    def tokens(self) -> int:
        return self.out_grid**2

    @property
    def parameters(self) -> int:
        out = self.linears[1][1]
        return sum(i * o + o for i, o in self.linears) + out * (3 * 3 + 1)

    def cost(self, images: int, itemsize: int) -> Cost:
        (v, hidden), (_, out) = self.linears
        products = self.grid**2 * v * hidden + self.tokens * (hidden * out + 9 * out)
        moved = self.grid**2 * v + self.tokens * out
        return Cost(bytes=itemsize * (self.parameters + images * moved), flops=2 * images * products)


# --- language models --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecoderShape:
    """A Transformer decoder. `llama`: RMSNorm, gated MLP, no biases. `phi`: one LayerNorm, plain MLP, biases, also at the head."""

    kind: str  # "llama" or "phi"
    d_model: int
    layers: int
    heads: int
    mlp: int
    vocab: int

    @property
    def head_dim(self) -> int:
        return self.d_model // self.heads

    @property
    def layer_products(self) -> int:
        """Multiplications of one token in one layer: its matrices."""
        return 4 * self.d_model**2 + (3 if self.kind == "llama" else 2) * self.d_model * self.mlp

    @property
    def read_parameters(self) -> int:
        """What a decode step reads: everything but the table of embeddings."""
        e = self.d_model
        if self.kind == "llama":
            return self.layers * (self.layer_products + 2 * e) + e + self.vocab * e
        return self.layers * (self.layer_products + 4 * e + self.mlp + e + 2 * e) + 2 * e + self.vocab * e + self.vocab

    @property
    def parameters(self) -> int:
        return self.read_parameters + self.vocab * self.d_model

    def state_bytes(self, context: int, itemsize: int) -> int:
        """Keys and values of one sequence."""
        return 2 * self.layers * self.d_model * itemsize * context

    def cost(self, tokens: int, batch: int, past: int, itemsize: int, sharing: int = 1) -> Cost:
        """`tokens` new tokens a sequence on `past` old ones, which `sharing` sequences have in common."""
        scores = tokens * past + tokens * (tokens + 1) // 2  # of one head
        flops = batch * (tokens * self.layers * self.layer_products + self.vocab * self.d_model)
        flops += batch * self.layers * 2 * scores * self.d_model
        read = batch // sharing * self.state_bytes(past, itemsize)
        written = batch * self.state_bytes(tokens, itemsize)
        return Cost(
            bytes=itemsize * (self.read_parameters + batch * tokens * self.d_model) + read + written, flops=2 * flops,
            exps=batch * self.layers * self.heads * scores,
        )  # fmt: skip


@dataclass(frozen=True)
class MambaShape:
    """A Mamba-1 language model with an fp32 SSM state, and with A, D and dt's bias in fp32 as `cobra_kernels` keeps them."""

    lm: LMConfig

    @property
    def layer_products(self) -> int:
        e, d, n, r = self.lm.d_model, self.lm.d_inner, self.lm.d_state, self.lm.dt_rank
        return 2 * d * e + (r + 2 * n) * d + r * d + d * e

    @property
    def fp32_parameters(self) -> int:
        return self.lm.n_layer * self.lm.d_inner * (self.lm.d_state + 2)

    @property
    def parameters(self) -> int:
        return self.lm.num_parameters

    def weight_bytes(self, itemsize: int) -> int:
        """What a decode step reads: the head is the table of embeddings, so everything."""
        untied = 0 if self.lm.tie_embeddings else self.lm.padded_vocab_size * self.lm.d_model
        return itemsize * (self.parameters - untied - self.fp32_parameters) + max(4, itemsize) * self.fp32_parameters

    def state_bytes(self, context: int, itemsize: int) -> int:
        """Of one sequence, at any context."""
        return self.lm.n_layer * self.lm.d_inner * (self.lm.d_conv * itemsize + self.lm.d_state * max(4, itemsize))

    def cost(self, tokens: int, batch: int, past: int, itemsize: int, sharing: int = 1) -> Cost:
        d, layers = self.lm.d_inner, self.lm.n_layer
        steps = batch * tokens * layers * d  # of the recurrence
        products = batch * (tokens * layers * self.layer_products + self.lm.padded_vocab_size * self.lm.d_model)
        state = self.state_bytes(past, itemsize)
        read = batch // sharing * state if past else 0
        return Cost(
            bytes=self.weight_bytes(itemsize) + itemsize * batch * tokens * self.lm.d_model + read + batch * state,
            flops=2 * products + steps * (6 * self.lm.d_state + 8 + 2 * self.lm.d_conv),
            exps=steps * (self.lm.d_state + 3),
        )  # fmt: skip


# --- whole models -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vlm:
    """A vision-language model. `itemsize`: bytes of a weight and of an activation."""

    name: str
    towers: tuple[TowerConfig, ...]
    projector: MlpProjector | LdpProjector
    language: DecoderShape | MambaShape
    whole_tower: bool  # parameters hold the tower's last block, which users' code runs and throws away
    source: str = ""

    @property
    def image_tokens(self) -> int:
        return self.projector.tokens

    @property
    def parameters(self) -> dict[str, int]:
        """{"vision", "projector", "language"}, as the model is built here."""
        blocks = [t.depth if self.whole_tower else t.blocks_run for t in self.towers]
        vision = sum(tower_parameters(t, n) for t, n in zip(self.towers, blocks))
        return {"vision": vision, "projector": self.projector.parameters, "language": self.language.parameters}

    def weight_bytes(self, itemsize: int) -> int:
        fp32 = self.language.fp32_parameters if isinstance(self.language, MambaShape) else 0
        return itemsize * (sum(self.parameters.values()) - fp32) + max(4, itemsize) * fp32

    def vision(self, itemsize: int, images: int = 1) -> Cost:
        return total(*(tower_cost(t, images, itemsize) for t in self.towers))

    def project(self, itemsize: int, images: int = 1) -> Cost:
        return self.projector.cost(images, itemsize)

    def prefill(self, tokens: int, itemsize: int, batch: int = 1, past: int = 0, sharing: int = 1) -> Cost:
        """`tokens` per sequence, on `past` tokens read before (which `sharing` sequences have in common), to the next logits."""
        return self.language.cost(tokens, batch, past, itemsize, sharing)

    def decode(self, batch: int, context: int, itemsize: int) -> Cost:
        """One step: every sequence has read `context` tokens and reads one more."""
        return self.language.cost(1, batch, context, itemsize)

    def state_bytes(self, context: int, itemsize: int) -> int:
        """What one sequence holds: keys and values of every token, or the state of the recurrence."""
        return self.language.state_bytes(context, itemsize)

    def kept_bytes(self, itemsize: int) -> int:
        """What must be kept of an image so that a later question does not read it again."""
        return self.state_bytes(self.image_tokens, itemsize)

    def resident(self, memory: int, context: int, itemsize: int) -> int:
        """Sequences of that context that `memory` bytes hold beside the weights."""
        return max(0, (memory - self.weight_bytes(itemsize)) // self.state_bytes(context, itemsize))


def projector_of(config: ProjectorConfig) -> MlpProjector | LdpProjector:
    from cobra.config import LDP_GRID

    if config.is_ldp:
        return LdpProjector(config.linears, config.grid, LDP_GRID[0])
    return MlpProjector(config.linears, config.grid**2)


def cobra_costs(config: CobraConfig) -> Vlm:
    """Of a Cobra: the last block of its towers is never built."""
    return Vlm(config.model_id, config.vision.towers, projector_of(config.projector), MambaShape(config.lm), whole_tower=False)


# --- the LLaVA family -------------------------------------------------------------------------------------------------

_CLIP = TowerConfig("clip", "clip", 1024, 24, 16, 4096, 336, 14)
_SIGLIP = TowerConfig("siglip", "siglip", 1152, 27, 16, 4304, 384, 14)
_PHI_2 = DecoderShape("phi", 2560, 32, 32, 10240, 51200)
_LLAMA_2_7B = DecoderShape("llama", 4096, 32, 32, 11008, 32000)
_MOBILE_LLAMA = DecoderShape("llama", 2560, 32, 32, 6912, 32000)


def _llava(name: str, tower: TowerConfig, language: DecoderShape, source: str, pooled: int | None = None) -> Vlm:
    """LLaVA-1.5's plan: a tower, two Linear layers with GELU between, a decoder; `pooled`: MobileVLM v2's grid after LDPv2."""
    linears = ((tower.width, language.d_model), (language.d_model, language.d_model))
    projector = LdpProjector(linears, tower.grid, pooled) if pooled else MlpProjector(linears, tower.num_patches)
    return Vlm(name, (tower,), projector, language, whole_tower=True, source=source)


REAL = (
    _llava("llava-1.5-7b", _CLIP, _LLAMA_2_7B, "arXiv 2310.03744; config.json of liuhaotian/llava-v1.5-7b"),
    _llava("tinyllava-3.1b", _SIGLIP, _PHI_2, "arXiv 2402.14289; config.json of bczhou/TinyLLaVA-3.1B and microsoft/phi-2"),
    _llava("mobilevlm-v2-3b", _CLIP, _MOBILE_LLAMA, "arXiv 2402.03766; config.json of mtgv/MobileVLM_V2-3B", pooled=12),
    _llava("llava-phi", _CLIP, _PHI_2, "arXiv 2401.02330; config.json of microsoft/phi-2"),
)

# The same plans, scaled as cobra-laptop is of cobra-3b: decoders 0.3 as wide and 0.375 as deep, towers of width 384 and 12 blocks
# at the real resolution, so that the numbers of image tokens are the real ones. Head sizes near the real ones.
_CLIP_TWIN = replace(_CLIP, width=384, depth=12, heads=6, mlp_width=1536)
_SIGLIP_TWIN = replace(_SIGLIP, width=384, depth=12, heads=6, mlp_width=1536)
_PHI_TWIN = DecoderShape("phi", 768, 12, 8, 3072, 51200)
TWINS = (
    _llava("llava-1.5-7b-twin", _CLIP_TWIN, DecoderShape("llama", 1280, 12, 10, 3440, 32000), "llava-1.5-7b scaled"),
    _llava("tinyllava-3.1b-twin", _SIGLIP_TWIN, _PHI_TWIN, "tinyllava-3.1b scaled"),
    _llava("mobilevlm-v2-3b-twin", _CLIP_TWIN, DecoderShape("llama", 768, 12, 12, 2080, 32000), "mobilevlm-v2-3b scaled", pooled=12),
    _llava("llava-phi-twin", _CLIP_TWIN, _PHI_TWIN, "llava-phi scaled"),
)

# For tests: everything in them is small, every part is there.
_CLIP_TINY = TowerConfig("clip", "clip", 32, 3, 2, 64, 112, 14)
_SIGLIP_TINY = TowerConfig("siglip", "siglip", 48, 3, 2, 96, 112, 14)
_PHI_TINY = DecoderShape("phi", 64, 2, 2, 128, 512)
_LLAMA_TINY = DecoderShape("llama", 64, 2, 2, 96, 512)
TINY = (
    _llava("llava-1.5-7b-tiny", _CLIP_TINY, _LLAMA_TINY, "for tests"),
    _llava("tinyllava-3.1b-tiny", _SIGLIP_TINY, _PHI_TINY, "for tests"),
    _llava("mobilevlm-v2-3b-tiny", _CLIP_TINY, _LLAMA_TINY, "for tests", pooled=4),
    _llava("llava-phi-tiny", _CLIP_TINY, _PHI_TINY, "for tests"),
)
SHAPES: dict[str, Vlm] = {shape.name: shape for shape in (*REAL, *TWINS, *TINY)}


def shape_of(name: str) -> Vlm:
    """Of a baseline or of a preset of cobra. ValueError with the names there are."""
    from cobra.config import PRESETS

    if name in SHAPES:
        return SHAPES[name]
    if name in PRESETS:
        return cobra_costs(PRESETS[name])
    raise ValueError(f"shape_of: name has {name!r}, expected one of {', '.join([*SHAPES, *PRESETS])}")
