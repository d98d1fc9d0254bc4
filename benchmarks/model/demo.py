"""The demo: a Cobra-shaped model on a photo, next to a LLaVA-shaped Transformer of the same parameter count.

    python -m benchmarks.model.demo        under 3 minutes on 2 cores; writes out/demo/

Both models have random weights: this measures speed and memory, never answers. It writes report.html (one file, good on a
phone), PNG plots and results.json (every median and spread, full environment stamp), and prints where."""

from __future__ import annotations

import argparse
import gc
import io
import json
import math
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image

from benchmarks import report, roofline
from benchmarks.baselines.memory import available_memory
from benchmarks.harness.environment import ROOT, stamp, steady_allocator
from benchmarks.harness.table import bytes_text, figures, print_table, seconds_text
from benchmarks.harness.timing import quantile

TEXT_TOKENS = 32
DECODE_TOKENS = 8  # per sample
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
ORDER = report.ORDER


class Progress:
    """One line per step, with the time since the start."""

    def __init__(self) -> None:
        self.start = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.start

    def __call__(self, text: str) -> None:
        print(f"[{self.seconds:5.1f} s] {text}", flush=True)


def spread(samples: Sequence[float]) -> dict:
    return {
        "median": quantile(samples, 0.5), "p20": quantile(samples, 0.2), "p80": quantile(samples, 0.8),
        "samples": [float(f"{s:.6g}") for s in samples],
    }  # fmt: skip


def interleave(
    jobs: dict[str, Callable[[], dict[str, float]]], rounds: int, seed: int, budget: float = math.inf
) -> dict[str, dict[str, list[float]]]:
    """Run every job once a round, in a seeded random order. A job returns {stage: seconds}; all samples are kept.

    After 3 rounds the budget (seconds) ends it: a busy machine gets fewer rounds, not a longer demo."""
    start = time.monotonic()
    samples: dict[str, dict[str, list[float]]] = {name: {} for name in jobs}
    order, turn = random.Random(seed), list(jobs)
    gc.collect()
    gc.disable()
    try:
        for done in range(rounds):
            if done >= 3 and time.monotonic() - start > budget:
                break
            order.shuffle(turn)
            for name in turn:
                for stage, seconds in jobs[name]().items():
                    samples[name].setdefault(stage, []).append(seconds)
    finally:
        gc.enable()
    return samples


def spreads(samples: dict[str, list[float]]) -> dict[str, dict]:
    return {stage: spread(values) for stage, values in samples.items()}


class Cobra:
    """The demo's view of a cobra model: the same methods as baselines.llava.Llava."""

    short = "Cobra"
    decode_mode = "eager, cobra_kernels"
    settings = "as shipped: eager PyTorch calling the compiled CPU kernels, no torch.compile"

    def __init__(self, preset: str, seed: int = 0) -> None:
        import cobra

        self.label = preset
        with warnings.catch_warnings():  # random weights are what this demo is about, and it says so
            warnings.simplefilter("ignore", cobra.RandomWeightsWarning)
            self.model = cobra.from_preset(preset, seed)
        self.image_size = self.model.config.vision.towers[0].image_size
        self.image_tokens = self.model.config.num_image_tokens

    @property
    def parameters(self) -> dict[str, int]:
        parts = {"vision": self.model.vision, "projector": self.model.projector, "language": self.model.llm}
        return {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}

    def preprocess(self, image: Image.Image):
        return self.model.preprocess(image)

    def vision(self, pixels):
        return self.model.vision(pixels)

    def project(self, features):
        return self.model.projector(features)  # (1, 729, d_model)

    def prefill(self, image, input_ids, room: int):
        """Image tokens, then text. A state has room for any number of tokens."""
        return self.model.llm.prefill(torch.cat([image, self.model.llm.backbone.embedding(input_ids)], dim=1))

    def encode(self, pixels):
        """What is kept of an image between questions: the state after it."""
        return self.model.encode_image(pixels)

    def kept_bytes(self, kept) -> int:
        return kept.nbytes

    def ask(self, kept, input_ids, room: int):
        """A question on a kept image; `kept` stays as it is."""
        return self.model.prefill(input_ids, image_state=kept)

    def state_at(self, context: int, room: int):
        """A state as after `context` tokens: it has one size, so any will do."""
        return self.model.llm.prefill(torch.zeros(1, 16, dtype=torch.long))[1]

    def state_bytes(self, state) -> int:
        return state.nbytes

    def rewind(self, state, context: int) -> None:
        """Nothing to forget."""

    def decode(self, token, state):
        return self.model.decode(token[:, 0], state)


