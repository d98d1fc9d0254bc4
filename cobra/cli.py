"""The command line: `cobra generate | chat | convert | verify-checkpoint | bench | doctor`, also as `python -m cobra`.

Answers go to stdout and everything else to stderr, so that an answer can be piped. Errors are one line, exit status 1; a
wrong command line is 2, Ctrl-C is 130. Heavy imports are made when a command needs them: help is instant.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import cobra
from cobra.config import PRESETS, VISION_BACKBONES

if TYPE_CHECKING:
    from cobra.model import CobraVLM, ImageState

TOWERS = sorted({tower.name for vision in VISION_BACKBONES.values() for tower in vision.towers})
INTERRUPTED = 130  # 128 + SIGINT, as shells report it

MAIN_EPILOG = """\
examples:
  cobra generate photo.jpg "What is in the picture?" --model path/to/checkpoint
  cobra generate photo.jpg "Hello?" --preset cobra-tiny      nothing to download: random weights, noise for an answer
  cobra chat photo.jpg --model path/to/checkpoint            ask many questions, the photo is read once
  cobra convert cobra+3b out --dino D --siglip S             published weights, once, to a folder for --model
  cobra bench                                                speed next to the LLaVA family, with a report; resumes
  cobra doctor                                               what works on this machine, to paste into an issue

`cobra COMMAND --help` explains a command.
"""

GENERATE_EPILOG = """\
examples:
  cobra generate photo.jpg "How many people are there?" --model path/to/checkpoint
  cobra generate photo.jpg "Write a poem about it." --model path/to/checkpoint --sample --temperature 0.7 --top-p 0.9
  cobra generate photo.jpg "Is it raining?" --preset cobra-laptop --max-new-tokens 32 --stats

The answer goes to stdout, piece by piece; notes and progress go to stderr (--quiet leaves them out).
"""

CHAT_EPILOG = """\
in the chat:
  any text          a question about the photo; earlier questions and answers are remembered
  /image PATH       look at another photo and start over
  /reset            forget the conversation, keep the photo
  /help             this list
  /quit             leave (so does Ctrl-D)

Ctrl-C while an answer is coming stops that answer; at the prompt it leaves.
"""

CONVERT_EPILOG = """\
examples:
  cobra convert cobra+3b cobra-3b --dino dino.safetensors --siglip siglip.bin --tokenizer tokenizer.json
  cobra generate photo.jpg "What is this?" --model cobra-3b

SOURCE has config.json and checkpoints/latest-checkpoint.pt. That file is a pickle, which could run code: it is opened by a process
that can read files and nothing else, and only tensors are taken from it. The published ones lack the vision towers; for cobra+3b they
are timm's vit_large_patch14_reg4_dinov2.lvd142m and ViT-SO400M-14-SigLIP-384, with timm's or Hugging Face's names in them. The
tokenizer.json is that of the language model. TARGET appears when it is complete.
"""

VERIFY_EPILOG = """\
examples:
  cobra verify-checkpoint cobra-3b                           a folder of `cobra convert`
  cobra verify-checkpoint cobra+3b                           an official folder, before its conversion
  cobra verify-checkpoint siglip.bin --against cobra-3b      one file, as a part of that model

