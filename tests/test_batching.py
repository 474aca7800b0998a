"""hf_xlstm.batching: whatever joins, leaves, fails or is cancelled, every text is that of `generate` on its own."""

import asyncio
import contextlib
import gc
import json
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from common import MIXED, STACKS, VOCAB_SIZE, assert_same_states, tiny_model
from test_serve import SERVE, model_directory, post  # noqa: F401  a fixture
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedTokenizerFast,
)

from hf_xlstm import xLSTMCache
from hf_xlstm.batch_engine import BatchEngine, Rows, prepare
from hf_xlstm.state_store import StateStore


FAILED = 4  # RequestStatus.FAILED
GREEDY = GenerationConfig(do_sample=False, max_new_tokens=12)
POISON = VOCAB_SIZE - 1  # `poisoned` models fail where they read this token


@pytest.fixture(scope="module")
def model():
    return tiny_model(**STACKS["conv"])


@pytest.fixture
def manager(model):
    """Started, with a thread of its own; nothing may be left in it."""
    manager = model.init_continuous_batching(GREEDY)
    manager.start()
    yield manager
    if manager.is_running():
        manager.stop(timeout=60)
    assert not manager.is_running() and len(manager.engine) == manager.engine.rows.count == 0
    assert not manager._handlers and not manager._outputs


def random_prompts(number: int, longest: int = 40, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(1, POISON) for _ in range(rng.randint(1, longest))] for _ in range(number)]


def alone(model, prompt: list[int], config=GREEDY, **parameters) -> list[int]:
    """What `generate` adds to a prompt."""
    return model.generate(torch.tensor([prompt]), generation_config=config, **parameters)[0, len(prompt) :].tolist()


def poisoned(model):
    def fail(module, args):
        if (args[0] == POISON).any():
            raise RuntimeError("poison")

    with torch.no_grad():
        model.lm_head.weight[POISON] = 0  # it does not write the token itself: no text of interest has such logits
    model.get_input_embeddings().register_forward_pre_hook(fail)
    return model


def until_done(engine: BatchEngine, passes: int = 10_000) -> None:
    for _ in range(passes):
        if not len(engine):
            return
        engine.run()
    raise AssertionError(f"{len(engine)} requests are stuck.")


# ---- the engine, pass by pass


@pytest.mark.parametrize("stack, with_store", [("mixed", False), *((stack, True) for stack in STACKS)])
def test_texts_are_those_of_generate_under_any_interleaving(stack, with_store):
    model = poisoned(tiny_model(**STACKS[stack]))
    prompts = random_prompts(10)
    prompts += [[*prompt, 7, 8, 9] for prompt in prompts[:3]]  # one begins like another
    replies = [alone(model, prompt) for prompt in prompts]
    for seed in range(2):
        rng, ended = random.Random(seed), {}
        store = StateStore(every=8) if with_store else None
        engine = BatchEngine(
            model,
            lambda request: ended.__setitem__(request.id, request) if request.status >= 3 else None,  # noqa: B023
            store,
            max_rows=rng.choice([1, 3, 8]),
            prefill_tokens=rng.choice([1, 7, 64]),
        )
        expected, cancelled, number = {}, set(), 0
        while number < 20 or len(engine):
            for _ in range(rng.choice([0, 0, 1, 4]) if number < 20 else 0):
                id, number = str(number), number + 1
                index, limit, bad = rng.randrange(len(prompts)), rng.randint(1, 12), rng.random() < 0.15
                eos = rng.choice([None, rng.choice(replies[index])])
                reply = replies[index][:limit]
                if eos in reply:
                    reply = reply[: reply.index(eos) + 1]
                prompt = list(prompts[index])
                if bad:
                    prompt.insert(rng.randint(0, len(prompt)), POISON)
                expected[id] = None if bad else reply
                engine.add(prepare(model, id, prompt, GREEDY, max_new_tokens=limit, eos_token_id=eos))
            if expected and rng.random() < 0.1:
                id = rng.choice(list(expected))
                engine.cancel(id)
                cancelled.add(id)
            engine.run()
        assert ended.keys() == expected.keys()
        for id, request in ended.items():
            if request.status == FAILED:
                assert "poison" in request.error if expected[id] is None else id in cancelled
            else:
                assert request.new == expected[id], id
        assert sum(request.status != FAILED for request in ended.values()) > 8  # else this says little
        assert engine.rows.count == 0 and not engine.reading
        if with_store:
            store_is_right(model, store, ended.values())


