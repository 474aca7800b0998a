"""Random models in random modes, against the definition: the same model in float64 with the reference cells, which
reads every sequence alone and whole, without padding, packing, cache or chunks.

A draw is its seed: `python tests/test_fuzz.py 17 18` repeats the draws 17 and 18, with `--compiled` through
torch.compile.
"""

import copy
import random
import sys

import pytest
import torch
from common import VOCAB_SIZE, relative_error, tiny_model

from hf_xlstm.configuration_xlstm import PAPER_FIELDS


FAST, SLOW, COMPILED = 60, 2000, 60  # draws
PAD = 3  # a token like all others: a mask alone says what is padding
NEW = 4  # tokens to generate
# Of logits, and of the gradients of all parameters together. In bfloat16 the definition itself, rounded to it, may be
# wrong by a tenth, so that it says how large an error may be.
TOLERANCE = {torch.float64: (1e-9, 1e-7), torch.float32: (1e-4, 1e-3)}
IN_BFLOAT16 = 2  # times the error of the definition in the same dtype


def draw_fields(rng: random.Random) -> dict:
    """A configuration: the fields in which it differs from `common.tiny_config`."""
    layer_types = rng.choices(["mlstm", "slstm"], k=rng.randint(1, 3))
    fields = {
        "layer_types": layer_types,
        "num_hidden_layers": len(layer_types),
        "num_heads": rng.choice([1, 2, 4]),
        "chunk_size": rng.choice([1, 4, 8, 64]),
        "max_inference_chunksize": rng.choice([5, 16384]),
        "slstm_conv_kernel_size": rng.choice([0, 2, 4]),
        "slstm_recurrent_init": rng.choice(["zeros", "uniform"]),
        "use_bias": rng.random() < 0.5,
        "tie_word_embeddings": rng.random() < 0.5,
        "add_out_norm": rng.random() < 0.8,
        "output_logit_soft_cap": rng.choice([None, 30.0]),
    }
    if rng.random() < 0.4:
        return PAPER_FIELDS | fields | {"mlstm_conv_kernel_size": rng.choice([2, 4])}
    return fields | {"qk_dim_factor": rng.choice([0.5, 1.0]), "gate_soft_cap": rng.choice([None, 15.0])}


