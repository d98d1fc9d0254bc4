"""The scenarios and the presets: which models do which work at which sizes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.baselines.costs import REAL, TWINS, Vlm, shape_of, total
from benchmarks.baselines.pool import POOL
from benchmarks.harness.bench import DTYPES, Cost
from benchmarks.harness.table import bytes_text
from benchmarks.harness.timing import Provider
from benchmarks.scenarios.case import Case, Entry

PROMPT = 12  # tokens of "Describe the image specifically" in a chat template: the paper's question
ANSWER = 256  # tokens of the paper's answer
H200_MEMORY = 141 * 10**9  # bytes; what `resident` computes with when the GPU preset is asked of a machine without a GPU
LARGE_FOR_A_CPU = 4 << 30  # bytes of weights: larger models are computed on a CPU, not run


@dataclass(frozen=True)
class Preset:
    """Sizes of a run."""

    models: tuple[str, ...]  # the Cobra first
    dtype: str
    scenarios: tuple[str, ...]
    text_tokens: int = 64  # of a question
    contexts: tuple[int, ...] = ()  # tokens read before the step of decode-context
    user_context: int = 2048  # the one at which other settings than the best are shown too
    batches: tuple[int, ...] = ()
    batch_context: int = 1024
    resident_context: int = 8192
    resident_memory: int = 0  # bytes for weights and states; 0: four fifths of the device
    resident_at_most: tuple[int, ...] = ()  # sequences that are stepped together, if so many fit
    questions: tuple[int, ...] = ()
    images: tuple[int, ...] = ()
    seconds: float = 0.4
    patience: float = 20.0
    compile: bool = False  # torch.compile of decode steps, at `user_context` and in `paper`: it takes minutes


SCENARIOS = {
    "ttft": "an image and a question to the first token, whole and split into vision, projector and prefill",
    "decode-context": "one more token after so many",
    "decode-batch": "one more token for each of so many sequences",
    "resident": "sequences of 8192 tokens that a given memory holds, and the tokens per second of stepping them together",
    "second-question": "another question on an image that was read before",
    "many-questions": "so many questions on one image at once, to their first tokens",
    "several-images": "so many images and one question to the first token",
    "paper": f"the Cobra paper's protocol: one image, {ANSWER} new tokens, batch 1, whole time",
}
_COBRA, _COBRA_TWIN = "cobra-3b", "cobra-laptop"
_LAPTOP = Preset(
    models=(_COBRA_TWIN, *(s.name for s in TWINS)), dtype="fp32", scenarios=tuple(s for s in SCENARIOS if s != "paper"), text_tokens=32,
    contexts=(256, 2048, 8192, 32768), batches=(1, 4, 16), resident_memory=3 << 30, resident_at_most=(8,), questions=(4,), images=(2,),
    seconds=0.3, patience=20.0,
)  # fmt: skip
_GPU = Preset(
    models=(_COBRA, *(s.name for s in REAL)), dtype="bf16", scenarios=tuple(SCENARIOS), contexts=(256, 1024, 2048, 4096, 8192, 16384, 32768),
    batches=(1, 4, 16, 64, 256), resident_at_most=(64, 256), questions=(1, 4, 16, 64), images=(2, 4, 8), seconds=0.5, patience=60.0,
    compile=True,
)  # fmt: skip
_PAPER = replace(_GPU, scenarios=("paper",), patience=600.0)
PRESETS = {"laptop": _LAPTOP, "gpu": _GPU, "paper": _PAPER}


def preset_for(name: str, device: str) -> Preset:
    """ValueError with the names there are. `paper` on a CPU is the protocol on the twins."""
    if name not in PRESETS:
        raise ValueError(f"cases: preset has {name!r}, expected one of {', '.join(PRESETS)}")
    if name == "paper" and torch.device(device).type == "cpu":
        return replace(_LAPTOP, scenarios=("paper",), patience=120.0)
    return PRESETS[name]


def cases(preset: str | Preset, device: str = "cpu", scenarios: Sequence[str] | None = None) -> list[Case]:
    """Every case of a preset, in the order of `SCENARIOS`. Builds no model. scenarios: only these; ValueError for an unknown one."""
    sizes = preset_for(preset, device) if isinstance(preset, str) else preset
    unknown = sorted(set(scenarios or ()) - set(SCENARIOS))
    if unknown:
        raise ValueError(f"cases: scenarios has {', '.join(unknown)}, expected some of {', '.join(SCENARIOS)}")
    wanted = [name for name in sizes.scenarios if scenarios is None or name in scenarios]
    made = [case for name in wanted for case in _MAKERS[name](_Maker(sizes, device))]
    return made


class _Maker:
    """Entries and cases of one preset on one device."""

    def __init__(self, preset: Preset, device: str) -> None:
        self.preset, self.device = preset, device
        self.dtype = DTYPES[preset.dtype]
        self.itemsize = self.dtype.itemsize
        self.shapes = [shape_of(name) for name in preset.models]
        self.on_gpu = torch.device(device).type == "cuda"

    def subject(self, shape: Vlm):
        return POOL.get(shape.name, self.device, self.dtype)

    def entry(
        self, shape: Vlm, setting: str, cost: Cost, units: float, working: int, call: Callable[[], Callable[[], object]],
        *, graph: bool = True, comparable: bool = True, refused: str = "", **numbers: float,
    ) -> Entry:  # fmt: skip
        """`call()` builds what the entry needs and returns the function that is timed."""
        weights = shape.weight_bytes(self.itemsize)
        if not refused and not self.on_gpu and weights > LARGE_FOR_A_CPU:
            refused = f"{bytes_text(weights)} of weights: computed on a CPU, run on a GPU"
        name = shape.name if setting == "best" else f"{shape.name}, {setting}"
        return Entry(
            shape.name, setting, cost, units, weights, working, {"weight_bytes": weights, **numbers},
            lambda: Provider(name, call(), graph=graph, comparable=comparable), refused,
        )  # fmt: skip

    def activations(self, shape: Vlm, tokens: int, images: int = 0) -> int:
        """Bytes that a forward pass takes beside weights and states: an estimate from above."""
        widest = max(24 * self.width(shape), 3 * getattr(shape.language, "mlp", 0))
        vision = sum(images * t.num_patches * (12 * t.width + 2 * t.mlp_width) for t in shape.towers)
        hidden = max(o for _, o in shape.projector.linears)
        return self.itemsize * (tokens * widest + vision + 3 * images * shape.projector.tokens * hidden) + (64 << 20)

    @staticmethod
    def width(shape: Vlm) -> int:
        return shape.projector.linears[-1][1]

    def case(self, scenario: str, mode: str, parameters: dict[str, int], unit: str, entries: Sequence[Entry], **rest) -> Case:
        p = self.preset
        return Case(
            scenario, mode, self.device, p.dtype, parameters, unit, tuple(entries), seconds=p.seconds, patience=p.patience, **rest
        )

    # What several scenarios share.

    def first_token(self, shape: Vlm, images: int, text: int) -> tuple[Cost, int, int]:
        """(cost, working memory, tokens) of images and a question to the first token."""
        tokens = images * shape.image_tokens + text
        cost = total(
            shape.vision(self.itemsize, images), shape.project(self.itemsize, images), shape.prefill(tokens, self.itemsize)
        )
        return cost, self.activations(shape, tokens, images) + 2 * shape.state_bytes(tokens, self.itemsize), tokens

    def first_token_entry(self, shape: Vlm, setting: str, images: int, text: int) -> Entry:
        cost, working, tokens = self.first_token(shape, images, text)
        best = setting == "best"

        def call():
            subject = self.subject(shape)
            pixels, ids = subject.pixels(images), subject.ids(1, text)
            return functools.partial(subject.first_token if best else subject.first_token_as_users, pixels, ids)

        return self.entry(shape, setting, cost, 1, working, call, graph=best, tokens=tokens)

    def step_entry(self, shape: Vlm, setting: str, batch: int, context: int, refused: str = "", **numbers: float) -> Entry:
        cost = shape.decode(batch, context, self.itemsize)
        state = batch * shape.state_bytes(context + 1, self.itemsize)
        users = setting == "as users run it"
        working = state * (2 if users else 1) + self.activations(shape, batch) + 8 * batch * self.vocab(shape)

        def call():
            subject = self.subject(shape)
            if users:
                return subject.step_as_users(batch, context)
            return subject.step(batch, context, compiled=setting == "torch.compile")

        return self.entry(
            shape, setting, cost, batch, working, call, graph=not users, refused=refused, batch=batch,
            state_bytes=shape.state_bytes(context, self.itemsize), **numbers,
        )  # fmt: skip

    @staticmethod
    def vocab(shape: Vlm) -> int:
        language = shape.language
        return language.lm.padded_vocab_size if hasattr(language, "lm") else language.vocab

    def settings(self, shape: Vlm, *, compiled: bool = True) -> list[str]:
        """Of one model where all its settings are shown. Cobra on a CPU has one: users run it as it is measured."""
        cobra = shape is self.shapes[0]
        names = ["best"]
        if compiled and self.preset.compile and not cobra:
            names.append("torch.compile")
        return names if cobra and not self.on_gpu else [*names, "as users run it"]


def _ttft(m: _Maker) -> Iterator[Case]:
    text, size = m.preset.text_tokens, m.itemsize

    def vision(shape: Vlm) -> Entry:
        def call():
            subject = m.subject(shape)
            return functools.partial(subject.vision, subject.pixels(1))

        return m.entry(shape, "best", shape.vision(size), 1, m.activations(shape, 0, 1), call)

    def projector(shape: Vlm) -> Entry:
        def call():
            subject = m.subject(shape)
            return functools.partial(subject.project, subject.vision(subject.pixels(1)))

        return m.entry(shape, "best", shape.project(size), 1, m.activations(shape, 0, 1), call, tokens=shape.image_tokens)

    def prefill(shape: Vlm) -> Entry:
        tokens = shape.image_tokens + text

        def call():
            subject = m.subject(shape)
            embeddings = torch.randn(1, tokens, m.width(shape), device=m.device).to(m.dtype)
            return lambda: subject.read(embeddings)[0]

        working = m.activations(shape, tokens) + 2 * shape.state_bytes(tokens, size)
        return m.entry(shape, "best", shape.prefill(tokens, size), 1, working, call, tokens=tokens)

    parameters = {"images": 1, "text_tokens": text}
    yield m.case("ttft", "vision", {"images": 1}, "images", [vision(s) for s in m.shapes])
    yield m.case("ttft", "projector", {"images": 1}, "images", [projector(s) for s in m.shapes])
    yield m.case("ttft", "prefill", parameters, "first tokens", [prefill(s) for s in m.shapes])
    entries = [m.first_token_entry(s, setting, 1, text) for s in m.shapes for setting in m.settings(s, compiled=False)]
    yield m.case("ttft", "total", parameters, "first tokens", entries)


def _decode_context(m: _Maker) -> Iterator[Case]:
    for context in m.preset.contexts:
        shown = context == m.preset.user_context
        entries = [m.step_entry(s, setting, 1, context) for s in m.shapes for setting in (m.settings(s) if shown else ["best"])]
        yield m.case("decode-context", "step", {"batch": 1, "context": context}, "tokens", entries, energy=shown)


def _decode_batch(m: _Maker) -> Iterator[Case]:
    for batch in m.preset.batches:
        context = m.preset.batch_context
        entries = [m.step_entry(s, "best", batch, context) for s in m.shapes]
        yield m.case("decode-batch", "step", {"batch": batch, "context": context}, "tokens", entries)


def _resident(m: _Maker) -> Iterator[Case]:
    context = m.preset.resident_context
    there = m.on_gpu and torch.cuda.is_available()
    whole = torch.cuda.get_device_properties(m.device).total_memory if there else H200_MEMORY
    memory = m.preset.resident_memory or whole * 4 // 5
    for at_most in m.preset.resident_at_most:
        entries = []
        for shape in m.shapes:
            sequences = shape.resident(memory, context, m.itemsize)
            refused = "" if sequences else f"{bytes_text(memory)} hold its weights and not one sequence"
            entries.append(m.step_entry(shape, "best", max(1, min(sequences, at_most)), context, refused, sequences=sequences))
        yield m.case(
            "resident", "step", {"context": context, "memory": memory, "at_most": at_most}, "tokens", entries, energy=True,
            note=f"each model steps as many sequences together as {bytes_text(memory)} hold beside its weights, and no more than {at_most}",
        )  # fmt: skip


def _questions(m: _Maker, scenario: str, count: int) -> Case:
    text, size = m.preset.text_tokens, m.itemsize
    entries = []
    for shape in m.shapes:
        past = shape.image_tokens

        def call(shape=shape):
            subject = m.subject(shape)
            kept, ids = subject.keep(subject.pixels(1)), subject.ids(count, text)
            return functools.partial(subject.ask, kept, ids)

        cost = shape.prefill(text, size, batch=count, past=past, sharing=count)
        working = m.activations(shape, count * text + past, 1) + (2 * count + 1) * shape.state_bytes(past + text, size)
        entries.append(m.entry(shape, "best", cost, count, working, call, kept_bytes=shape.kept_bytes(size)))
        if count == 1 and m.on_gpu:  # who keeps nothing reads the image again; on a CPU that is seconds, and `ttft` has it
            entries.append(m.first_token_entry(shape, "as users run it", 1, text))
    return m.case(scenario, "first token", {"questions": count, "text_tokens": text}, "first tokens", entries)


def _second_question(m: _Maker) -> Iterator[Case]:
    yield _questions(m, "second-question", 1)


def _many_questions(m: _Maker) -> Iterator[Case]:
    for count in m.preset.questions:
        if count > 1:
            yield _questions(m, "many-questions", count)


def _several_images(m: _Maker) -> Iterator[Case]:
    text = m.preset.text_tokens
    for images in m.preset.images:
        entries = [m.first_token_entry(s, "best", images, text) for s in m.shapes]
        yield m.case("several-images", "first token", {"images": images, "text_tokens": text}, "first tokens", entries)


def _paper(m: _Maker) -> Iterator[Case]:
    def entry(shape: Vlm, setting: str) -> Entry:
        cost, working, tokens = m.first_token(shape, 1, PROMPT)
        steps = (shape.decode(1, tokens + i, m.itemsize) for i in range(ANSWER - 1))  # the first token is the prefill's

        def call():
            subject = m.subject(shape)
            pixels, ids = subject.pixels(1), subject.ids(1, PROMPT)
            if setting == "as users run it":
                return functools.partial(subject.answer_as_users, pixels, ids, ANSWER)
            return subject.answer(pixels, ids, ANSWER, compiled=setting == "torch.compile")

        working += 2 * shape.state_bytes(tokens + ANSWER, m.itemsize)
        # Greedy tokens part for good at the first near tie of random weights: they are no check in low precision.
        return m.entry(
            shape, setting, total(cost, *steps), ANSWER, working, call, graph=False, comparable=m.preset.dtype == "fp32", tokens=tokens
        )

    entries = [entry(s, setting) for s in m.shapes for setting in m.settings(s)]
    yield m.case(
        "paper", "answer", {"batch": 1, "images": 1, "text_tokens": PROMPT, "new_tokens": ANSWER}, "tokens", entries, energy=True
    )


_MAKERS: dict[str, Callable[[_Maker], Iterator[Case]]] = {
    "ttft": _ttft, "decode-context": _decode_context, "decode-batch": _decode_batch, "resident": _resident,
    "second-question": _second_question, "many-questions": _many_questions, "several-images": _several_images, "paper": _paper,
}  # fmt: skip