def store_is_right(model, store: StateStore, requests) -> None:
    """What it finds for a text is the state after reading that text."""
    checked = 0
    for request in list(requests)[:6]:
        cache = store.find(model, [*request.tokens, 1])
        if cache.get_seq_length():
            expected = xLSTMCache(model.config)
            with torch.no_grad():
                model(torch.tensor([request.tokens[: cache.get_seq_length()]]), cache=expected)
            assert_same_states(cache, expected, tolerance=1e-4)
            checked += 1
    assert checked


def test_a_failing_step_fails_the_requests_in_it_only(model, monkeypatch):
    ended = {}
    engine = BatchEngine(model, lambda request: ended.update({request.id: request}), max_rows=2)
    prompts = random_prompts(4)
    for index, prompt in enumerate(prompts):
        engine.add(prepare(model, str(index), prompt, GREEDY))
    while len(engine.writing) < 2:
        engine.run()
    block = model.backbone.blocks[1]
    hook = block.register_forward_pre_hook(lambda *args: 1 / 0)  # in the middle: block 0 has taken the step
    engine._write()
    hook.remove()
    until_done(engine)
    assert [ended[str(index)].status == FAILED for index in range(4)] == [True, True, False, False]
    assert "division" in ended["0"].error
    assert [ended[str(index)].new for index in (2, 3)] == [alone(model, prompt) for prompt in prompts[2:]]


def test_a_row_that_finds_no_room_fails_alone(model, monkeypatch):
    ended, append = {}, Rows.append

    def full(rows, cache):
        if rows.count == 1 and not ended:
            raise MemoryError("no room")
        append(rows, cache)

    monkeypatch.setattr(Rows, "append", full)
    engine = BatchEngine(model, lambda request: ended.update({request.id: request}))
    prompts = random_prompts(3)
    for index, prompt in enumerate(prompts):
        engine.add(prepare(model, str(index), prompt, GREEDY))
    until_done(engine)
    failed = [request for request in ended.values() if request.status == FAILED]
    assert len(ended) == 3 and ["no room" in request.error for request in failed] == [True]
    rest = [request for request in ended.values() if request.status != FAILED]
    assert [request.new for request in rest] == [alone(model, request.prompt) for request in rest]


def test_a_state_that_cannot_be_kept_costs_no_request(model, monkeypatch, caplog):
    store, ended = StateStore(every=4), []
    monkeypatch.setattr(store, "add", lambda *args: 1 / 0)
    engine = BatchEngine(model, ended.append, store)
    prompt = random_prompts(1)[0]
    engine.add(prepare(model, "0", prompt, GREEDY))
    until_done(engine)
    assert [request.new for request in ended] == [alone(model, prompt)]
    assert caplog.text.count("A state was not kept") == 1


def test_logits_that_are_not_finite_fail_their_row_only(model):
    ended = {}
    engine = BatchEngine(model, lambda request: ended.update({request.id: request}))
    prompts = random_prompts(3)
    for index, prompt in enumerate(prompts):
        engine.add(prepare(model, str(index), prompt, GenerationConfig(do_sample=True, top_k=1, max_new_tokens=5)))
    while len(engine.writing) < 3:
        engine.run()
    for x in engine.rows.cache.layers[0].tensors().values():
        x[1] = torch.nan
    until_done(engine)
    assert [request.status == FAILED for _, request in sorted(ended.items())] == [False, True, False]
    assert "not finite" in ended["1"].error
    assert ended["2"].new == alone(model, prompts[2], max_new_tokens=5)