Prints every tensor with its dtype, shape and sha256, then what is wrong. Exit status: 0 nothing is wrong, 1 something is.
"""

CHAT_COMMANDS = CHAT_EPILOG.split("\n\n")[0].split("\n", 1)[1]


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit status."""
    args = _parser().parse_args(argv)
    _show_warnings_in_one_line()
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("\ncobra: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while it exits
        return 1
    except Exception as error:
        if not _is_expected(error):
            raise
        print(f"cobra: error: {error}", file=sys.stderr)
        return 1


def _is_expected(error: Exception) -> bool:
    """Errors that say what the user can change; any other is a bug, and its traceback is wanted."""
    import torch

    from cobra_kernels.errors import CobraKernelsError

    return isinstance(error, (cobra.CobraError, CobraKernelsError, torch.OutOfMemoryError, MemoryError))


def _show_warnings_in_one_line() -> None:
    def show(message, category, filename, lineno, file=None, line=None):
        if issubclass(category, UserWarning):
            print(f"cobra: note: {message}", file=sys.stderr)

    warnings.showwarning = show


# --- arguments ----------------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cobra",
        description="Cobra answers questions about pictures, with a Mamba language model.",
        epilog=MAIN_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"cobra {cobra.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    generate = _command(commands, "generate", _generate, "answer one question about a photo", GENERATE_EPILOG)
    generate.add_argument("image", metavar="PHOTO", help="an image file: JPEG, PNG, WebP, BMP, GIF or TIFF")
    generate.add_argument("question", metavar="QUESTION", help="what to ask, in quotes")
    generate.add_argument("--raw", action="store_true", help="QUESTION is the whole prompt: add no chat format around it")
    generate.add_argument("--stats", action="store_true", help="say how long the parts took")
    _model_arguments(generate)
    _answer_arguments(generate)

    chat = _command(commands, "chat", _chat, "talk about a photo, question after question", CHAT_EPILOG)
    chat.add_argument("image", metavar="PHOTO", nargs="?", help="an image file; without one, /image gives it later")
    _model_arguments(chat)
    _answer_arguments(chat)

    convert = _command(commands, "convert", _convert, "make a checkpoint directory of an official one", CONVERT_EPILOG)
    convert.add_argument("source", metavar="SOURCE", help="the official folder")
    convert.add_argument("target", metavar="TARGET", help="a new or empty folder")
    for name in TOWERS:
        convert.add_argument(f"--{name}", metavar="FILE", help=f"weights of the {name} tower: .safetensors, .pt or .bin")
    convert.add_argument("--tokenizer", metavar="FILE", help="tokenizer.json of the language model")
    convert.add_argument(
        "--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="of the weights (default: %(default)s); "
        "A_log, D and dt_proj.bias are float32 anyway",
    )  # fmt: skip
    convert.add_argument("--quiet", action="store_true", help="no notes and no progress")

    verify = _command(commands, "verify-checkpoint", _verify, "list a checkpoint's tensors and what is wrong with them", VERIFY_EPILOG)
    verify.add_argument("path", metavar="PATH", help="a checkpoint folder (ours, official, mamba_ssm's, transformers') or one weight file")
    presets = ", ".join(PRESETS)
    verify.add_argument(
        "--against", metavar="CONFIG", help=f"a config.json, a folder with one, or a preset: {presets} (default: the folder's own)"
    )
    verify.add_argument("--quiet", action="store_true", help="no notes and no progress")

    bench = commands.add_parser(
        "bench", help="measure speed next to the LLaVA family, write a report; resumes", add_help=False, prefix_chars="\0"
    )
    bench.add_argument("rest", nargs=argparse.REMAINDER)
    bench.set_defaults(run=_bench)

    _command(commands, "doctor", _doctor, "what works on this machine, to paste into an issue", None)
    return parser


def _command(commands, name: str, run, summary: str, epilog: str | None) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=summary,
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the model (one of the first two)")
    source = group.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", metavar="DIR", help="a checkpoint directory")
    source.add_argument(
        "--preset", choices=PRESETS, metavar="NAME", help=f"a shape with random weights, for trying things out: {', '.join(PRESETS)}"
    )
    group.add_argument("--device", help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    group.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        help="of the weights (default: as stored; for a preset float32 on a CPU, bfloat16 elsewhere)",
    )
    parser.add_argument("--quiet", action="store_true", help="no notes and no progress")


def _answer_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the answer")
    group.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="end it here at the latest (default: %(default)s)")
    group.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end it before this text; may be repeated")
    group.add_argument("--sample", action="store_true", help="draw at random; without it, always the most probable token")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="with --sample: below 1 is more careful (default: 1)")
    group.add_argument("--top-k", type=int, default=0, metavar="K", help="with --sample: only the K most probable tokens (default: all)")
    group.add_argument("--top-p", type=float, default=1.0, metavar="P", help="with --sample: only the most probable tokens of mass P")
    group.add_argument("--min-p", type=float, default=0.0, metavar="P", help="with --sample: only tokens P times as probable as the best")
    group.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: repeat less (default: 1)")
    group.add_argument("--seed", type=int, default=0, help="of the draws, and of a preset's weights (default: %(default)s)")


