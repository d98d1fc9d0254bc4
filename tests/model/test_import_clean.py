"""Importing touches nothing, and loading never unpickles: watched by an audit hook, in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from cobra import checkpoint
from cobra.config import preset
from cobra.model import CobraVLM
from cobra.tokenizer import byte_tokenizer

ROOT = Path(__file__).resolve().parent.parent.parent

WATCH = """
import os, sys
seen = []
NEVER = ("socket.", "subprocess.", "os.system", "os.exec", "os.fork", "os.posix_spawn", "os.mkdir", "os.rename", "os.remove",
         "os.link", "os.symlink", "os.truncate", "os.chmod", "shutil.", "tempfile.", "urllib.", "http.", "ftplib.", "pickle.find_class")

def watch(event, args):
    if event == "open":
        path, mode, flags = args
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC)
        if writes and not str(path).startswith("/dev/"):
            seen.append(f"open {path!r} to write")
    elif event.startswith(NEVER):
        seen.append(f"{event} {args!r:.200}")

for name in PRELOAD:  # not ours: what a library does on import is its own matter
    __import__(name)
sys.addaudithook(watch)
"""


def watched(code: str, *preload: str) -> list[str]:
    """What the code did that it must not, in a fresh process that writes no bytecode."""
    program = f"PRELOAD = {preload!r}\n{WATCH}\n{code}\nimport json; print(json.dumps(seen))"
    done = subprocess.run(
        [sys.executable, "-B", "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_watch_sees(tmp_path):
    actions = f"""
import pickle, socket, subprocess
from pathlib import Path
socket.socket().close()
subprocess.run(["true"])
pickle.loads(pickle.dumps(Path()))
open({str(tmp_path / "x")!r}, "w").close()
open({str(tmp_path / "x")!r}).close()
os.remove({str(tmp_path / "x")!r})
"""
    kinds = [line.split()[0] for line in watched(actions)]
    assert {"socket.__new__", "subprocess.Popen", "pickle.find_class", "open", "os.remove"} <= set(kinds)
    assert kinds.count("open") == 1, "reading is no writing"


def test_cobra_kernels():
    assert watched("import cobra_kernels; cobra_kernels.backends()", "torch") == []


def test_import_of_cobra_is_light():
    """`import cobra` alone loads neither torch nor a decoder: the first use does."""
    code = "import sys, cobra; print([name for name in ('torch', 'PIL', 'tokenizers', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_cobra_imports_and_loads(tmp_path):
    """Every module, then a checkpoint and a picture: no write and no socket on import, no pickle at any time."""
    checkpoint.save(CobraVLM(preset("cobra-tiny"), byte_tokenizer()), tmp_path)
    modules = "config, errors, image, prompt, tokenizer, checkpoint, splice, projector, vision, model, generate, cli, "
    modules += "keymaps, unpickle, source, convert, verify"
    code = f"""
import cobra
from cobra import {modules}
seen.append("imported")
vlm = cobra.load({str(tmp_path)!r})
vlm.preprocess(np.zeros((20, 30, 3), np.uint8))
vlm.tokenizer.encode(vlm.get_prompt_builder().get_potential_prompt("What?"))
"""
    seen = watched("import numpy as np\n" + code, "torch", "numpy", "PIL.Image", "tokenizers")
    assert seen[0] == "imported"
    # transformers, which is imported for the towers, looks for a temporary folder
    assert [event for event in seen if event.startswith(("pickle.", "socket.", "subprocess."))] == []


def test_no_source_file_unpickles():
    words = (
        "import pickle",
        "torch.load",
        "np.load(",
        "numpy.load",
        "joblib",
        "marshal",
        "eval(",
        "exec(",
        "trust_remote_code",
    )
    for path in sorted((ROOT / "cobra").glob("*.py")):
        if path.name == "unpickle.py":  # the one place, and a process of its own: tests/model/test_convert.py
            continue
        text = path.read_text().replace(".eval(", "")
        assert not [word for word in words if word in text], path.name