@pytest.mark.parametrize(
    "parameters",
    [
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "eos_token_id": list(range(30))},
        {"eos_token_id": list(range(30))},
        {"bad_words_ids": [[word] for word in range(30)]},
        {"do_sample": True, "top_k": 1, "temperature": 0.3},
        {"max_new_tokens": None, "max_length": 41},
        {"max_new_tokens": None},  # 20, as `generate` has it
    ],
    ids=str,
)
def test_parameters_mean_what_they_mean_in_generate(model, parameters):
    """Side by side with requests that have others."""
    config = GenerationConfig(**({"do_sample": False, "max_new_tokens": 12} | parameters))
    ended, prompts = {}, random_prompts(4)
    engine = BatchEngine(model, lambda request: ended.update({request.id: request}))
    for index, prompt in enumerate(prompts):
        engine.add(prepare(model, f"{index} given", prompt, config))
        engine.add(prepare(model, f"{index} greedy", prompt, GREEDY))
        engine.add(prepare(model, f"{index} warm", prompt, GREEDY, do_sample=True, temperature=5.0))
    until_done(engine)
    assert [ended[f"{index} given"].new for index in range(4)] == [alone(model, x, config) for x in prompts]
    assert [ended[f"{index} greedy"].new for index in range(4)] == [alone(model, x) for x in prompts]
    assert any(ended[f"{index} warm"].new != ended[f"{index} greedy"].new for index in range(4))


def test_a_sampled_text_is_that_of_generate_with_the_same_seed(model):
    config = GenerationConfig(do_sample=True, temperature=1.5, top_p=0.9, max_new_tokens=12)
    (prompt,) = random_prompts(1)
    torch.manual_seed(0)
    expected = alone(model, prompt, config)
    outputs = model.generate_batch([prompt], config, ContinuousBatchingConfig(seed=0))
    assert [output.generated_tokens for output in outputs.values()] == [expected]


def test_stop_strings(model):
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda letter: (not letter.isascii(), letter))
    tokenizer = Tokenizer(models.BPE({letter: index for index, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    (prompt,) = random_prompts(1)
    strings = [tokenizer.decode(alone(model, prompt)[3:5])]
    ended = {}
    engine = BatchEngine(model, lambda request: ended.update({request.id: request}))
    engine.add(prepare(model, "0", prompt, GREEDY, stop_strings=strings, tokenizer=tokenizer))
    until_done(engine)
    assert ended["0"].new == alone(model, prompt, stop_strings=strings, tokenizer=tokenizer)
    assert len(ended["0"].new) <= 5
    with pytest.raises(ValueError, match="tokenizer"):
        prepare(model, "1", prompt, GREEDY, stop_strings=strings)


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"num_beams": 2}, "beam_search"),
        ({"prompt_lookup_num_tokens": 3}, "assisted"),
        ({"guidance_scale": 2.0}, "guidance_scale"),
        ({"temprature": 2.0}, "no parameters of generation: temprature"),
        ({"max_new_tokens": None, "max_length": 2}, "max_length"),
    ],
    ids=str,
)
def test_what_a_batch_cannot_do_is_refused(model, parameters, message):
    with pytest.raises(ValueError, match=message):
        prepare(model, "0", [1, 2, 3], GenerationConfig(do_sample=False), **parameters)


def test_settings_of_pages_are_refused(model):
    for settings in ({"num_blocks": 8}, {"use_cuda_graph": True}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            model.init_continuous_batching(GREEDY, ContinuousBatchingConfig(**settings))


# ---- conversations


def test_each_turn_reads_what_is_new(model):
    """Also where the template writes the end of a prompt in another way the next time."""
    end, begin, think = 5, 6, 7  # the end of a turn, the beginning of a reply, and what is taken out later
    config = GenerationConfig(do_sample=False, max_new_tokens=6, eos_token_id=end)
    store, ended, history, known = StateStore(every=100), {}, [], 0
    for turn, said in enumerate(random_prompts(4, longest=30)):
        said = [token for token in said if token not in (end, begin, think)]
        border = len(history) + len(said) + 1
        prompt = [*history, *said, end, begin, think]
        engine = BatchEngine(model, lambda request: ended.update({request.id: request}), store)
        engine.add(prepare(model, str(turn), prompt, config))
        until_done(engine)
        request = ended[str(turn)]
        assert request.new == alone(model, prompt, config)
        assert len(prompt) - request.read_here == known
        assert engine.tokens_read == len(prompt) - known + len(request.new) - 1
        known = border
        history = [*history, *said, end, begin, *request.new]  # without `think`


def test_generate_batch_goes_on_from_the_store():
    model, prompts = tiny_model(layer_types=MIXED), random_prompts(3)
    model.state_store = StateStore()
    outputs = model.generate_batch(prompts, GREEDY)
    second = [[*x.prompt_ids, *x.generated_tokens, 3, 4] for x in outputs.values()]
    read = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, _: read.append(args[0].numel()))
    outputs = model.generate_batch(second, GREEDY, max_new_tokens=1)
    hook.remove()
    assert sum(read) == 3 * 3  # the reply's last token and the two new ones
    model.state_store = None
    assert [x.generated_tokens for x in outputs.values()] == [alone(model, x, max_new_tokens=1) for x in second]