def llava_config(vision: int, language: int, d_model: int):
    from benchmarks.baselines.llava import matched_config

    return matched_config(
        vision, language, d_model=d_model, layers=12, vocab=50280, vision_width=512, vision_layers=12
    )


# --- what is timed ----------------------------------------------------------------------------------------------------


def first_question(subject, pixels, ids: torch.Tensor) -> tuple[dict[str, float], torch.Tensor]:
    """Photo (already resized) and question to the first token; ({stage: seconds}, logits)."""
    start = time.perf_counter()
    features = subject.vision(pixels)
    after_vision = time.perf_counter()
    image = subject.project(features)
    after_projector = time.perf_counter()
    logits, _ = subject.prefill(image, ids, DECODE_TOKENS)
    logits.argmax(-1)
    end = time.perf_counter()
    stages = {
        "vision": after_vision - start, "projector": after_projector - after_vision, "prefill": end - after_projector,
        "total": end - start,
    }  # fmt: skip
    return stages, logits


def encode_image(subject, pixels) -> tuple[float, object]:
    start = time.perf_counter()
    kept = subject.encode(pixels)
    return time.perf_counter() - start, kept


def second_question(subject, kept, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    start = time.perf_counter()
    logits, _ = subject.ask(kept, ids, DECODE_TOKENS)
    logits.argmax(-1)
    return time.perf_counter() - start, logits


def decode_steps(subject, state, context: int, tokens: int) -> dict[str, float]:
    """{"step": seconds per token}: greedy, each token is the argmax of the step before."""
    subject.rewind(state, context)
    token = torch.zeros(1, 1, dtype=torch.long)
    start = time.perf_counter()
    for _ in range(tokens):
        token = subject.decode(token, state).argmax(-1, keepdim=True)
    return {"step": (time.perf_counter() - start) / tokens}


def questions(subjects: dict, photo: Image.Image, ids: torch.Tensor, rounds: int, seed: int, say: Progress) -> dict:
    """Everything about time to first token; also that a kept image answers as a fresh one does."""
    result: dict[str, dict] = {"first": {}, "encode": {}, "second": {}}
    pixels, kept, first_call = {}, {}, {}
    for name, subject in subjects.items():
        pixels[name] = subject.preprocess(photo)
        stages, logits = first_question(subject, pixels[name], ids)
        first_call[name] = stages["total"]
        say(f"{subject.label}: first token after {seconds_text(stages['total'])}, the very first call of the process")
        _, kept[name] = encode_image(subject, pixels[name])
        _, again = second_question(subject, kept[name], ids)
        gap = ((again - logits).norm() / logits.norm()).item()
        if not gap < 1e-3:
            raise RuntimeError(f"{subject.label}: a question on the kept image differs from one on the image by {gap:.1e}")

    def timed_preprocess(name: str) -> dict[str, float]:
        start = time.perf_counter()
        subjects[name].preprocess(photo)
        return {"preprocess": time.perf_counter() - start}

    say(f"time to first token, up to {rounds} interleaved rounds ...")
    first = interleave({n: lambda n=n: first_question(subjects[n], pixels[n], ids)[0] for n in subjects}, rounds, seed, 24)
    resized = interleave({n: lambda n=n: timed_preprocess(n) for n in subjects}, rounds, seed, 1)
    encoded = interleave({n: lambda n=n: {"total": encode_image(subjects[n], pixels[n])[0]} for n in subjects}, 3, seed)
    say(f"time to first token of a second question, up to {3 * rounds} interleaved rounds ...")
    asked = interleave(
        {n: lambda n=n: {"total": second_question(subjects[n], kept[n], ids)[0]} for n in subjects}, 3 * rounds, seed, 6
    )
    for name, subject in subjects.items():
        result["first"][name] = {**spreads(first[name]), **spreads(resized[name]), "first_call": first_call[name]}
        result["encode"][name] = {**spreads(encoded[name]), "bytes": subject.kept_bytes(kept[name])}
        result["second"][name] = spreads(asked[name])
    return result


def choose_decode_mode(llava, context: int, allowed: bool, seed: int, say: Progress) -> None:
    """The Transformer decodes eagerly or compiled, whichever is faster here: it gets its best settings."""
    if not allowed:
        return
    state = llava.state_at(context, DECODE_TOKENS)
    say(f"{llava.label}: compiling its decode step (torch.compile) ...")
    llava.compile_decode()
    try:
        decode_steps(llava, state, context, 2)
    except (RuntimeError, OSError) as error:  # no compiler, or one that torch cannot use: eager is what is left, and the page says so
        llava.eager_decode()
        llava.decode_mode = "eager (torch.compile failed here)"
        say(f"torch.compile failed ({type(error).__name__}), decoding eagerly")
        return

    def run(compiled: bool) -> dict[str, float]:
        llava.compile_decode() if compiled else llava.eager_decode()
        return decode_steps(llava, state, context, DECODE_TOKENS)

    samples = interleave({"compiled": lambda: run(True), "eager": lambda: run(False)}, 5, seed)
    steps = {name: quantile(s["step"], 0.5) for name, s in samples.items()}
    if steps["compiled"] <= steps["eager"]:
        llava.compile_decode()
    else:
        llava.eager_decode()
    say(f"compiled {seconds_text(steps['compiled'])} a token, eager {seconds_text(steps['eager'])}: using {llava.decode_mode}")


def contexts_that_fit(llava, contexts: Sequence[int], say: Progress) -> list[int]:
    """All caches are alive at once, since all contexts share the rounds; the longest that do not fit are left out, aloud."""
    probe = 64
    per_token, budget, fitting = llava.state_bytes(llava.state_at(probe, 0)) / probe, 0.5 * available_memory(), []
    for context in contexts:
        budget -= per_token * (context + DECODE_TOKENS)
        if budget < 0:
            say(f"decode at {context} tokens and above left out: a KV cache of {bytes_text(per_token * context)} is too much here")
            break
        fitting.append(context)
    return fitting


def decoding(subjects: dict, contexts: Sequence[int], rounds: int, seed: int, say: Progress) -> list[dict]:
    """Every context of every model in the same rounds, and with them a read of as many bytes as the weights: the roof."""
    weights = {name: 4 * subject.parameters["language"] for name, subject in subjects.items()}
    buffer = torch.ones(max(weights.values()) // 4)

    def read_roof() -> dict[str, float]:
        start = time.perf_counter()
        buffer.sum()
        return {"step": time.perf_counter() - start}

    contexts = contexts_that_fit(subjects["llava"], contexts, say)
    jobs: dict[str, Callable[[], dict[str, float]]] = {"roof": read_roof}
    states = {}
    for context in contexts:
        for name, subject in subjects.items():
            key = f"{name} {context}"
            state = states[key] = subject.state_at(context, DECODE_TOKENS)
            jobs[key] = lambda subject=subject, state=state, context=context: decode_steps(subject, state, context, DECODE_TOKENS)
            decode_steps(subject, state, context, 2)
    say(f"decode at {', '.join(map(report.context_text, contexts))} tokens of context, up to {rounds} interleaved rounds ...")
    samples = interleave(jobs, rounds, seed, 36)
    bandwidth = buffer.nbytes / quantile(samples["roof"]["step"], 0.5)
    rows = []
    for context in contexts:
        row: dict = {"context": context}
        for name, subject in subjects.items():
            key = f"{name} {context}"
            step, size = spread(samples[key]["step"]), subject.state_bytes(states[key])
            row[name] = {"step": step, "bytes": size, "read_fraction": (weights[name] + size) / bandwidth / step["median"]}
        rows.append(row)
    return rows


def who_ran(subject, pixels, ids: torch.Tensor) -> list[dict]:
    """Backend and calls of every op during one question and a few decoded tokens, counted inside the implementations."""
    from cobra_kernels import call_counts, reset_call_counts

    reset_call_counts()
    logits, state = subject.prefill(subject.project(subject.vision(pixels)), ids, DECODE_TOKENS)
    for _ in range(8):
        logits = subject.decode(logits.argmax(-1, keepdim=True), state)
    return [{"op": op, "backend": backend, "calls": calls} for (op, backend), calls in sorted(call_counts().items()) if calls]


def describe(subject) -> dict:
    parameters = subject.parameters
    return {
        "label": subject.label, "short": subject.short, "settings": subject.settings, "decode_mode": subject.decode_mode,
        "parameters": {**parameters, "total": sum(parameters.values())},
        "image_tokens": subject.image_tokens, "image_size": subject.image_size,
    }  # fmt: skip


# --- the run ----------------------------------------------------------------------------------------------------------


def build(preset: str, seed: int, say: Progress) -> dict:
    from benchmarks.baselines.llava import Llava

    say(f"building {preset} with random weights ...")
    cobra = Cobra(preset, seed)
    sizes = cobra.parameters
    say(f"building a LLaVA-shaped Transformer of {sum(sizes.values()) / 1e6:.0f} M parameters ...")
    # The projectors differ by design (one tower against two); what LLaVA's lacks goes to its language model.
    d_model = cobra.model.llm.config.d_model
    language = sizes["language"] + sizes["projector"] - 512 * d_model - d_model**2 - 2 * d_model
    return {"cobra": cobra, "llava": Llava(llava_config(sizes["vision"], language, d_model), seed)}


def run(args: argparse.Namespace) -> dict:
    say = Progress()
    steady_allocator()
    if args.threads:
        torch.set_num_threads(args.threads)
    environment = stamp()
    say(f"{environment['device']}, {environment['threads']} threads, {environment['cpu_level']}, torch {environment['torch']}")
    photo = Image.open(args.photo).convert("RGB")
    subjects = build(args.preset, args.seed, say)
    ids = torch.randint(2, 50000, (1, TEXT_TOKENS), generator=torch.Generator().manual_seed(args.seed))
    rounds = 3 if args.quick else 7
    contexts = CONTEXTS[:3] if args.quick else CONTEXTS
    with torch.no_grad():
        results = {"schema": 1, "environment": environment}
        asked = questions(subjects, photo, ids, rounds, args.seed, say)
        backends = who_ran(subjects["cobra"], subjects["cobra"].preprocess(photo), ids)
        choose_decode_mode(subjects["llava"], contexts[0], not args.no_compile and not args.quick, args.seed, say)
        say("measuring this machine's roofs ...")
        roofs = roofline.machine_roofs(seconds=0.4)
        decode = decoding(subjects, contexts, rounds, args.seed, say)
    return results | {
        "photo": {"file": Path(args.photo).name, "size": list(photo.size), "credit": credit(Path(args.photo))},
        "settings": {
            "text_tokens": TEXT_TOKENS, "contexts": [d["context"] for d in decode], "decode_tokens": DECODE_TOKENS,
            "dtype": "fp32", "seed": args.seed, "quick": args.quick, "seconds": round(say.seconds, 1),
        },
        "roofs": roofs, "models": {name: describe(subject) for name, subject in subjects.items()}, "backends": backends,
        **asked, "decode": decode,
    }  # fmt: skip


def credit(photo: Path) -> str:
    """The line under the photo; assets/README.md says where each comes from."""
    return {"astronaut.jpg": "Astronaut Eileen Collins. NASA, public domain."}.get(photo.name, photo.name)


def thumbnail(photo: Path) -> bytes:
    """A small JPEG for the page."""
    image = Image.open(photo).convert("RGB")
    image.thumbnail((480, 480), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80, optimize=True)
    return buffer.getvalue()


def write_report(results: dict, photo: Path | None, out: Path) -> None:
    """results.json, report.html and the PNG plots into `out`, and where they are on standard output."""
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "results.json", out / "report.html"]
    written[0].write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    written[1].write_text(report.demo_page(results, thumbnail(photo) if photo else None))
    pictures = report.demo_pngs(results, out)
    if not pictures:
        print("PNG plots left out: matplotlib is not installed (the page has the same plots)")
    print("written:")
    for path in [*written, *pictures]:
        print(f"  {os.path.relpath(path)}")


def print_summary(r: dict) -> None:
    models = r["models"]
    print_table(
        "what ran where", [("op", "<"), ("backend", "<"), ("calls", ">")],
        [[b["op"], b["backend"], str(b["calls"])] for b in r["backends"]],
    )  # fmt: skip
    rows = [["parameters", *(f"{models[n]['parameters']['total'] / 1e6:.1f} M, random" for n in ORDER)]]
    rows += [[f"TTFT: {s}", *(seconds_text(r["first"][n][s]["median"]) for n in ORDER)] for s in (*report.STAGES, "total")]
    rows += [["TTFT: second question, image kept", *(seconds_text(r["second"][n]["total"]["median"]) for n in ORDER)]]
    rows += [["bytes kept for the image", *(bytes_text(r["encode"][n]["bytes"]) for n in ORDER)]]
    for d in r["decode"]:
        text = [f"{figures(1 / d[n]['step']['median'])} tokens/s, {bytes_text(d[n]['bytes'])}" for n in ORDER]
        rows.append([f"decode at {report.context_text(d['context'])}", *text])
    print()
    print_table("medians", [("", "<"), *((models[n]["label"], ">") for n in ORDER)], rows)
    print()
    warning = report.disturbance(r)
    for line in [*([warning] if warning else []), *report.findings(r)]:
        print(f"- {line}")
    print(f"- {report.caveats(r)[0]}")
    print()


def default_photo() -> Path:
    photos = sorted(p for p in (ROOT / "assets").glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not photos:
        raise FileNotFoundError("demo: assets/ has no photo; name one with --photo")
    return photos[0]


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(
        prog="python -m benchmarks.model.demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--photo", type=Path, default=None, help="an image file (default: the one in assets/)")
    p.add_argument("--preset", default="cobra-laptop", help="the cobra model (default: %(default)s)")
    p.add_argument("--out", type=Path, default=ROOT / "out" / "demo", help="folder to write to (default: out/demo)")
    p.add_argument("--threads", type=int, default=0, help="CPU threads (default: torch's)")
    p.add_argument("--seed", type=int, default=0, help="weights, question and order of the rounds (default: %(default)s)")
    p.add_argument("--quick", action="store_true", help="fewer rounds and contexts, no torch.compile: half a minute")
    p.add_argument("--no-compile", action="store_true", help="the Transformer decodes eagerly, whatever is faster")
    args = p.parse_args(argv)
    args.photo = args.photo or default_photo()
    try:
        results = run(args)
    except KeyboardInterrupt:
        print("\nstopped; nothing was written")
        return 130
    print()
    print_summary(results)
    write_report(results, args.photo, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
