"""`hf-xlstm share`, in a checkout."""

import sys

from hf_xlstm_cli import run_verb


if __name__ == "__main__":
    run_verb("share", sys.argv[1:], "push_to_hub.py")
