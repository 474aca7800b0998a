"""`hf-xlstm generate`, in a checkout."""

import sys

from hf_xlstm_cli import run_verb


if __name__ == "__main__":
    run_verb("generate", sys.argv[1:], "generate.py")
