"""The command line, in this process where that is enough, as a program where signals and pipes matter."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
from PIL import Image

import cobra
from cobra import cli

TINY = ["--preset", "cobra-tiny", "--max-new-tokens", "6", "--device", "cpu"]


@pytest.fixture(autouse=True)
def keep_warning_display(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # main() replaces it


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(path)
    return str(path)


@pytest.fixture(scope="module")
def tiny():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cobra.RandomWeightsWarning)
        return cobra.from_preset("cobra-tiny")


def answer(vlm, image, *turns):
    """The answer to the last human turn of a conversation."""
    builder = vlm.get_prompt_builder()
    for i, text in enumerate(turns):
        builder.add_turn("gpt" if i % 2 else "human", text)
    return vlm.generate(image, builder.get_prompt(), max_new_tokens=6)


def program(*args, **kwargs):
    """A running command line. A shell's background job ignores SIGINT and so would its children: undone here."""
    command = [sys.executable, "-m", "cobra", *args]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "errors": "replace"}
    return subprocess.Popen(command, **pipes, **kwargs, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))


# --- help and errors --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["generate"], ["chat"], ["convert"], ["verify-checkpoint"], ["doctor"]])
def test_help(capsys, command):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and text.startswith("usage: cobra")
    assert "examples:" in text or command in (["chat"], ["doctor"])
    assert "/quit" in text or command != ["chat"]


def test_help_and_import_are_light():
    code = "import sys, cobra.cli; print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["explain"],
        ["generate", "photo.jpg", "hi"],
        ["generate", "photo.jpg", "hi", "--preset", "cobra-9b"],
        ["generate", "photo.jpg", "hi", "--preset", "cobra-tiny", "--model", "x"],
        ["generate", "photo.jpg", "hi", "--preset", "cobra-tiny", "--top-k", "many"],
    ],
)
def test_wrong_command_lines(capsys, args):
    with pytest.raises(SystemExit) as stop:
        cli.main(args)
    assert stop.value.code == 2 and "usage: cobra" in capsys.readouterr().err


def test_errors_are_one_line(capsys, photo, tmp_path):
    text_file = tmp_path / "text.txt"
    text_file.write_text("no picture")
    for args, message in (
        ([str(tmp_path / "nothing.jpg"), "hi", *TINY], "cannot read"),
        ([str(text_file), "hi", *TINY], "no readable picture"),
        ([photo, "hi", *TINY, "--top-p", "0"], "top_p"),
        ([photo, "hi", *TINY, "--max-new-tokens", "0"], "max_new_tokens"),
        ([photo, "hi", *TINY, "--device", "cuda:99"], "--device is 'cuda:99'"),
        ([photo, "hi", "--model", str(tmp_path / "nowhere"), "--quiet"], "is no directory"),
    ):
        assert cli.main(["generate", *args]) == 1
        out, err = capsys.readouterr()
        assert out == ""
        assert [line for line in err.splitlines() if message in line and line.startswith("cobra: error: ")], err
        assert "Traceback" not in err


def test_an_official_directory_is_told_how_to_convert(capsys, photo, tmp_path):
    model = {
        "model_id": "cobra+3b",
        "vision_backbone_id": "dinosiglip-vit-so-384px",
        "llm_backbone_id": "mamba-2.8b-zephyr",
        "arch_specifier": "no-align+fused-gelu-mlp",
        "image_resize_strategy": "resize-naive",
    }
    (tmp_path / "config.json").write_text(json.dumps({"model": model}))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "latest-checkpoint.pt").write_bytes(b"")
    assert cli.main(["generate", photo, "hi", "--model", str(tmp_path), "--quiet"]) == 1
    assert "cobra convert" in capsys.readouterr().err
    with pytest.raises(cobra.CheckpointError, match="cobra convert"):
        cobra.load(tmp_path)


def test_bugs_keep_their_traceback(monkeypatch, photo):
    def broken(args):
        raise ZeroDivisionError

    monkeypatch.setattr(cli, "_generate", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["generate", photo, "hi", *TINY])


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate(capsys, photo, tiny):
    assert cli.main(["generate", photo, "What is it?", *TINY, "--stats"]) == 0
    out, err = capsys.readouterr()
    assert out == answer(tiny, photo, "What is it?") + "\n"
    assert "cobra: note: cobra-tiny: the weights are random" in err
    assert "loading cobra-tiny ..." in err and "looking at the photo: " in err
    assert "first token after " in err and " tokens/s; 6 tokens; the photo is kept in 0.0 MB" in err


def test_quiet_raw_and_sampling(capsys, photo, tiny):
    assert cli.main(["generate", photo, "What", *TINY, "--quiet", "--raw"]) == 0
    assert capsys.readouterr() == (tiny.generate(photo, "What", max_new_tokens=6) + "\n", "")
    sampled = ["--quiet", "--raw", "--sample", "--temperature", "3", "--seed", "4"]
    assert cli.main(["generate", photo, "What", *TINY, *sampled]) == 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", cobra.RandomWeightsWarning)
        other = cobra.from_preset("cobra-tiny", seed=4)
    want = other.generate(photo, "What", max_new_tokens=6, do_sample=True, temperature=3.0, seed=4)
    assert capsys.readouterr().out == want + "\n"


def test_a_saved_model(capsys, photo, tiny, tmp_path):
    from cobra.checkpoint import save

    save(tiny, tmp_path / "model")
    assert cli.main(["generate", photo, "What is it?", "--model", str(tmp_path / "model"), "--max-new-tokens", "6"]) == 0
    out, err = capsys.readouterr()
    assert out == answer(tiny, photo, "What is it?") + "\n" and "random" not in err


