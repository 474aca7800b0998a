"""Models and tokenizers that the user names, with errors that name them in one line."""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_xlstm import xLSTMConfig
from hf_xlstm_cli.errors import UserError


TOKENIZER_FILES = ("tokenizer*", "vocab*", "*.model")


def load_model(name: str | Path, **kwargs) -> PreTrainedModel:
    check_directory(name)
    return _named(name, "model", lambda: AutoModelForCausalLM.from_pretrained(name, **kwargs))


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    check_name(name)
    if not has_tokenizer(name):
        raise UserError(f"{name} has no tokenizer")
    return _named(name, "tokenizer", lambda: AutoTokenizer.from_pretrained(name))


def has_tokenizer(name: str | Path) -> bool:
    """Whether a model comes with a tokenizer; one on the Hub is taken to."""
    path = Path(name)
    return not path.is_dir() or any(x for pattern in TOKENIZER_FILES for x in path.glob(pattern))


def read_config(path: Path) -> xLSTMConfig:
    return _named(path, "configuration", lambda: xLSTMConfig.from_json_file(path))


def check_name(name: str | Path) -> None:
    """Raises UserError for what is neither a directory nor the form of a name on the Hub."""
    path = Path(name)
    if path.is_file():
        raise UserError(f"{path} is a file, not a directory")
    if not path.exists() and (path.is_absolute() or len(path.parts) > 2 or path.parts[:1] in ((), ("..",))):
        raise UserError(f"{path} does not exist")


def check_directory(name: str | Path) -> None:
    """Raises UserError as `check_name`, and for a directory that has no model."""
    check_name(name)
    path = Path(name)
    if not path.exists() and len(path.parts) == 1:  # on the Hub an owner comes first
        raise UserError(f"{path} does not exist")
    if path.is_dir() and not any((path / file).exists() for file in ("config.json", "config.yaml")):
        raise UserError(f"{path} has no model: neither config.json nor config.yaml")


def _named(name: str | Path, what: str, load):
    try:
        return load()
    except Exception as error:  # of whatever kind: damaged files raise a dozen different ones
        first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        reason = " ".join([first, *more[:1]]) if first.endswith(":") else first
        raise UserError(f"{name}: cannot load the {what}: {reason}") from error
