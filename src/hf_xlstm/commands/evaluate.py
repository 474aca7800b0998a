"""Evaluates a model on texts and tasks; `hf_xlstm_cli.evaluate` reads the options."""

import argparse
import json
import math
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_xlstm.files import write_text
from hf_xlstm_cli.errors import UserError, need, read_text

from .helpers.bits_per_byte import bits_per_byte
from .helpers.corpus import num_bytes
from .helpers.models import check_directory, load_model, load_tokenizer
from .helpers.report import results_table


def evaluate_texts(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, files: list[Path], batch_size: int
) -> list[dict]:
    """One result for each file, which is one document."""
    results = []
    for file in files:
        text = read_text(file)
        bits = bits_per_byte(model, tokenizer, [text], batch_size=batch_size)
        results.append({"task": file.name, "metric": "bits_per_byte", "value": bits, "bytes": num_bytes([text])})
    return results


def evaluate_tasks(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, args: argparse.Namespace) -> list[dict]:
    """One result for each task and metric, by the harness's `hf` backend."""
    need("lm_eval", "eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    backend = HFLM(model, tokenizer=tokenizer, batch_size=args.batch_size, max_length=args.max_length)
    measured = simple_evaluate(
        backend,
        tasks=args.tasks,
        num_fewshot=args.num_fewshot,
        limit=args.limit,
        task_manager=TaskManager(include_path=args.include_path),
        log_samples=False,
    )
    results = []
    for task, values in measured["results"].items():
        for key, value in values.items():
            metric, _, answer_filter = key.partition(",")
            if not answer_filter or metric.endswith("_stderr"):
                continue
            result = {"task": task, "metric": metric, "value": value, "shots": measured["n-shot"].get(task, 0)}
            stderr = values.get(f"{metric}_stderr,{answer_filter}")
            if isinstance(stderr, float):  # else "N/A"
                result["stderr"] = stderr
            if answer_filter != "none":
                result["filter"] = answer_filter
            if args.limit is not None:
                result["limit"] = args.limit
            results.append(result)
    return results


def run(args: argparse.Namespace) -> None:
    """Measures, prints the table and writes the results."""
    output = args.output or Path(args.model, "evaluation.json")
    if output.is_dir() or not output.parent.is_dir():
        raise UserError(f"--output {output} is not a file in a directory that exists")
    for file in args.texts:
        read_text(file)
    if args.tasks:
        need("lm_eval", "eval")
    check_directory(args.model)
    tokenizer, model = load_tokenizer(args.model), load_model(args.model, device_map="auto").eval()
    results = evaluate_texts(model, tokenizer, args.texts, args.batch_size)
    if args.tasks:
        results += evaluate_tasks(model, tokenizer, args)

    print(results_table(results))
    lost = [f"{result['task']} {result['metric']}" for result in results if not math.isfinite(result["value"])]
    if lost:
        raise UserError(f"not finite, so that nothing is written: {', '.join(lost)}")
    write_text(output, json.dumps(results, indent=1))