# --- chat -------------------------------------------------------------------------------------------------------------


def chat(monkeypatch, lines, *args):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines) + "\n"))
    return cli.main(["chat", *args, *TINY])


def test_chat_remembers(capsys, monkeypatch, photo, tiny):
    assert chat(monkeypatch, ["Who?", "", "And where?", "/reset", "And where?", "/quit", "never read"], photo) == 0
    first = answer(tiny, photo, "Who?")
    second = answer(tiny, photo, "Who?", first, "And where?")
    third = answer(tiny, photo, "And where?")
    out, err = capsys.readouterr()
    assert out == "".join(text + "\n" for text in (first, second, third))
    assert "/help lists the commands" in err


def test_chat_commands(capsys, monkeypatch, photo, tiny, tmp_path):
    lines = ["Who?", "/help", "/dance", f"/image {tmp_path / 'no.jpg'}", f"/image {photo}", "Who?"]
    assert chat(monkeypatch, lines) == 0  # starts without a photo; ends with the input
    out, err = capsys.readouterr()
    assert out == f"{answer(tiny, None, 'Who?')}\n{answer(tiny, photo, 'Who?')}\n"
    assert "/quit             leave" in err and "no command /dance" in err and "cobra: error: load_image: cannot read" in err


def test_chat_that_becomes_too_long_starts_over(capsys, monkeypatch, photo, tiny):
    assert chat(monkeypatch, ["x" * 3000, "Who?"], photo) == 0
    out, err = capsys.readouterr()
    assert out == answer(tiny, photo, "Who?") + "\n"
    assert "expected at most 2048" in err and "starting over" in err


def test_interrupting_an_answer_ends_only_that_answer(capsys, monkeypatch, photo, tiny):
    whole = type(tiny).stream
    turns = []

    def stream(self, image, prompt, **options):
        pieces = whole(self, image, prompt, **options)
        turns.append(prompt)
        if len(turns) == 1:
            yield next(pieces)
            raise KeyboardInterrupt
        yield from pieces

    monkeypatch.setattr(type(tiny), "stream", stream)
    assert chat(monkeypatch, ["Who?", "/reset", "Who?"], photo) == 0
    monkeypatch.undo()
    out, want = capsys.readouterr().out, answer(tiny, photo, "Who?")
    first = out.removesuffix("\n" + want + "\n")
    assert want.startswith(first) and len(first) < len(want) and out == f"{first}\n{want}\n"


def test_answers_cannot_drive_the_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    text = "a\x1b[2J\x07b\tc\n\x9b1md\x7f é😀"
    for stream, want in ((Terminal(), "a[2Jb\tc\n1md é😀"), (io.StringIO(), text)):
        monkeypatch.setattr(sys, "stdout", stream)
        cli._say(text)
        monkeypatch.undo()
        assert stream.getvalue() == want


# --- bench and doctor -------------------------------------------------------------------------------------------------


def test_bench_passes_its_arguments_on(monkeypatch):
    from benchmarks.suite import run

    seen = []
    monkeypatch.setattr(run, "main", lambda argv: seen.append(argv) or 7)
    assert cli.main(["bench", "--quick", "--out", "x"]) == 7 and cli.main(["bench"]) == 7
    assert cli.main(["bench", "--help"]) == 7
    assert seen == [["--quick", "--out", "x"], [], ["--help"]]


def test_bench_outside_the_source_tree(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    monkeypatch.delitem(sys.modules, "benchmarks.suite", raising=False)
    assert cli.main(["bench"]) == 1
    assert capsys.readouterr().err == "cobra: error: the benchmarks are in the source tree only; run this there\n"


def test_doctor(capsys):
    from cobra_kernels import doctor

    assert cli.main(["doctor"]) in (0, 1)  # 1: no compiled kernels here, and it says so
    out = capsys.readouterr().out
    assert out.startswith(f"cobra {cobra.__version__}\ntransformers ") and doctor.report().splitlines()[0] in out


# --- as a program -----------------------------------------------------------------------------------------------------


def test_ctrl_c_is_clean(photo):
    process = program("generate", photo, "hi", "--preset", "cobra-tiny", "--max-new-tokens", "100000000", "--device", "cpu")
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        assert process.stdout.read(1)  # an answer is coming
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    finally:
        timer.cancel()
    assert process.returncode == 130, err
    assert err.endswith("\ncobra: interrupted\n") and "Traceback" not in err


def test_a_closed_pipe_is_quiet(photo):
    process = program("generate", photo, "hi", "--preset", "cobra-tiny", "--max-new-tokens", "100000000", "--device", "cpu")
    timer = threading.Timer(120, process.kill)
    timer.start()
    try:
        assert process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        process.wait()
    finally:
        timer.cancel()
    assert process.returncode == 1 and "Traceback" not in err and "Exception ignored" not in err


def test_interrupt_anywhere(monkeypatch, capsys, photo):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_model", interrupted)
    assert cli.main(["generate", photo, "hi", *TINY]) == 130
    assert capsys.readouterr().err == "\ncobra: interrupted\n"


def test_progress_on_a_terminal_is_a_spinner(monkeypatch):
    """rich writes control sequences to a terminal; the line that stays says the time."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(os.environ, "TERM", "xterm")
    with cli._step("working", quiet=False):
        pass
    text = terminal.getvalue()
    assert "\x1b[" in text and "working ..." in text and re.search(r"working: 0\.\d s\n$", text)