def test_replies_to_one_prompt_have_snapshots_of_their_own():
    model, (prompt,) = tiny_model(layer_types=MIXED), random_prompts(1)
    model.state_store = StateStore(every=3)
    config = GenerationConfig(do_sample=True, temperature=3.0, num_return_sequences=3, max_new_tokens=8)
    outputs = list(model.generate_batch([prompt], config, ContinuousBatchingConfig(seed=1)).values())
    store, model.state_store = model.state_store, None
    assert len({tuple(output.generated_tokens) for output in outputs}) == 3
    for output in outputs:
        text = [*prompt, *output.generated_tokens]
        found, expected = store.find(model, text), xLSTMCache(model.config)
        assert found.get_seq_length() == len(text) - 1
        with torch.no_grad():
            model(torch.tensor([text[:-1]]), cache=expected)
        assert_same_states(found, expected)


def test_states_read_with_weights_that_have_changed_meanwhile_are_not_kept():
    model, (prompt,) = tiny_model(layer_types=MIXED), random_prompts(1)
    model.state_store = StateStore()
    manager = model.init_continuous_batching(GREEDY)
    manager.start()
    manager.add_request(prompt, "0", streaming=True, max_new_tokens=200)
    manager.get_result(timeout=60)
    with manager.pause():
        known = len(model.state_store)
        with torch.no_grad():
            model.lm_head.weight.data += 0.1  # which PyTorch does not count
    manager.stop(timeout=60)
    assert known == len(model.state_store) == 1  # the prompt's, not the reply's


# ---- Transformers' interface


def test_generate_batch(model):
    prompts = random_prompts(12)
    outputs = model.generate_batch(prompts, GREEDY, record_timestamps=True)
    assert [output.prompt_ids for output in outputs.values()] == prompts
    for prompt, output in zip(prompts, outputs.values()):
        assert output.generated_tokens == alone(model, prompt)
        assert output.is_finished() and output.error is None
        assert len(output.timestamps) == 12 and output.created_time <= output.lifespan[0] <= output.lifespan[1]
    assert model.generate_batch([]) == {}


def test_wrong_prompts_do_not_harm_the_others(model):
    prompts = random_prompts(3)
    wrong = [[], [VOCAB_SIZE], [-1], ["x"]]
    outputs = list(model.generate_batch([*wrong, *prompts], GREEDY).values())
    assert [output.status == FAILED for output in outputs] == [True] * 4 + [False] * 3
    assert all(output.error for output in outputs[:4])
    assert [output.generated_tokens for output in outputs[4:]] == [alone(model, prompt) for prompt in prompts]


def test_every_reply_to_a_wrong_prompt_fails(model, manager):
    for options in (
        {"num_return_sequences": 3},
        {"generation_config": GenerationConfig(do_sample=True, num_return_sequences=3)},
    ):
        manager.add_request([VOCAB_SIZE], "a", do_sample=True, **options)
        outputs = [manager.get_result(timeout=60) for _ in range(3)]
        assert [output.request_id for output in outputs] == ["a", "a__child#0", "a__child#1"]
        assert all(output.status == FAILED for output in outputs)


