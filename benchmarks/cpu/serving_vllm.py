"""32 requests at once on a CPU through vLLM's engine, against `generate_batch`, in one process.

requests     prompts and replies of one length, from the first prompt to the last token of all requests

Runs where vLLM is installed (`make test-vllm` makes such an environment). vLLM keeps no prefixes here: the prompts are
the same in every round.
"""

import argparse
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path


# one process for both, in which vLLM leaves the number of threads as it is
os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
}

import torch
import vllm
from transformers import ContinuousBatchingConfig, GenerationConfig


sys.path.insert(0, str(Path(__file__).parents[2]))  # `benchmarks` is a package of the checkout

from benchmarks.cpu.harness import Measure, build, main, random_tokens, summarize, take_turns
from benchmarks.peers import HF_XLSTM


FULL, QUICK = "512x12", "64x2"
VLLM = "vllm"


def requests(size: str, number: int, length: int, new: int, args: argparse.Namespace) -> dict:
    model = build(HF_XLSTM, size, torch.float32)
    prompts = random_tokens(number, length).tolist()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        engine = vllm.LLM(
            folder,
            dtype="float32",
            skip_tokenizer_init=True,
            max_num_seqs=number,
            max_model_len=length + new,
            enable_prefix_caching=False,
            kv_cache_memory_bytes=2**30,
            distributed_executor_backend="uni",
        )
    sampling = vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
    config = GenerationConfig(do_sample=False, max_new_tokens=new)
    replies: dict[str, list[list[int]]] = {}

    def through_vllm() -> float:
        start = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": ids} for ids in prompts], sampling, use_tqdm=False)
        seconds = time.perf_counter() - start
        replies[VLLM] = [list(output.outputs[0].token_ids) for output in outputs]
        return seconds

    def batched() -> float:
        options = ContinuousBatchingConfig(max_requests_per_batch=number)
        start = time.perf_counter()
        outputs = model.generate_batch(prompts, config, continuous_batching_config=options, progress_bar=False)
        seconds = time.perf_counter() - start
        replies[HF_XLSTM] = [output.generated_tokens for output in outputs.values()]
        return seconds

    turns = {HF_XLSTM: batched, VLLM: through_vllm}
    for turn in turns.values():
        turn()
    times = take_turns(turns, args.rounds, 10 * args.seconds)
    same = [a == b for a, b in zip(replies[HF_XLSTM], replies[VLLM], strict=True)]
    assert all(len(reply) == new for reply in replies[VLLM] + replies[HF_XLSTM])
    return {
        "requests": number,
        "prompt_tokens": length,
        "new_tokens": new,
        "vllm": vllm.__version__,
        "equal_replies": sum(same),
        "peers": summarize(times, number * new, (HF_XLSTM,)),
    }


def rows(quick: bool) -> dict[str, Measure]:
    sizes = (QUICK, 4, 16, 8) if quick else (FULL, 32, 128, 64)
    return {"requests": partial(requests, *sizes)}


if __name__ == "__main__":
    main("serving-vllm", __doc__, rows)
