#!/usr/bin/env bash
# matrix.sh [--models-only] TRANSFORMERS/TORCH ...
# The quick tests on each of these versions, in an environment of its own under .venvs/. TRANSFORMERS may be "newest".
# A torch for which there is no package here is reported and passed over; any failing test is the exit status.
# --models-only runs what depends on Transformers most: generation, caches, masks, packing, saving and loading.
set -uo pipefail
cd "$(dirname "$0")/.."
tests=(tests)
if [ "${1:-}" = --models-only ]; then
    shift
    tests=()
    for name in integration generation speculative cache packing model saving intree versions; do
        tests+=("tests/test_$name.py")
    done
fi
status=0
for pair in "$@"; do
    transformers=${pair%/*} torch=${pair#*/}
    venv=.venvs/$transformers-$torch
    pins=("transformers==$transformers")
    case $transformers in
        newest) pins=() ;;
        5.15.*) pins+=("huggingface_hub<2" "tokenizers<=0.23.0") ;;
    esac
    echo "== transformers $transformers, torch $torch"
    if [ ! -f "$venv/.installed" ] || [ pyproject.toml -nt "$venv/.installed" ] || [ "$transformers" = newest ]; then
        "${PYTHON:-python3}" -m venv "$venv"
        if ! "$venv/bin/pip" install --quiet "torch==$torch"; then
            echo "torch $torch cannot be installed here: not tested"
            continue
        fi
        "$venv/bin/pip" install --quiet --editable '.[train,dev]' ${pins[@]+"${pins[@]}"} || { status=1; continue; }
        if [ "$transformers" = newest ]; then  # beyond the bound in pyproject.toml, too
            "$venv/bin/pip" install --quiet --upgrade transformers accelerate safetensors peft || { status=1; continue; }
        fi
        touch "$venv/.installed"
    fi
    "$venv/bin/python" -m hf_xlstm.env --check && "$venv/bin/pytest" -q -n auto -m "not slow" "${tests[@]}" || status=1
done
exit $status