def test_several_replies_to_a_prompt():
    model = poisoned(tiny_model(layer_types=MIXED))
    config = GenerationConfig(do_sample=True, temperature=3.0, top_k=8, num_return_sequences=3, max_new_tokens=8)
    prompts = [*random_prompts(2), [1, POISON], []]
    outputs = model.generate_batch(prompts, config, ContinuousBatchingConfig(seed=1, max_requests_per_batch=2))
    assert len(outputs) == 12
    assert [output.error is None for output in outputs.values()] == [True] * 6 + [False] * 6
    texts = [tuple(output.generated_tokens) for output in outputs.values()]
    assert len(set(texts[:3])) > 1 and all(len(text) == 8 for text in texts[:6])
    config.top_k = 1
    same = list(model.generate_batch(prompts[:2], config).values())
    reply = [alone(model, prompt, max_new_tokens=8) for prompt in prompts[:2]]
    assert [output.generated_tokens for output in same] == [reply[0]] * 3 + [reply[1]] * 3


def test_log_probabilities(model):
    (prompt,) = random_prompts(1)
    (output,) = model.generate_batch([prompt], GREEDY, ContinuousBatchingConfig(return_logprobs=True)).values()
    ids = torch.tensor([prompt + output.generated_tokens])
    with torch.no_grad():
        logprobs = model(ids[:, :-1]).logits.log_softmax(-1).gather(2, ids[:, 1:, None])[0, -12:, 0]
    torch.testing.assert_close(torch.tensor(output.logprobs), logprobs, rtol=1e-4, atol=1e-4)


def test_streaming_and_iteration(model, manager):
    first, second = random_prompts(2)
    manager.add_request(first, "a", streaming=True)
    assert manager.add_request(second, "b") == "b"
    pieces = [output.generated_tokens for output in manager.request_id_iter("a")]
    assert pieces == [alone(model, first)[:length] for length in range(1, 13)]
    assert [output.generated_tokens for output in manager.request_id_iter("b")] == [alone(model, second)]
    ids = manager.add_requests([first, second], max_new_tokens=3)
    assert len(set(ids)) == 2
    for output in manager:
        ids.remove(output.request_id)
        if not ids:
            break


def test_cancelled_requests_free_their_rows(model):
    prompts = random_prompts(3)
    manager = model.init_continuous_batching(GREEDY, ContinuousBatchingConfig(max_requests_per_batch=1))
    manager.start()
    manager.add_request(prompts[0], "endless", max_new_tokens=10**9)
    manager.add_request(prompts[1], "waits", max_new_tokens=10**9)
    manager.add_request(prompts[2], "last")
    for id in ("waits", "endless", "never added"):
        manager.cancel_request(id)
    outputs = {output.request_id: output for output in (manager.get_result(timeout=60) for _ in range(3))}
    assert "cancelled" in outputs["waits"].error and "cancelled" in outputs["endless"].error
    assert outputs["last"].generated_tokens == alone(model, prompts[2])
    manager.stop(timeout=60)


def test_handlers_get_all_outputs(model, manager):
    """Also those that came before the handler, and those of requests that never began."""
    (prompt,) = random_prompts(1)

    async def collect(id: str, **options) -> list:
        outputs, done = [], asyncio.get_running_loop().create_future()

        def take(output):
            outputs.append(output)
            if output.is_finished():
                done.set_result(None)

        await asyncio.to_thread(time.sleep, options.pop("wait", 0))
        manager.register_result_handler(id, take)
        if options:
            manager.add_request(prompt, id, **options)
        await asyncio.wait_for(done, 60)
        return outputs

    async def run():
        manager.add_request(prompt, "early", streaming=True)
        manager.add_request([], "wrong")
        return await asyncio.gather(
            collect("early", wait=0.2), collect("wrong"), collect("a", streaming=True), collect("b", streaming=False)
        )

    early, wrong, a, b = asyncio.run(run())
    assert [len(outputs) for outputs in (early, wrong, a, b)] == [12, 1, 12, 1]
    assert early[-1].generated_tokens == a[-1].generated_tokens == b[0].generated_tokens == alone(model, prompt)
    assert wrong[0].status == FAILED


