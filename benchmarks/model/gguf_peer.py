"""llama.cpp as a provider of a language-model bench, through llama-cpp-python: our weights, written to a gguf file and read back by it.

Both packages are optional (`pip install llama-cpp-python gguf`); without them the bench says so in one line. As it is best used: the
instruction sets of this machine, one pass for the whole prompt, as many threads as torch."""

from __future__ import annotations

import ctypes
import functools
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.harness.timing import Provider
from benchmarks.shapes import LMShape

PAST = 16  # tokens behind a decode step


def absence() -> str | None:
    """Why there is no such provider."""
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def write_gguf(model: nn.Module, shape: LMShape, path: Path, quantized: bool = False) -> None:
    """The weights of a MambaLMHeadModel as a gguf file of architecture `mamba` without a tokenizer. Quantized: the four projections and the
    embedding as Q8_0, all else fp32, as its own tool does."""
    import gguf

    writer = gguf.GGUFWriter(path, "mamba")
    writer.add_context_length(2**20)
    writer.add_embedding_length(shape.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(shape.layers)
    writer.add_ssm_conv_kernel(shape.width)
    writer.add_ssm_inner_size(shape.d_inner)
    writer.add_ssm_state_size(shape.dstate)
    writer.add_ssm_time_step_rank(shape.dt_rank)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("no_vocab")
    writer.add_vocab_size(shape.vocab)

    def add(name: str, tensor: torch.Tensor, product: bool = False) -> None:
        values = tensor.detach().float().contiguous().numpy()
        if not (quantized and product):
            writer.add_tensor(name, values)
            return
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)

    add("token_embd.weight", model.backbone.embedding.weight, product=True)
    add("output_norm.weight", model.backbone.norm_f.weight)
    for i, layer in enumerate(model.backbone.layers):
        mixer = layer.mixer
        add(f"blk.{i}.attn_norm.weight", layer.norm.weight)
        add(f"blk.{i}.ssm_in.weight", mixer.in_proj.weight, product=True)
        add(f"blk.{i}.ssm_conv1d.weight", mixer.conv1d.weight.squeeze(1))  # (d_inner, width)
        add(f"blk.{i}.ssm_conv1d.bias", mixer.conv1d.bias)
        add(f"blk.{i}.ssm_x.weight", mixer.x_proj.weight, product=True)
        add(f"blk.{i}.ssm_dt.weight", mixer.dt_proj.weight, product=mixer.dt_rank % 32 == 0)  # Q8_0 comes in blocks of 32
        add(f"blk.{i}.ssm_dt.bias", mixer.dt_proj.bias)
        add(f"blk.{i}.ssm_a", -torch.exp(mixer.A_log.detach().float()))
        add(f"blk.{i}.ssm_d", mixer.D)
        add(f"blk.{i}.ssm_out.weight", mixer.out_proj.weight, product=True)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class LlamaCpp:
    """A loaded model with one sequence. Single-threaded use; lives as long as the bench."""

    def __init__(self, path: Path, tokens: int, vocab: int) -> None:
        import llama_cpp

        self.api, self.vocab = llama_cpp, vocab
        self.silent = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: the library holds a bare pointer
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p(0))
        parameters = llama_cpp.llama_model_default_params()
        parameters.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp does not load {path.name}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx = options.n_batch = options.n_ubatch = tokens
        options.n_threads = options.n_threads_batch = torch.get_num_threads()
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp makes no context")
        self.memory = llama_cpp.llama_get_memory(self.context)

    def forget(self) -> None:
        self.api.llama_memory_clear(self.memory, True)

    def step(self, ids: torch.Tensor) -> torch.Tensor:
        """Logits (1, vocab) after ids (1, tokens), which follow what the sequence already holds."""
        tokens = ids[0].to(torch.int32)
        pointer = ctypes.cast(tokens.data_ptr(), ctypes.POINTER(self.api.llama_token))
        status = self.api.llama_decode(self.context, self.api.llama_batch_get_one(pointer, tokens.numel()))
        if status:
            raise RuntimeError(f"llama_decode failed with {status}")
        logits = ctypes.cast(self.api.llama_get_logits_ith(self.context, -1), ctypes.POINTER(ctypes.c_float * self.vocab))
        return torch.frombuffer(logits.contents, dtype=torch.float32).clone()[None]


@functools.cache
def _say(line: str) -> None:
    print(line)


@functools.cache
def loaded(make_model: Callable[[], nn.Module], shape: LMShape, tokens: int, quantized: bool = False) -> LlamaCpp:
    with tempfile.TemporaryDirectory() as folder:  # the file stays mapped after it is gone
        path = Path(folder) / "mamba.gguf"
        write_gguf(make_model(), shape, path, quantized)
        return LlamaCpp(path, tokens, shape.vocab)


def prefill(make_model: Callable[[], nn.Module], shape: LMShape, tokens: int, quantized: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    def call(ids: torch.Tensor) -> torch.Tensor:
        peer = loaded(make_model, shape, tokens, quantized)
        peer.forget()
        return peer.step(ids)

    return call


def decode(make_model: Callable[[], nn.Module], shape: LMShape, tokens: int, quantized: bool = False) -> Callable[[torch.Tensor], torch.Tensor]:
    """One more token each call, after PAST tokens of id 0."""
    begun = False

    def call(token: torch.Tensor) -> torch.Tensor:
        nonlocal begun
        peer = loaded(make_model, shape, tokens, quantized)
        if not begun:
            peer.forget()
            peer.step(torch.zeros(1, PAST, dtype=torch.long))
            begun = True
        return peer.step(token)

    return call


def providers(kind: Callable, make_model: Callable[[], nn.Module], shape: LMShape, tokens: int) -> list[Provider]:
    """llama.cpp with the same fp32 weights, which must give the same logits, and with Q8_0 weights, which need not. [] without it."""
    reason = absence()
    if reason is not None:
        _say(f"left out: llama.cpp: {reason}")
        return []
    return [
        Provider("llama.cpp", kind(make_model, shape, tokens), slow_start=True),
        Provider("llama.cpp q8_0", kind(make_model, shape, tokens, True), slow_start=True, comparable=False),
    ]
