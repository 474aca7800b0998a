"""`hf-xlstm convert`, in a checkout."""

import sys

from hf_xlstm_cli import run_verb


if __name__ == "__main__":
    run_verb("convert", sys.argv[1:], "convert_checkpoint.py")