def test_a_listener_that_is_gone_does_not_keep_its_request(model, manager):
    async def leave():
        manager.register_result_handler("gone", print)
        manager.add_request([1, 2], "gone", streaming=True, max_new_tokens=10**9)

    asyncio.run(leave())
    manager.add_request([3], "stays")
    assert manager.get_result("stays", timeout=60).generated_tokens == alone(model, [3])
    manager.stop(timeout=60)  # would not end with that request in it


def test_stopping(model):
    prompts = random_prompts(3)
    manager = model.init_continuous_batching(GREEDY)
    assert not manager.is_running() and manager.get_result() is None
    ids = manager.add_requests(prompts)
    manager.start()
    manager.stop(timeout=60)  # what was added is finished
    assert [manager.get_result(id).generated_tokens for id in ids] == [alone(model, prompt) for prompt in prompts]
    assert manager.add_request(prompts[0]) is None
    manager.start()
    ids = manager.add_requests(prompts, max_new_tokens=10**9)
    manager.stop(timeout=60, hard_stop=True)
    assert all("stopped" in manager.get_result(id).error for id in ids)
    assert manager.get_result() is None and list(manager) == list(manager.request_id_iter("x")) == []


def test_a_fatal_error_ends_all_requests_and_can_be_seen(model, monkeypatch):
    manager = model.init_continuous_batching(GREEDY)
    monkeypatch.setattr(manager.engine, "run", lambda: 1 / 0)
    manager.start()
    manager.add_request([1], "0")
    assert "division" in manager.get_result("0", timeout=60).error
    for _ in range(600):
        if not manager.is_running():
            break
        time.sleep(0.05)
    assert isinstance(manager.background_thread_status.fatal_error, ZeroDivisionError)
    assert manager.add_request([1]) is None and manager.get_result() is None


def test_a_persistent_manager(model):
    prompts = random_prompts(2)
    expected = [alone(model, prompt) for prompt in prompts]
    for _ in range(2):
        outputs = model.generate_batch(prompts, GREEDY, persistent_manager=True)
        assert [output.generated_tokens for output in outputs.values()] == expected
    model.destroy_cached_continuous_batching_manager()
    assert not hasattr(model, "_cached_continuous_batching_manager")


def test_a_copy_beside_a_checkpoint_says_what_is_missing():
    from hf_xlstm.hub import flat_modules

    modules = flat_modules()
    assert not {"batching.py", "batch_engine.py", "state_store.py"} & modules.keys()
    hook = modules["integration.py"].split("def init_continuous_batching")[1]
    assert 'raise ImportError("this needs the hf-xlstm package")' in hook[:800]


def test_an_id_stands_for_one_request(model, manager):
    manager.add_request([1], "a", max_new_tokens=10**9)
    with pytest.raises(ValueError, match="id a already"):
        manager.add_request([1], "a")
    manager.cancel_request("a")
    assert manager.get_result("a", timeout=60).status == FAILED
    assert manager.add_request([1], "a") == "a"
    assert manager.get_result("a", timeout=60).generated_tokens == alone(model, [1])


# ---- the server


