"""What `import cobra` offers: loading, presets, descriptions, and the flow of a user who comes from Cobra's own code."""

import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

import cobra
from cobra.checkpoint import save
from cobra.config import PRESETS


@pytest.fixture(scope="module")
def tiny():
    with pytest.warns(cobra.RandomWeightsWarning, match="cobra-tiny: the weights are random"):
        return cobra.from_preset("cobra-tiny")


def test_names(capsys):
    assert cobra.available_models() == list(PRESETS) and "cobra-3b" in cobra.available_models()
    assert [name for name, _ in cobra.available_model_names()] == cobra.available_models()
    description = cobra.get_model_description("cobra+3b")  # as upstream spells it
    assert description["language_model_parameters"] == 2_768_345_600 and description["image_tokens"] == 729
    assert '"id": "cobra-3b"' in capsys.readouterr().out
    with pytest.raises(cobra.CheckpointError, match="cobra-9b"):
        cobra.get_model_description("cobra-9b")
    with pytest.raises(cobra.CheckpointError, match="expected one of cobra-3b"):
        cobra.from_preset("cobra-9b")


def test_version_is_that_of_the_distribution():
    pyproject = Path(cobra.__file__).parent / "pyproject.toml"  # a wheel has metadata instead
    if pyproject.exists():
        assert re.search(r'^version = "(.*)"$', pyproject.read_text(), re.MULTILINE)[1] == cobra.__version__
    else:
        assert metadata.version("cobra-mamba-vlm") == cobra.__version__


@pytest.mark.filterwarnings("ignore::cobra.RandomWeightsWarning")
def test_random_weights_follow_the_seed_and_nothing_else(tiny):
    torch.manual_seed(123)
    before = torch.get_rng_state()
    same, other = cobra.from_preset("cobra-tiny"), cobra.from_preset("cobra-tiny", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(tiny.parameters(), same.parameters()))
    assert not torch.equal(tiny.llm.lm_head.weight, other.llm.lm_head.weight)
    assert not tiny.training and not any(p.requires_grad for p in tiny.parameters())
    half = cobra.from_preset("cobra-tiny", dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.llm.backbone.layers[0].mixer.A_log.dtype == torch.float32
    assert {p.dtype for p in half.vision.parameters()} == {torch.bfloat16}
    meta = cobra.from_preset("cobra-tiny", device="meta")
    assert meta.device.type == "meta"


def test_save_and_load_give_the_same_answers(tiny, photos, tmp_path):
    save(tiny, tmp_path)
    loaded = cobra.load(tmp_path)
    options = {"max_new_tokens": 8}
    assert loaded.generate(photos[0], "What?", **options) == tiny.generate(photos[0], "What?", **options)
    assert loaded.string2idx == tiny.string2idx and len(loaded.string2idx) == 30
    half = cobra.load(tmp_path, dtype=torch.bfloat16)
    assert half.dtype == torch.bfloat16 and half.generate(photos[0], "What?", **options) is not None


def test_the_flow_of_upstreams_readme(tiny, photos):
    from PIL import Image

    vlm = tiny
    vlm.to("cpu", dtype=torch.float32)
    builder = vlm.get_prompt_builder()
    builder.add_turn(role="human", message="Describe the image")
    prompt = builder.get_prompt()
    image = Image.fromarray(photos[0]).convert("RGB")
    text = vlm.generate(image, prompt, use_cache=True, do_sample=True, temperature=0.4, max_new_tokens=8, seed=0)
    assert isinstance(text, str)
    answers, probabilities = vlm.generate_batch(
        vlm.preprocess([image]), [prompt], return_string_probabilities=["Yes", "No"], max_new_tokens=2
    )
    assert len(answers) == 1 and abs(sum(probabilities[0]) - 1) < 1e-6


def test_importing_reads_no_network_and_writes_nothing():
    """An audit hook sees every socket, every file opened for writing and every process started."""
    code = """
import sys
bad = []
def hook(event, args):
    if event.startswith(("socket.connect", "socket.bind", "subprocess", "os.system", "urllib")):
        bad.append((event, args))
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+") and "__pycache__" not in str(args[0]):
        bad.append((event, args))
sys.addaudithook(hook)
import cobra, cobra.model, cobra.cli, cobra.checkpoint
print(bad)
"""
    run = subprocess.run([sys.executable, "-B", "-c", code], capture_output=True, text=True)
    assert run.stdout.strip() == "[]", run.stdout + run.stderr
