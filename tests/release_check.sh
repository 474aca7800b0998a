#!/usr/bin/env bash
# release_check.sh TORCH: builds both distributions into dist/ and tries them in a clean environment.
# TORCH are arguments of `pip install`. The wheel is installed; the tests are those of the source distribution.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD venv=.venvs/release python=${PYTHON:-python3}
rm -rf dist "$venv"
"$python" -m venv "$venv"
venv=$root/$venv
"$venv/bin/pip" install --quiet build twine
"$venv/bin/python" -m build --outdir dist .  # the wheel is built from the source distribution
"$venv/bin/twine" check --strict dist/*

rm -rf "$venv"
"$python" -m venv "$venv"
# shellcheck disable=SC2086
"$venv/bin/pip" install --quiet $1
"$venv/bin/pip" install --quiet --constraint constraints.txt "$(echo dist/*.whl)[train]" pytest peft
"$venv/bin/pip" install --quiet --no-deps ./models/chat  # README's first block uses it
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
tar -xzf dist/*.tar.gz -C "$folder" --strip-components 1
cd "$folder"
mv src unused  # the package is the installed one
"$venv/bin/hf-xlstm" --version
for verb in train generate evaluate convert share serve export env; do "$venv/bin/hf-xlstm" "$verb" --help > help.txt; done
"$venv/bin/hf-xlstm" env --check
"$venv/bin/pytest" -q tests/test_cli.py "tests/test_docs.py::test_blocks_run[README.md]" -k "not said_twice"
"$venv/bin/pytest" -q --collect-only tests > collected.txt || { cat collected.txt; exit 1; }