def _options(args: argparse.Namespace) -> dict:
    return {
        "max_new_tokens": args.max_new_tokens,
        "do_sample": args.sample,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "stop": args.stop,
        "seed": args.seed,
    }


# --- commands -----------------------------------------------------------------------------------------------------------


def _generate(args: argparse.Namespace) -> int:
    from cobra.generate import Options
    from cobra.image import load_image

    Options(**_options(args))  # a bad value is told before a model is read
    image = load_image(args.image)
    vlm = _model(args)
    prompt = args.question if args.raw else _ask(vlm.get_prompt_builder(), args.question)
    start = time.perf_counter()
    with _step("looking at the photo", args.quiet):
        kept = vlm.encode_image(image)
    seen = time.perf_counter()
    times = []
    for piece in vlm.stream(kept, prompt, **_options(args)):
        times.append(time.perf_counter())
        _say(piece)
    print(flush=True)
    if args.stats:
        decode = f", then {(len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else ""
        print(
            f"first token after {times[0] - start:.2f} s (photo {seen - start:.2f}, question {times[0] - seen:.2f}){decode}; "
            f"{len(times)} tokens; the photo is kept in {kept.nbytes / 1e6:.1f} MB",
            file=sys.stderr,
        )
    return 0


def _chat(args: argparse.Namespace) -> int:
    from cobra.generate import Options
    from cobra.image import load_image

    Options(**_options(args))
    image = load_image(args.image) if args.image else None
    vlm = _model(args)
    kept = _look(vlm, image, args.quiet) if image is not None else None
    builder = vlm.get_prompt_builder()
    if not args.quiet:
        print("Ask about the photo. /help lists the commands, /quit leaves.", file=sys.stderr)
    while (line := _read_line()) is not None:
        command, _, rest = line.partition(" ")
        if not line:
            continue
        if command in ("/quit", "/exit"):
            break
        if command == "/help":
            print(CHAT_COMMANDS, file=sys.stderr)
        elif command == "/reset":
            builder = vlm.get_prompt_builder()
        elif command == "/image":
            try:
                kept, builder = _look(vlm, load_image(rest.strip()), args.quiet), vlm.get_prompt_builder()
            except cobra.ImageError as error:
                print(f"cobra: error: {error}", file=sys.stderr)
        elif command.startswith("/"):
            print(f"cobra: no command {command}; /help lists them", file=sys.stderr)
        else:
            builder = _turn(vlm, kept, builder, line, args)
    return 0


def _turn(vlm: CobraVLM, kept: ImageState | None, builder, question: str, args: argparse.Namespace):
    """One question and its answer, printed; returns the builder that remembers both."""
    prompt = _ask(builder, question)
    said = []
    try:
        for piece in vlm.stream(kept, prompt, **_options(args)):
            said.append(piece)
            _say(piece)
    except KeyboardInterrupt:  # ends this answer only
        pass
    except cobra.PromptError as error:  # the conversation has become too long
        print(f"cobra: error: {error}; starting over", file=sys.stderr)
        return vlm.get_prompt_builder()
    print(flush=True)
    builder.add_turn("gpt", "".join(said))
    return builder


def _convert(args: argparse.Namespace) -> int:
    import torch

    from cobra.convert import convert

    towers = {name: getattr(args, name) for name in TOWERS if getattr(args, name)}
    start = time.perf_counter()
    with _progress(f"converting {args.source}", args.quiet) as begin:
        config = convert(
            args.source, args.target, towers=towers, tokenizer=args.tokenizer, dtype=getattr(torch, args.dtype), begin=begin
        )
    if not args.quiet:
        lacks = "" if args.tokenizer else "; without --tokenizer the model takes and returns token ids only"
        print(f"{args.target}: {config.model_id}, {time.perf_counter() - start:.1f} s{lacks}", file=sys.stderr)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from cobra.verify import verify

    with _progress(f"reading {args.path}", args.quiet or sys.stdout.isatty()) as begin:  # the lines themselves are progress
        report = verify(args.path, args.against, say=lambda line: print(_plain(line)), begin=begin)
    for line in report.summary():
        print(_plain(line))
    return 0 if report.is_right else 1


