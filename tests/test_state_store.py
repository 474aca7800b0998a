"""hf_xlstm.state_store: what was read once is found again, for the same text and the same weights only."""

import copy
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import MIXED, STACKS, assert_same_states, tiny_model, tokens

from hf_xlstm import xLSTMCache
from hf_xlstm.cache import CACHE_FILE
from hf_xlstm.state_store import StateStore, TextKeys, fingerprint


@pytest.fixture(scope="module")
def model():
    return tiny_model(**STACKS["conv"])


def read(model, ids: torch.Tensor) -> xLSTMCache:
    cache = xLSTMCache(model.config)
    with torch.no_grad():
        model(ids, cache=cache)
    return cache


def one_snapshot(model) -> int:
    """Bytes of a snapshot."""
    return read(model, tokens(1, 1)).nbytes


def count_tokens(model, call):
    """What `call` returns, and how many tokens the model has read in it."""
    seen = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, _: seen.append(args[0].numel()))
    try:
        return call(), sum(seen)
    finally:
        hook.remove()


@pytest.mark.parametrize("stack", STACKS)
def test_a_second_turn_reads_its_new_tokens_only(stack):
    model, store = tiny_model(**STACKS[stack]), StateStore()
    ids = tokens(1, 30)
    for _ in range(3):
        expected = model.generate(ids, max_new_tokens=5, do_sample=False)
        cache = store.find(model, ids)
        known = cache.get_seq_length()
        goes_on = functools.partial(model.generate, ids, cache=cache, max_new_tokens=5, do_sample=False)
        output, number = count_tokens(model, goes_on)
        store.keep(model, output, cache)
        assert output.equal(expected)
        assert number == ids.shape[1] - known + 4  # the last token of the reply is not read
        assert_same_states(store.find(model, torch.cat([output, output], dim=1)), read(model, output[:, :-1]))
        ids = torch.cat([output, tokens(1, 7)], dim=1)
        assert store.find(model, ids).get_seq_length() == output.shape[1] - 1


def test_the_longest_beginning_is_found_and_belongs_to_the_caller(model):
    store, ids = StateStore(), tokens(1, 20)
    for length in (4, 9, 20):
        store.keep(model, ids[:, :length], read(model, ids[:, :length]))
    other = ids.clone()
    other[0, 8] += 1 if other[0, 8] < 60 else -1
    texts = (ids, ids[:, :9], ids[:, :10], other, ids[0, :5].tolist())
    # 9 of all 20, since the last token has to be read again for its logits
    assert [store.find(model, text).get_seq_length() for text in texts] == [9, 4, 9, 4, 4]
    assert store.find(model, ids[:, 1:]).get_seq_length() == 0
    first = store.find(model, ids)
    with torch.no_grad():
        model(ids[:, 9:], cache=first)
    assert_same_states(store.find(model, ids), read(model, ids[:, :9]))


def test_keys_of_a_text_that_grows():
    text = tokens(1, 50)[0].tolist()
    keys = TextKeys("weights")
    parts = keys.of(text[:20], [3, 9]) + keys.of(text[:20], [20]) + keys.of(text, [20, 41])
    assert parts == [TextKeys("weights").of(text, [n])[0] for n in (3, 9, 20, 20, 41)]
    assert keys.of(text, [5]) == TextKeys("weights").of(text[:5], [5])  # shorter than what was hashed
    assert len({*parts, *TextKeys("others").of(text, [3, 9, 20, 41]), *keys.of(text[1:], [3, 9, 20, 41])}) == 12


def test_refusals(model):
    store, ids = StateStore(), tokens(2, 5)
    with pytest.raises(ValueError, match="one text"):
        store.find(model, ids)
    with pytest.raises(ValueError, match="2 rows"):
        store.keep(model, ids[0], read(model, ids))
    with pytest.raises(ValueError, match="at most 3 tokens"):
        store.keep(model, ids[0, :3], read(model, ids[:1]))
    with pytest.raises(ValueError, match="every"):
        StateStore(every=0)