@contextlib.contextmanager
def serving(directory, states):
    for module in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(module, reason=f"the server needs {module}")
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    options = ["--port", str(port), "--device", "cpu", "--continuous-batching", "--states", states]
    process = subprocess.Popen([sys.executable, SERVE, directory, *options], stdout=subprocess.DEVNULL)
    address = f"http://localhost:{port}"
    try:
        for _ in range(480):
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5)
                break
            except (urllib.error.URLError, TimeoutError):
                assert process.poll() is None
                time.sleep(0.25)
        yield f"{address}/v1/completions", process
    finally:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_server(model_directory, tmp_path):  # noqa: F811
    """Clients side by side, each with its settings; one leaves; the server is killed and goes on from its store."""
    model = AutoModelForCausalLM.from_pretrained(model_directory)
    tokenizer = AutoTokenizer.from_pretrained(model_directory)
    prompts = [" ".join(f"w{token}" for token in prompt) for prompt in random_prompts(6)]
    ids = [tokenizer(prompt, return_tensors="pt").input_ids for prompt in prompts]

    def alone_text(x: torch.Tensor) -> str:
        return tokenizer.decode(model.generate(x, max_new_tokens=20)[0, x.shape[1] :], skip_special_tokens=True)

    texts = [alone_text(x) for x in ids]
    body = {"max_tokens": 20, "temperature": 0}
    with serving(model_directory, tmp_path) as (address, process):

        def ask(index: int) -> str:
            settings = body | {"prompt": prompts[index]}
            if index == 0:
                settings["generation_config"] = json.dumps({"do_sample": True, "top_k": 5, "max_new_tokens": 20})
                del settings["temperature"]
            with post(address, settings | {"stream": index % 2 == 1}) as reply:
                if index % 2 == 0:
                    return json.load(reply)["choices"][0]["text"]
                lines = [line[6:] for line in reply.read().decode().splitlines() if line.startswith("data: {")]
                return "".join(json.loads(line)["choices"][0]["text"] for line in lines)

        with post(address, body | {"prompt": "w1", "max_tokens": 10**6, "stream": True}) as reply:
            reply.readline()  # and leaves
        with ThreadPoolExecutor(6) as pool:
            answers = list(pool.map(ask, range(6)))
        assert [a.strip() for a in answers[1:]] == texts[1:] and answers[0].strip() != texts[0]
        process.kill()
    with serving(model_directory, tmp_path) as (address, process):
        assert len(list(tmp_path.iterdir())) > 6
        with post(address, body | {"prompt": f"{prompts[1]} {texts[1]} w3"}) as reply:
            answer = json.load(reply)["choices"][0]["text"]
    second = torch.tensor([[*ids[1][0].tolist(), *tokenizer(texts[1]).input_ids, 3]])
    assert answer.strip() == alone_text(second)


@pytest.mark.slow
def test_soak():
    """2,000 requests from several threads, cancelled and wrong ones among them: each ends, and nothing is left."""
    model = poisoned(tiny_model(layer_types=MIXED))
    model.state_store = StateStore(max_bytes=50_000, every=16)
    prompts = random_prompts(40, longest=60)
    replies = [alone(model, prompt) for prompt in prompts]
    manager = model.init_continuous_batching(GREEDY, ContinuousBatchingConfig(max_requests_per_batch=16))
    manager.start()
    expected, live = {}, []

    def send(thread: int) -> None:
        rng = random.Random(thread)
        for number in range(500):
            id, kind, index = f"{thread}-{number}", rng.random(), rng.randrange(len(prompts))
            prompt, limit = list(prompts[index]), rng.randint(1, 12)
            if kind < 0.05:
                prompt = []
            elif kind < 0.1:
                prompt[rng.randrange(len(prompt))] = POISON
            expected[id] = None if kind < 0.1 else replies[index][:limit]
            manager.add_request(prompt, id, max_new_tokens=10**9 if kind > 0.9 else limit, streaming=kind > 0.7)
            if kind > 0.9:
                expected[id] = "cancelled"
                manager.cancel_request(id)
            while len(manager.engine) > 40:
                time.sleep(0.01)

    threads = [threading.Thread(target=send, args=(thread,)) for thread in range(4)]
    for thread in threads:
        thread.start()
    ended = {}
    while len(ended) < 2000:
        output = manager.get_result(timeout=60)
        assert output is not None, f"{2000 - len(ended)} requests are stuck."
        if output.is_finished():
            assert output.request_id not in ended
            ended[output.request_id] = output
            if len(ended) % 500 == 0:
                gc.collect()
                live.append(sum(isinstance(x, torch.Tensor) for x in gc.get_objects()))
    for thread in threads:
        thread.join()
    manager.stop(timeout=60)
    for id, output in ended.items():
        if expected[id] is None:
            assert output.status == FAILED
        elif expected[id] == "cancelled":
            assert output.status == FAILED and "cancelled" in output.error
        else:
            assert output.generated_tokens == expected[id]
    assert not manager._outputs and not manager._handlers and not manager._expected and len(manager.engine) == 0
    assert max(live[1:]) < 1.5 * live[0]  # tensors that are alive while it runs
    assert model.state_store.nbytes <= 50_000
