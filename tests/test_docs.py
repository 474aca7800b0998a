"""The Python and bash blocks of README.md and docs/ run as printed, page by page and in order.

A block whose first line is a comment with a file name is written to that file; console sessions are not run.
"""

import os
import re
import subprocess
import sys
from pathlib import Path
from pydoc import locate

import pytest
import torch
from common import MIXED, tiny_model
from transformers import set_seed

import hf_xlstm
import hf_xlstm.conversion
import hf_xlstm.state_store
from hf_xlstm.commands.helpers.tokens import train_tokenizer


ROOT = Path(__file__).parents[1]
RUN = ("generation", "finetuning", "packing", "parallelism", "checkpoints", "sharing", "serving", "xlstm-7b", "ops")
PAGES = ["README.md", *(f"docs/{name}.md" for name in RUN)]
# without such blocks, or with those of training, which test_train.py runs at small size
READ = [
    "docs/export.md",
    "CONTRIBUTING.md",
    "RELEASE.md",
    "SECURITY.md",
    "benchmarks/README.md",
    *(f"docs/{name}.md" for name in ("index", "api", "conformance", "kernels", "training")),
]
TEXT = "My fellow Americans, tonight the state of our Union is strong. Mr. Speaker, Mr. Vice President, members:"


def blocks(page: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(python|bash)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """A working directory with small models: where `make quickstart` leaves its own, and one with the name of xLSTM-7b
    on the Hub, which a directory of that name comes before."""
    tokenizer = train_tokenizer([TEXT], vocab_size=300)
    tokens = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    tiny_model(vocab_size=len(tokenizer), layer_types=MIXED, **tokens).save_pretrained(tmp_path / "runs/quickstart")
    tokenizer.save_pretrained(tmp_path / "runs/quickstart")
    tiny_model(vocab_size=len(tokenizer), **tokens).save_pretrained(tmp_path / "NX-AI/xLSTM-7b")
    tokenizer.save_pretrained(tmp_path / "NX-AI/xLSTM-7b")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    set_seed(0)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, quickstart):
    if page in ("docs/finetuning.md", "docs/xlstm-7b.md"):
        pytest.importorskip("peft", reason="the page shows LoRA")
    namespace = {}
    for language, code in blocks(page):
        name = re.match(r"# (\S+\.py)\n", code)
        if name:
            Path(name[1]).write_text(code, encoding="utf-8")
        elif language == "python":
            exec(compile(code, page, "exec"), namespace)
        else:
            subprocess.run(["bash", "-ec", code], check=True)
    torch.set_grad_enabled(True)


@pytest.mark.slow
def test_serving_without_vllm(quickstart):
    """The blocks of its section; those before it need vLLM."""
    page = (ROOT / "docs/serving.md").read_text(encoding="utf-8")
    namespace = {}
    for code in re.findall(r"^```python\n(.*?)^```$", page[page.index("## Without vLLM") :], re.M | re.S):
        exec(compile(code, "docs/serving.md", "exec"), namespace)
    assert len(namespace["outputs"]) == 2 and not any(x.error for x in namespace["outputs"].values())


@pytest.mark.parametrize("page", [*PAGES, *READ])
def test_links_and_blocks(page):
    """Blocks are valid Python; links within the repository point to something."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for language, code in blocks(page):
        if language == "python":
            compile(code, page, "exec")
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    for path in re.findall(r"`((?:scripts|tests|benchmarks|docs)/[\w/.]+)`", text):
        assert (ROOT / path).exists(), path


def test_api_page_has_all_names():
    """What mkdocstrings is asked for is there, and nothing public is left out."""
    asked = re.findall(r"^::: hf_xlstm\.([\w.]+)$", (ROOT / "docs/api.md").read_text(encoding="utf-8"), re.M)
    assert set(hf_xlstm.__all__) <= set(asked)
    for name in asked:
        assert locate(f"hf_xlstm.{name}") is not None


def test_every_page_is_in_the_site_and_in_a_test():
    pages = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert all(f"- {page}\n" in site for page in pages)
    assert {f"docs/{page}" for page in pages} - {"docs/claims/README.md"} <= {*PAGES, *READ}
