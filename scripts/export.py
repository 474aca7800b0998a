"""`hf-xlstm export`, in a checkout."""

import sys

from hf_xlstm_cli import run_verb


if __name__ == "__main__":
    run_verb("export", sys.argv[1:], "export.py")
