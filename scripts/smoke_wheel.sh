#!/usr/bin/env bash
# Builds sdist and wheel, installs the wheel into an environment that cannot see this checkout, and there, from another
# folder, patches a tiny Llama, saves it, reloads it and inspects it with the command line. PYTHON names an environment
# with the dependencies and `build`.
set -euo pipefail
cd "$(dirname "$0")/.."

python=$(command -v "${PYTHON:-.venv/bin/python}") || {
  echo "PYTHON must be an interpreter, got '${PYTHON:-.venv/bin/python}'; run 'make env' first" >&2
  exit 1
}
[[ $python = /* ]] || python=$PWD/$python
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The wheel is built from the unpacked sdist, so files missing from the sdist show here too.
"$python" -m build --no-isolation --outdir "$work/dist" . >"$work/build.log" 2>&1 || {
  cat "$work/build.log" >&2
  exit 1
}

"$python" -m venv --without-pip "$work/venv"
"$python" -m pip --python "$work/venv/bin/python" install --quiet --no-deps --no-index "$work"/dist/*.whl
# Borrow the dependencies. A .pth adds the folder but not the .pth files within it, where an editable install would be.
site=$("$work/venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
"$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))' >"$site/dependencies.pth"

# A sub-package that pyproject.toml does not name would be missing without a word.
find hf_asentmax patches model_cards/__init__.py model_cards/template.md -name '*.py' -o -name template.md -o -name py.typed |
  sed -E 's#^(patches|model_cards)/#hf_asentmax/&#' >"$work/sources"

mkdir "$work/elsewhere"
cd "$work/elsewhere"
HF_HUB_OFFLINE=1 HF_HOME=$work/home "$work/venv/bin/python" - "$work/venv" <<'PYTHON'
import sys
from importlib.metadata import files, version
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

import hf_asentmax
import hf_asentmax.patches.llama as family

environment = Path(sys.argv[1]).resolve()
for module in (hf_asentmax, family):
    if environment not in Path(module.__file__).resolve().parents:
        sys.exit(f"{module.__name__} must come from the wheel, got {module.__file__}")
sources = set((environment.parent / "sources").read_text().split())
missing = sources - {path.as_posix() for path in files("hf_asentmax")}
if missing or "hf_asentmax/py.typed" not in sources:
    sys.exit(f"the wheel must hold every source file, misses {sorted(missing)}; see [tool.setuptools], pyproject.toml")

disable_progress_bar()
torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, pad_token_id=0, eos_token_id=1, bos_token_id=2,
)
model = hf_asentmax.patch_model(LlamaForCausalLM(config).eval(), alpha=1.5)
tokens = torch.randint(3, 64, (2, 17))
with torch.no_grad():
    expected = model(tokens).logits
    model.save_pretrained("checkpoint")
    reloaded = AutoModelForCausalLM.from_pretrained("checkpoint").eval()
    actual = reloaded(tokens).logits
if not torch.equal(actual, expected):
    sys.exit(f"reloaded logits must be identical, differ by {(actual - expected).abs().max().item()}")
print(f"wheel {version('hf_asentmax')}: patched, saved and reloaded as {type(reloaded).__name__}, identical logits")
PYTHON
HF_HUB_OFFLINE=1 HF_HOME=$work/home "$work/venv/bin/hf-asentmax" inspect checkpoint >inspected
grep -q 'yes, 1 file, whole' inspected || {
  echo "hf-asentmax inspect must find the checkpoint whole, did not" >&2
  exit 1
}
