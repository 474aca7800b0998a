"""xLSTMCache: what it stores, its constant size, and operations on it against the same on the text it has read."""

import copy

import pytest
import torch
from common import MIXED, MLSTM, STACKS, assert_same_states, tiny_model, tokens
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from hf_xlstm import xLSTMCache


@pytest.fixture(scope="module", params=STACKS)
def model(request):
    return tiny_model(**STACKS[request.param])


def read(model, ids: torch.Tensor, cache: xLSTMCache | None = None, **kwargs) -> xLSTMCache:
    cache = xLSTMCache(model.config) if cache is None else cache
    with torch.no_grad():
        return model(ids, cache=cache, **kwargs).cache


def tensors(cache: xLSTMCache) -> list[torch.Tensor]:
    return [x for layer in cache.layers for x in layer.tensors().values()]


def assert_identical(actual: xLSTMCache, expected: xLSTMCache) -> None:
    assert actual.get_seq_length() == expected.get_seq_length()
    assert all(torch.equal(x, y) for x, y in zip(tensors(actual), tensors(expected), strict=True))


def test_model_returns_the_cache_it_was_given(model):
    cache = xLSTMCache(model.config)
    assert read(model, tokens(2, 5), cache) is cache
    assert isinstance(model(tokens(2, 5)).cache, xLSTMCache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stack", STACKS)
def test_states_are_float32(dtype, stack):
    model = tiny_model(**STACKS[stack]).to(dtype)
    cache = read(model, tokens(2, 5))
    for _ in range(2):
        for layer in cache.layers:
            assert {x.dtype for name, x in layer.tensors().items() if name != "conv"} == {torch.float32}
        read(model, tokens(2, 1), cache)


def test_bfloat16_model_does_not_round_its_states():
    """Over a thousand steps a bfloat16 state would be off by a third; what its inputs are rounded by is far less."""
    model = tiny_model().to(torch.bfloat16)
    ids = tokens(1, 1000)
    stepwise = xLSTMCache(model.config)
    for token in ids.split(1, dim=1):
        read(model, token, stepwise)
    assert_same_states(stepwise, read(model, ids), tolerance=2e-2)


def test_counts_tokens(model):
    cache = xLSTMCache(model.config)
    assert cache.get_seq_length() == 0
    for count, length in ((5, 5), (1, 6), (7, 13)):
        read(model, tokens(2, count), cache)
        assert cache.get_seq_length() == length


def test_states_stay_where_they_are(model):
    """States are written in place, so that a CUDA graph may keep the addresses: through prefill, steps, reset."""
    cache = read(model, tokens(2, 5))
    addresses = [x.data_ptr() for x in tensors(cache)]
    for ids in (tokens(2, 1), tokens(2, 1, seed=1), tokens(2, 9)):
        before = [x.clone() for x in tensors(cache)]
        read(model, ids, cache)
        assert [x.data_ptr() for x in tensors(cache)] == addresses
        assert not any(torch.equal(x, y) for x, y in zip(tensors(cache), before, strict=True))
    cache.reset()
    assert [x.data_ptr() for x in tensors(read(model, tokens(2, 5), cache))] == addresses


@pytest.mark.parametrize("length", [1, 6])
def test_states_needed_by_a_backward_pass_are_not_overwritten(model, length):
    """With gradients on, a forward pass continues from the cache and may be differentiated after the next one."""
    cache = read(model, tokens(2, 5))
    expected_cache = copy.deepcopy(cache)
    first = model(tokens(2, length), cache=cache).logits
    model(tokens(2, length, seed=1), cache=cache)
    assert not any(x.requires_grad for x in tensors(cache))
    gradients = torch.autograd.grad(first.sum(), model.parameters(), allow_unused=True)
    expected = model(tokens(2, length), cache=expected_cache).logits
    for x, y in zip(
        gradients, torch.autograd.grad(expected.sum(), model.parameters(), allow_unused=True), strict=True
    ):
        torch.testing.assert_close(x, y)


def test_size_does_not_depend_on_length(model, tmp_path):
    sizes, files = [], []
    for length in (10, 1000):
        cache = read(model, tokens(1, length))
        cache.save_pretrained(tmp_path / str(length))
        (file,) = (tmp_path / str(length)).iterdir()
        sizes.append(cache.nbytes)
        files.append(file.stat().st_size)
    assert len(set(sizes)) == 1
    assert abs(files[0] - files[1]) <= 8  # digits of the token count
    assert cache.nbytes == sum(x.numel() * 4 for x in tensors(cache))
    assert read(model, tokens(3, 4)).nbytes == 3 * cache.nbytes


def test_save_and_load(model, tmp_path):
    ids = tokens(2, 12)
    cache = read(model, ids[:, :7])
    cache.save_pretrained(tmp_path)
    loaded = xLSTMCache.from_pretrained(tmp_path)
    assert_identical(loaded, cache)
    assert_identical(read(model, ids[:, 7:], loaded), read(model, ids[:, 7:], cache))


def test_save_and_load_empty(model, tmp_path):
    xLSTMCache(model.config).save_pretrained(tmp_path)
    assert_identical(read(model, tokens(2, 5), xLSTMCache.from_pretrained(tmp_path)), read(model, tokens(2, 5)))


@pytest.mark.parametrize("operation", ["reorder", "repeat", "select"])
def test_batch_operations(model, operation):
    """On the cache they equal the same on the batch it has read, and it goes on from there."""
    ids, rows = tokens(3, 7), torch.tensor([2, 0, 0])
    cache = read(model, ids)
    if operation == "reorder":
        cache.reorder_cache(rows)
        ids = ids[rows]
    elif operation == "repeat":
        cache.batch_repeat_interleave(2)
        ids = ids.repeat_interleave(2, dim=0)
    else:
        cache.batch_select_indices(rows[:2])
        ids = ids[rows[:2]]
    assert_same_states(cache, read(model, ids))
    assert cache.get_seq_length() == 7
    more = tokens(ids.shape[0], 3, seed=1)
    assert_same_states(read(model, more, cache), read(model, torch.cat([ids, more], dim=1)))


@pytest.mark.parametrize("batch_size", [2, 3])
def test_reset(model, batch_size):
    """A reset cache is like a new one, also for another batch size."""
    cache = read(model, tokens(2, 7))
    cache.reset()
    assert cache.get_seq_length() == 0
    ids = tokens(batch_size, 5)
    assert_identical(read(model, ids, cache), read(model, ids))


@pytest.mark.parametrize("with_gradients", [False, True])
def test_deepcopy(model, with_gradients):
    """At any time, also right after a forward pass that recorded gradients; the copy shares nothing."""
    cache = xLSTMCache(model.config)
    copy.deepcopy(cache)
    with torch.set_grad_enabled(with_gradients):
        model(tokens(2, 7), cache=cache)
        model(tokens(2, 1), cache=cache)
    twin = copy.deepcopy(cache)
    assert_identical(twin, cache)
    before = copy.deepcopy(cache)
    read(model, tokens(2, 3), twin)
    assert_identical(cache, before)
    assert twin.get_seq_length() == cache.get_seq_length() + 3


def test_to_device(model):
    cache = read(model, tokens(2, 5))
    assert cache.to("meta") is cache
    assert {x.device.type for x in tensors(cache)} == {"meta"}


PIECES = [[6], [1], [4, 2], [3, 1, 1, 1], [1, 1, 4]]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_crop(model, fresh, pieces):
    """Taking back n tokens is never having seen them, whether they came in one forward pass or in several."""
    prompt, ids = tokens(2, 0 if fresh else 9), tokens(2, sum(pieces), seed=1)
    for remove in range(sum(pieces) + 1):
        cache = xLSTMCache(model.config) if fresh else read(model, prompt)
        cache.activate_past_recording()
        for piece in ids.split(pieces, dim=1):
            read(model, piece, cache)
        cache.crop(torch.tensor(-remove))  # the type that Transformers passes, up to 5.17
        kept = torch.cat([prompt, ids[:, : ids.shape[1] - remove]], dim=1)
        assert cache.get_seq_length() == kept.shape[1]
        if kept.shape[1]:
            assert_same_states(cache, read(model, kept))
        more = tokens(2, 3, seed=2)
        assert_same_states(read(model, more, cache), read(model, torch.cat([kept, more], dim=1)))


def test_crop_with_padding(model):
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    cache = xLSTMCache(model.config)
    cache.activate_past_recording()
    read(model, tokens(2, 6), cache, attention_mask=mask)
    cache.crop(-2)
    assert_same_states(cache, read(model, tokens(2, 6)[:, :4], attention_mask=mask[:, :4]))


def test_crop_of_a_copy(model):
    """A copy takes back its own tokens, not those of the original."""
    cache = xLSTMCache(model.config)
    cache.activate_past_recording()
    ids = tokens(2, 6)
    read(model, ids, cache)
    twin = copy.deepcopy(cache)
    twin.crop(-2)
    assert_same_states(twin, read(model, ids[:, :4]))
    assert_same_states(cache, read(model, ids))


@pytest.mark.parametrize("remove", [-7, 2])
def test_impossible_crop_changes_nothing(model, remove):
    cache = xLSTMCache(model.config)
    cache.activate_past_recording()
    read(model, tokens(2, 6), cache)
    before = [x.clone() for x in tensors(cache)]
    with pytest.raises(RuntimeError, match="remove"):
        cache.crop(remove)
    assert cache.get_seq_length() == 6
    assert all(torch.equal(x, y) for x, y in zip(tensors(cache), before, strict=True))


def test_crop_needs_recording(model):
    cache = read(model, tokens(2, 6))
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        cache.crop(-1)
    assert cache.get_seq_length() == 6


def test_recording_keeps_constant_size_until_cropped(model):
    """`nbytes` counts the state, not what it takes to undo."""
    cache = read(model, tokens(2, 6))
    nbytes = cache.nbytes
    cache.activate_past_recording()
    assert read(model, tokens(2, 6), cache).nbytes == nbytes


def test_layers_of_a_cache():
    cache = xLSTMCache(tiny_model(layer_types=MIXED).config)
    assert [layer.layer_type for layer in cache.layers] == MIXED
    assert [len(layer.tensors()) for layer in cache.layers] == [0, 0]
    assert [layer.layer_type for layer in xLSTMCache(tiny_model().config).layers] == MLSTM


# ---- files ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    model = tiny_model(**STACKS["conv"])
    model(tokens(2, 5), use_cache=True).cache.save_pretrained(tmp_path)
    return tmp_path / "xlstm_cache.safetensors"


def test_every_tensor_of_a_file_must_be_there_and_unchanged(saved):
    tensors = load_file(saved)
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
    for name, x in tensors.items():
        changes = {"missing": None, "shape": x[:1], "dtype": x.double(), "value": x + 1}
        for changed in changes.values():
            others = {key: y for key, y in tensors.items() if key != name}
            save_file(others if changed is None else others | {name: changed}, saved, metadata)
            with pytest.raises(ValueError, match=r"xlstm_cache\.safetensors is damaged"):
                xLSTMCache.from_pretrained(saved.parent)
    save_file(tensors | {"layers.9.c": x.clone()}, saved, metadata)
    with pytest.raises(ValueError, match=r"layers\.9\.c"):
        xLSTMCache.from_pretrained(saved.parent)


@pytest.mark.parametrize(
    "old, new",
    [
        (b'"layers":', b'"lAyers":'),
        (b'\\"mlstm', b'\\"mlxtm'),
        (b'\\"seen_tokens\\":\\"5\\"', b'\\"seen_tokens\\":\\"x\\"'),
        (b'"seen_tokens":"5"', b'"seen_tokens":"6"'),
        (b"5", b""),
    ],
)
def test_damaged_file_is_named(saved, old, new):
    whole = saved.read_bytes()
    damaged = whole.replace(old, new) if old in whole else whole[:-10]
    saved.write_bytes(damaged)
    with pytest.raises(ValueError, match=r"xlstm_cache\.safetensors"):
        xLSTMCache.from_pretrained(saved.parent)


def test_file_of_an_earlier_version_opens(saved):
    """It has neither a list of tensors nor a checksum, but must be whole."""
    tensors = load_file(saved)
    with safe_open(saved, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key not in ("tensors", "checksum")}
    save_file(tensors, saved, metadata)
    assert xLSTMCache.from_pretrained(saved.parent).get_seq_length() == 5
    del tensors["layers.1.h"]
    save_file(tensors, saved, metadata)
    with pytest.raises(ValueError, match=r"lacks layers\.1\.h"):
        xLSTMCache.from_pretrained(saved.parent)


def test_failed_save_leaves_the_old_file(saved, monkeypatch):
    before = saved.read_bytes()

    def fail(tensors, path, metadata):
        with open(path, "wb") as file:
            file.write(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("hf_xlstm.cache.save_file", fail)
    with pytest.raises(OSError, match="No space"):
        xLSTMCache.from_pretrained(saved.parent).save_pretrained(saved.parent)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_missing_file_is_named(tmp_path):
    with pytest.raises(OSError, match=r"xlstm_cache\.safetensors does not exist"):
        xLSTMCache.from_pretrained(tmp_path)