class Draw:
    """A model, its definition, a few sequences, and the mode in which the model reads them."""

    def __init__(self, seed: int):
        rng = self.rng = random.Random(seed)
        self.fields = draw_fields(rng)
        self.mode = rng.choice(["padded", "padded", "packed", "packed", "continued", "continued", "greedy", "beams"])
        # tokens are compared one by one in what is generated: nothing may be as good as a tie
        generates = self.mode in ("greedy", "beams")
        self.dtype = torch.float64 if generates else rng.choice([torch.float64, torch.float32, torch.bfloat16])
        self.sequences = [
            torch.tensor([rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([1, 2, 5, 9, 20]))])
            for _ in range(rng.randint(1, 3))
        ]
        self.model = tiny_model(seed=seed, **self.fields, backend="torch").to(self.dtype)
        self.definition = tiny_model(seed=seed, **self.fields, backend="reference")
        self.definition.load_state_dict(self.model.state_dict())
        self.rounded = copy.deepcopy(self.definition).to(self.dtype)
        self.definition.double()
        self.run = self.model

    def __repr__(self) -> str:
        options = {key: value for key, value in vars(self).items() if isinstance(value, str | int | list | dict)}
        lengths = [len(x) for x in options.pop("sequences")]
        return f"{self.dtype}, lengths {lengths}, {options}"

    def compile(self) -> None:
        torch._dynamo.reset()
        self.run = torch.compile(self.model, backend="eager")

    def check(self) -> None:
        getattr(self, f"check_{self.mode}")()

    def pad(self, side: str) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch and its mask; `inside` puts padding between the tokens, too."""
        size = max(map(len, self.sequences)) + self.rng.choice([0, 3])
        ids, mask = torch.full((len(self.sequences), size), PAD), torch.zeros(len(self.sequences), size).long()
        for row, sequence in enumerate(self.sequences):
            count = len(sequence)
            places = {"left": range(size - count, size), "right": range(count)}.get(side)
            places = list(sorted(self.rng.sample(range(size), count)) if places is None else places)
            ids[row, places], mask[row, places] = sequence, 1
        return ids, mask

    def assert_same(self, logits: torch.Tensor, gradients: bool) -> None:
        """Logits (N, V) of all tokens, one sequence after the other; and the gradients of a loss of them."""
        assert logits.dtype == (torch.float64 if self.dtype == torch.float64 else torch.float32)
        weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

        def results(model, logits=None):
            if logits is None:
                logits = torch.cat([model(x[None], use_cache=False).logits[0] for x in self.sequences])
            yield logits
            if gradients:
                found = torch.autograd.grad((logits * weights.to(logits)).sum(), list(model.parameters()))
                yield torch.cat([x.double().flatten() for x in found])

        expected = list(results(self.definition))
        if self.dtype == torch.bfloat16:
            bounds = [IN_BFLOAT16 * relative_error(*pair) for pair in zip(results(self.rounded), expected)]
        else:
            bounds = TOLERANCE[self.dtype]
        for name, bound, *pair in zip(("logits", "gradients"), bounds, results(self.model, logits), expected):
            error = relative_error(*pair)
            assert error < bound, f"{name}: {error:.1e}, not {bound:.1e}"

    def check_padded(self) -> None:
        self.side, self.training = self.rng.choice(["left", "right", "inside"]), self.rng.random() < 0.5
        ids, mask = self.pad(self.side)
        with torch.set_grad_enabled(self.training):
            logits = self.run(ids, attention_mask=mask, use_cache=False).logits
        self.assert_same(logits[mask.bool()], gradients=self.training)

    def check_packed(self) -> None:
        """Documents side by side in one or two rows, with padding around and inside them, or none. A mask of ones
        changes nothing, and neither do the positions of padding."""
        self.told_by = self.rng.choice(["seq_idx", "cu_seq_lens_q", "position_ids"])
        self.training, self.masked = self.rng.random() < 0.5, self.rng.random() < 0.5
        ids, mask, numbers, positions = self.pack()
        if self.told_by == "seq_idx":
            told = numbers
        elif self.told_by == "cu_seq_lens_q":
            rows = torch.arange(len(numbers))[:, None].expand_as(numbers)
            _, lengths = torch.stack([rows, numbers]).flatten(1).unique_consecutive(dim=1, return_counts=True)
            told = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        else:
            told = positions
        options = {"attention_mask": mask} if self.masked or self.rng.random() < 0.3 else {}
        with torch.set_grad_enabled(self.training):
            logits = self.run(ids, **{self.told_by: told}, **options).logits
        self.assert_same(logits[mask.bool()], gradients=self.training)

    def pack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """The documents' tokens, mask, numbers and positions, each (B, T)."""
        rows = [[], []] if len(self.sequences) > 1 and self.rng.random() < 0.3 else [[]]
        for number, sequence in enumerate(self.sequences):
            document = [(token, 1, number, place) for place, token in enumerate(sequence.tolist())]
            if self.masked:
                for _ in range(self.rng.choice([0, 1, 4])):
                    place = self.rng.randint(0, len(document))
                    document.insert(place, (PAD, 0, number, self.rng.randint(0, 9)))
            rows[number * len(rows) // len(self.sequences)] += document
        size = max(map(len, rows))
        if len(set(map(len, rows))) > 1:
            self.masked = True
        for number, row in enumerate(rows, len(self.sequences)):
            row += [(PAD, 0, number, place) for place in range(size - len(row))]  # a document of padding alone
        return torch.tensor(rows).permute(2, 0, 1).contiguous().unbind()

    @torch.no_grad()
    def check_continued(self) -> None:
        """In pieces, down to single steps, the state between them in a cache."""
        self.side = self.rng.choice(["left", "right", "inside"])
        ids, mask = self.pad(self.side)
        self.pieces = []
        while sum(self.pieces) < ids.shape[1]:
            self.pieces.append(min(self.rng.choice([1, 1, 3, 8]), ids.shape[1] - sum(self.pieces)))
        cache, logits, end = None, [], 0
        for piece in self.pieces:
            start, end = end, end + piece
            whole_mask = self.rng.random() < 0.5  # as generate passes it, the past included
            outputs = self.run(
                ids[:, start:end],
                attention_mask=mask[:, :end] if whole_mask else mask[:, start:end],
                cache=cache,
                use_cache=True,
            )
            cache = outputs.cache
            logits.append(outputs.logits)
        assert cache.get_seq_length() == ids.shape[1]
        self.assert_same(torch.cat(logits, dim=1)[mask.bool()], gradients=False)

    def generate(self, **options) -> torch.Tensor:
        """What the model adds to every sequence, from the batch, padded on the left."""
        ids, mask = self.pad("left")
        options |= {"max_new_tokens": NEW, "do_sample": False}
        return self.model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]

    def check_greedy(self) -> None:
        self.options = {"prefill_chunk_size": self.rng.choice([None, 1, 4]), "use_cache": self.rng.random() < 0.8}
        if not self.options["use_cache"]:
            self.options.pop("prefill_chunk_size")
        actual = self.generate(**self.options)
        for row, ids in zip(actual, self.sequences, strict=True):
            with torch.no_grad():
                for _ in range(NEW):
                    ids = torch.cat([ids, self.definition(ids[None], use_cache=False).logits[0, -1:].argmax(-1)])
            assert torch.equal(row, ids[-NEW:]), f"{row.tolist()} for {ids[-NEW:].tolist()}"

    def check_beams(self) -> None:
        self.options = {"num_beams": self.rng.choice([2, 3])}
        actual = self.generate(**self.options)
        for row, ids in zip(actual, self.sequences, strict=True):
            mask = torch.ones_like(ids)[None]
            options = self.options | {"max_new_tokens": NEW, "do_sample": False, "use_cache": False}
            expected = self.definition.generate(ids[None], attention_mask=mask, **options)[0, -NEW:]
            assert torch.equal(row, expected), f"{row.tolist()} for {expected.tolist()}"


def check(seed: int, compiled: bool = False) -> None:
    draw = Draw(seed)
    if compiled:
        draw.compile()
    try:
        draw.check()
    except Exception as error:
        again = f"python tests/test_fuzz.py {seed}{' --compiled' if compiled else ''}"
        raise AssertionError(f"{again}\n{draw}\n{type(error).__name__}: {error}") from error


@pytest.mark.parametrize("seed", range(FAST))
def test_draw(seed):
    check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(FAST, SLOW, 100))
def test_many_draws(first):
    for seed in range(first, min(first + 100, SLOW)):
        check(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(COMPILED))
def test_compiled_draw(seed):
    check(seed, compiled=True)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        if argument != "--compiled":
            check(int(argument), compiled="--compiled" in sys.argv)
            print(argument, "passed")
