"""Publishes a trained model with its code and card; `hf_xlstm_cli.share` reads the options."""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import EvalResult, HfApi, ModelCard, ModelCardData
from transformers import PreTrainedModel

from hf_xlstm.hub import describe, save_self_contained
from hf_xlstm_cli.errors import UserError, read_text

from .helpers.models import load_model, load_tokenizer
from .helpers.report import markdown_table, results_table


TEMPLATE = Path(__file__).parent / "helpers" / "model_card.md"


def model_card(
    model: PreTrainedModel, metrics: dict, evaluation: list[dict], repo_id: str, license: str, language: str
) -> ModelCard:
    """The card of a model.

    Args:
        metrics: what `train` wrote about its training, its data and its evaluation.
        evaluation: what `evaluate` wrote, empty if it was not used.
        license, language: of the weights and of the text, by their names on the Hub.
    """
    name = repo_id.split("/")[-1]
    heldout = {"task": "held-out text", "metric": "bits_per_byte", "value": metrics["bits_per_byte"]}
    data = ModelCardData(
        model_name=name,
        license=license,
        language=language,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["xlstm", *sorted(set(metrics["layer_types"])), "custom_code"],
        eval_results=[eval_result(result) for result in [heldout, *evaluation]],
    )
    scores = {name: metrics["bits_per_byte"], **metrics["yardsticks"]}
    run = {
        "training text": f"{metrics['train_bytes']:,} bytes, {metrics['train_tokens']:,} tokens",
        "tokens seen": f"{metrics['tokens_seen']:,} in {metrics['steps']:,} steps",
        "time": f"{metrics['training_seconds']:.0f} s on {metrics['device']}",
        **{option.replace("_", " "): str(value) for option, value in metrics["arguments"].items()},
    }
    return ModelCard.from_template(
        data,
        template_path=str(TEMPLATE),
        name=name,
        description=describe(model, repo_id),
        license=license,
        heldout_bytes=f"{metrics['heldout_bytes']:,}",
        heldout=markdown_table(["", "bits per byte"], [[key, f"{value:.3f}"] for key, value in scores.items()]),
        evaluation=results_table(evaluation) if evaluation else "",
        train_bytes=f"{metrics['train_bytes']:,}",
        training=markdown_table(["", ""], list(run.items())),
        data=metrics["corpus"],
    )


def eval_result(result: dict) -> EvalResult:
    """An entry of the Hub's model index."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^\w.-]+", "-", result["task"]),
        dataset_name=result["task"],
        metric_type=result["metric"],
        metric_value=round(result["value"], 4),
        metric_args={name: result[name] for name in ("shots", "limit", "filter") if name in result} or None,
    )


def prepare(run: Path, directory: Path, repo_id: str, license: str, language: str) -> ModelCard:
    """Lays out in `directory` what is to be published: of the run, only what belongs into a repository."""
    model, tokenizer = load_model(run), load_tokenizer(run)
    metrics, measured = read_json(run / "metrics.json"), run / "evaluation.json"
    evaluation = read_json(measured) if measured.exists() else []
    try:
        card = model_card(model, metrics, evaluation, repo_id, license, language)
    except KeyError as error:
        raise UserError(f"metrics.json or evaluation.json in {run} lacks {error}") from error
    save_self_contained(model, directory, tokenizer, card=str(card))
    for file in run.glob("*.json"):
        if file.name in ("metrics.json", "evaluation.json"):
            shutil.copy(file, directory)
    return card


def read_json(path: Path):
    try:
        return json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def run(args: argparse.Namespace) -> None:
    """Sends what `prepare` lays out, or shows it."""
    with tempfile.TemporaryDirectory() as folder:
        card = prepare(args.run, Path(folder), args.repo_id, args.license, args.language)
        files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        rows = [[path.relative_to(folder).as_posix(), f"{path.stat().st_size:,}"] for path in files]
        print(f"{args.repo_id}, branch {args.revision}:\n\n{markdown_table(['file', 'bytes'], rows)}\n")
        if args.dry_run:
            print(card)
            return
        api = HfApi()
        api.create_repo(args.repo_id, private=args.private, exist_ok=True)
        api.create_branch(args.repo_id, branch=args.revision, exist_ok=True)
        commit = api.upload_folder(repo_id=args.repo_id, folder_path=folder, revision=args.revision)
        print(commit.commit_url)