def _bench(args: argparse.Namespace) -> int:
    tree = str(Path(cobra.__file__).resolve().parent.parent)
    if tree not in sys.path:  # a script's path does not hold the tree that it was installed from
        sys.path.append(tree)
    try:
        from benchmarks.suite import run
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "benchmarks":
            raise
        print("cobra: error: the benchmarks are in the source tree only; run this there", file=sys.stderr)
        return 1
    return run.main(args.rest)


def _doctor(args: argparse.Namespace) -> int:
    from importlib import metadata

    from cobra_kernels import doctor

    print(f"cobra {cobra.__version__}")
    for package in ("transformers", "tokenizers", "safetensors", "pillow"):
        try:
            version = metadata.version(package)
        except metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:12} {version}")
    print()
    return doctor.main()


# --- pieces -------------------------------------------------------------------------------------------------------------


def _model(args: argparse.Namespace) -> CobraVLM:
    with _step(f"loading {args.model or args.preset}", args.quiet):
        import torch

        device = torch.device(_device(args.device))
        dtype = getattr(torch, args.dtype) if args.dtype else None
        if args.model:
            vlm = cobra.load(args.model, device=device, dtype=dtype)
        else:
            with warnings.catch_warnings():
                if args.quiet:
                    warnings.simplefilter("ignore", cobra.RandomWeightsWarning)
                half = torch.bfloat16 if device.type != "cpu" else None
                vlm = cobra.from_preset(args.preset, args.seed, device=device, dtype=dtype or half)
    return vlm


def _device(name: str | None) -> str:
    """A device that exists; raises RequestError."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch without CUDA
        raise cobra.RequestError(f"--device is {name!r}, which torch cannot use: {str(error).splitlines()[0]}") from None
    return name


def _look(vlm: CobraVLM, image, quiet: bool) -> ImageState:
    with _step("looking at the photo", quiet):
        return vlm.encode_image(image)


def _ask(builder, question: str):
    builder.add_turn("human", question)
    return builder.get_prompt()


def _say(piece: str) -> None:
    """Print a part of an answer."""
    print(_plain(piece), end="", flush=True)


def _plain(text: str) -> str:
    """For a terminal, without control characters, which could move its cursor or worse."""
    if sys.stdout.isatty():
        text = "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")
    return text


def _read_line() -> str | None:
    """A line from the user, without blanks around it; None at the end of the input."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


@contextlib.contextmanager
def _step(text: str, quiet: bool) -> Iterator[None]:
    """Says what takes its time: a spinner on a terminal, plain lines elsewhere, on stderr."""
    if quiet:
        yield
        return
    start = time.perf_counter()
    with _spinner(text):
        yield
    print(f"{text}: {time.perf_counter() - start:.1f} s", file=sys.stderr)


@contextlib.contextmanager
def _spinner(text: str) -> Iterator[None]:
    console = _console()
    if console is None:
        print(f"{text} ...", file=sys.stderr, flush=True)
        yield
    else:
        with console.status(f"{text} ..."):
            yield


@contextlib.contextmanager
def _progress(text: str, quiet: bool) -> Iterator[Callable[[int], Callable[[int], None]]]:
    """Gives begin(total bytes) -> advance(bytes): a bar on a terminal, one plain line elsewhere, on stderr."""
    console = None if quiet else _console()
    if console is None:
        if not quiet:
            print(f"{text} ...", file=sys.stderr, flush=True)
        yield lambda total: lambda count: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(text, total=None)

        def begin(total: int) -> Callable[[int], None]:
            bar.update(task, total=total)
            return lambda count: bar.advance(task, count)

        yield begin


def _console():
    """rich's console on a terminal, if rich is there."""
    if sys.stderr.isatty():
        with contextlib.suppress(ImportError):  # rich is optional
            from rich.console import Console

            return Console(stderr=True)
    return None