def change_one_number_through_data(model):
    model.backbone.blocks[0].norm_mlstm.weight.data[3] += 1e-3


def change_through_numpy(model):
    model.backbone.embeddings.weight.detach().numpy()[5, 7] += 1e-3


def swap_rows(model):
    weight = model.backbone.embeddings.weight.data
    weight[[3, 4]] = weight[[4, 3]]


def step_of_an_optimizer(model):
    model(tokens(1, 4), labels=tokens(1, 4)).loss.backward()
    torch.optim.SGD(model.parameters(), lr=1e-3).step()


def cast(model):
    model.double()


def change_the_configuration(model):
    model.config.norm_eps *= 2


CHANGES = (
    change_one_number_through_data,
    change_through_numpy,
    swap_rows,
    step_of_an_optimizer,
    cast,
    change_the_configuration,
)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_other_weights_never_hit(change):
    model, store, ids = tiny_model(layer_types=MIXED), StateStore(), tokens(1, 9)
    store.keep(model, ids, read(model, ids))
    longer = torch.cat([ids, ids], dim=1)
    found = store.find(model, longer)
    assert found.get_seq_length() == 9
    original = copy.deepcopy(model)
    change(model)
    assert store.find(model, longer).get_seq_length() == 0
    with pytest.raises(ValueError, match="weights of the model have changed"):
        store.keep(model, longer, found)
    assert store.find(original, longer).get_seq_length() == 9


def test_adapters_have_states_of_their_own():
    peft = pytest.importorskip("peft", reason="LoRA needs peft")
    from hf_xlstm import LORA_TARGET_MODULES

    model, store, ids = tiny_model(layer_types=MIXED), StateStore(), tokens(1, 9)
    longer = torch.cat([ids, ids], dim=1)
    store.keep(model, ids, read(model, ids))
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=LORA_TARGET_MODULES, init_lora_weights=False))
    inner = adapted.get_base_model()
    assert store.find(inner, longer).get_seq_length() == 0
    store.keep(inner, ids, read(inner, ids))
    assert store.find(inner, longer).get_seq_length() == 9
    with adapted.disable_adapter():
        assert store.find(inner, longer).get_seq_length() == 0
    assert store.find(inner, longer).get_seq_length() == 9


def test_the_same_checkpoint_hits_again(model, tmp_path):
    model.save_pretrained(tmp_path / "a")
    again = type(model).from_pretrained(tmp_path / "a")
    again.save_pretrained(tmp_path / "b")
    other_place = type(model).from_pretrained(tmp_path / "b")
    assert fingerprint(again) == fingerprint(model) == fingerprint(other_place)
    assert fingerprint(tiny_model(seed=1, **STACKS["conv"])) != fingerprint(model)


@pytest.mark.parametrize("on_disk", [False, True])
def test_bounded_and_the_least_recently_used_go_first(model, on_disk, tmp_path):
    size = one_snapshot(model)
    room = size if on_disk else 3 * size
    store = StateStore(room, tmp_path if on_disk else None, max_disk_bytes=int(4.5 * size))
    fits = 3
    if on_disk:  # a file is a little larger than the states in it
        store.keep(model, [1, 2], read(model, torch.tensor([[1, 2]])))
        fits = store.max_disk_bytes // store.disk_bytes
        store.clear()
    ids = tokens(20, 5)
    for row in ids[:fits]:
        store.keep(model, row, read(model, row[None]))
    longer = torch.cat([ids, ids], dim=1)
    assert store.find(model, longer[0]).get_seq_length() == 5  # which makes it the latest used
    store.keep(model, ids[fits], read(model, ids[fits][None]))
    found = [store.find(model, row).get_seq_length() for row in longer[: fits + 1]]
    assert found == [5, 0] + [5] * (fits - 1)
    for row in ids:
        store.keep(model, row, read(model, row[None]))
        assert store.nbytes <= store.max_bytes and store.disk_bytes <= store.max_disk_bytes
    if on_disk:
        files = list(tmp_path.glob(f"*/{CACHE_FILE}"))
        assert sum(file.stat().st_size for file in files) == store.disk_bytes and len(files) == fits
    assert len(store) == fits
    store.clear()
    assert len(store) == store.nbytes == store.disk_bytes == 0 and not store._lengths and not list(tmp_path.iterdir())


def test_a_snapshot_that_does_not_fit_is_not_kept(model):
    store = StateStore(max_bytes=one_snapshot(model) - 1)
    store.keep(model, [1, 2], read(model, torch.tensor([[1, 2]])))
    assert len(store) == 0


def test_survives_on_disk(model, tmp_path):
    store, ids = StateStore(directory=tmp_path), tokens(1, 9)
    store.keep(model, ids, read(model, ids))
    with pytest.raises(RuntimeError, match="in use by another store"):
        StateStore(directory=tmp_path)
    store.close()
    again = StateStore(directory=tmp_path)
    longer = torch.cat([ids, ids], dim=1)
    assert_same_states(again.find(model, longer), read(model, ids))
    assert again.disk_bytes == next(tmp_path.glob(f"*/{CACHE_FILE}")).stat().st_size
    again.close()


@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_a_damaged_file_is_dropped(model, damage, tmp_path):
    store, ids = StateStore(directory=tmp_path), tokens(1, 9)
    store.keep(model, ids, read(model, ids))
    store.close()
    file = next(tmp_path.glob(f"*/{CACHE_FILE}"))
    data = bytearray(file.read_bytes())
    if damage == "cut":
        del data[-10:]
    else:
        data[-10] ^= 1
    file.write_bytes(data)
    again = StateStore(directory=tmp_path)
    assert again.find(model, torch.cat([ids, ids], dim=1)).get_seq_length() == 0
    assert len(again) == 0 and not file.exists()
    again.close()


def test_a_full_disk_costs_the_snapshot_only(model, tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    store, ids = StateStore(max_bytes=0, directory=tmp_path, max_disk_bytes=2**30), tokens(1, 9)
    monkeypatch.setattr(xLSTMCache, "save_pretrained", full)
    store.keep(model, ids, read(model, ids))
    assert len(store) == 0 and not list(tmp_path.iterdir())
    store.close()


WRITER = """
import sys
sys.path[:0] = sys.argv[2:]
import torch
from common import MIXED, tiny_model, tokens
from hf_xlstm import xLSTMCache
from hf_xlstm.state_store import StateStore

model, store = tiny_model(layer_types=MIXED, hidden_size=128), StateStore(directory=sys.argv[1])
with torch.no_grad():
    for row in tokens(1000, 3):
        cache = xLSTMCache(model.config)
        model(row[None], cache=cache)
        store.keep(model, row, cache)
        print(len(store), flush=True)
"""


@pytest.mark.slow
def test_killed_while_writing(tmp_path):
    """Whatever the moment, a store that opens the directory finds whole snapshots only, and no leftovers."""
    paths = [str(Path(__file__).parent), *sys.path]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(tmp_path), *paths], stdout=subprocess.PIPE, text=True, env=os.environ
    )
    assert [int(process.stdout.readline()) for _ in range(5)] == [1, 2, 3, 4, 5]
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    unfinished = tmp_path / f"3-{'0' * 64}"  # as if it had been in the middle of one, which is a matter of luck
    unfinished.mkdir()
    (unfinished / f"{CACHE_FILE}.0123").write_bytes(b"half")

    model, store = tiny_model(layer_types=MIXED, hidden_size=128), StateStore(directory=tmp_path)
    assert len(store) >= 5 and not unfinished.exists()
    assert all([file.name for file in path.iterdir()] == [CACHE_FILE] for path in tmp_path.iterdir())
    found = 0
    for row in tokens(1000, 3)[: len(store)]:
        cache = store.find(model, torch.cat([row, row]))
        if cache.get_seq_length():
            assert_same_states(cache, read(model, row[None]))
            found += 1
    assert found == len(store)
    store.close()
