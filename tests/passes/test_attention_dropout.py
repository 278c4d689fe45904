"""Attention with dropout is packed: its mask in one bit, the draws and the bits of dense"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import dropit_fx
from dropit_fx import measure
from dropit_fx.compile.backend import compiled_graphs
from dropit_fx.ops.masks import drop, dropped_again

BATCH, TOKENS, WORDS = 2, 64, 100


class Encoder(nn.Module):
    """An encoder of text, and a loss of what it says of each token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.model(input_ids=ids).last_hidden_state
        return out.square().mean()


class Translator(Encoder):
    """The same of an encoder with its decoder."""

    def forward(self, ids: Tensor) -> Tensor:
        out = self.model(input_ids=ids, decoder_input_ids=ids, use_cache=False)
        loss: Tensor = out.last_hidden_state.square().mean()
        return loss


def gpt2(**how: Any) -> nn.Module:
    sizes = {"n_positions": TOKENS, "n_embd": 64, "n_layer": 1, "n_head": 4}
    config = transformers.GPT2Config(vocab_size=WORDS, use_cache=False, **sizes, **how)
    return Encoder(transformers.GPT2Model(config))


def t5(**how: Any) -> nn.Module:
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4}
    return Translator(transformers.T5Model(transformers.T5Config(vocab_size=WORDS, **sizes, **how)))


def bert(heads: int = 4, **how: Any) -> nn.Module:
    sizes = {"hidden_size": 96, "num_hidden_layers": 1, "intermediate_size": 384}
    config = transformers.BertConfig(vocab_size=WORDS, num_attention_heads=heads, **sizes, **how)
    return Encoder(transformers.BertModel(config, add_pooling_layer=False))


OFF = {  # the dropouts of each, which are on by default
    gpt2: ("attn_pdrop", "resid_pdrop", "embd_pdrop"),
    t5: ("dropout_rate",),
    bert: ("hidden_dropout_prob", "attention_probs_dropout_prob"),
}
MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "gpt2": (gpt2, {}),
    "t5": (t5, {}),
    "bert": (bert, {}),
    "minilm": (bert, {"heads": 12}),  # twelve narrow heads: the most masks beside its activations
}
every_model = pytest.mark.parametrize("name", MODELS)
both_spellings = pytest.mark.parametrize("spelling", ["sdpa", "eager"])


def built(name: str, spelling: str, drops: bool = True) -> nn.Module:
    torch.manual_seed(0)
    build, how = MODELS[name]
    off = {} if drops else dict.fromkeys(OFF[build], 0.0)
    return build(attn_implementation=spelling, **how, **off).train()


def ids() -> Tensor:
    return torch.randint(WORDS, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))


def packed(model: nn.Module, preset: str) -> Any:
    torch._dynamo.reset()
    return torch.compile(model, backend="dropit_eager", options={"preset": preset})


def step(function: Any, model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output, gradients, and the next random number behind a step."""
    model.zero_grad()
    torch.manual_seed(5)
    out = function(*inputs)
    out.square().sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [out.detach(), *grads, torch.rand(1)]


@both_spellings
@every_model
def test_default_dropout_takes_little_more_than_none(name: str, spelling: str) -> None:
    without = measure.saved_bytes(packed(built(name, spelling, drops=False), "balanced"), ids())
    found = measure.saved_bytes(packed(built(name, spelling), "balanced"), ids())
    assert found <= 1.3 * without


@both_spellings
@every_model
def test_lossless_steps_have_the_bits_and_the_draws_of_dense(name: str, spelling: str) -> None:
    model = built(name, spelling)
    ours = packed(copied := copy.deepcopy(model), "lossless")
    expected, found = step(model, model, ids()), step(ours, copied, ids())
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert measure.saved_bytes(ours, ids()) < measure.saved_bytes(model, ids())


class Attention(nn.Module):
    """Causal attention of four heads over 32 channels, in training with dropout."""

    def __init__(self, spelled: Callable[[Tensor, Tensor, Tensor, float], Tensor]) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.spelled = spelled

    def forward(self, x: Tensor) -> Tensor:
        heads = [f(x).unflatten(2, (4, 8)).transpose(1, 2) for f in (self.q, self.k, self.v)]
        out = self.spelled(*heads, 0.15 if self.training else 0.0)
        return F.dropout(self.o(out.transpose(1, 2).flatten(2)), 0.1, self.training)


def fused(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)


def spelled_out(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    weights = (q @ k.transpose(-1, -2)).softmax(-1)
    return F.dropout(weights, p) @ v


def with_scores_capped(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    window = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril().triu(-4)
    scores = 5 * torch.tanh(q @ k.transpose(-1, -2) / 5)
    weights = scores.masked_fill(~window, -torch.inf).softmax(-1)
    return F.dropout(weights, p) @ v


every_spelling = pytest.mark.parametrize("spelled", [fused, spelled_out, with_scores_capped])


@every_spelling
@pytest.mark.parametrize("preset", ["lossless", "balanced"])
def test_transform_draws_as_dense_and_says_what_is_measured(spelled: Any, preset: str) -> None:
    model, x = Attention(spelled).train(), torch.randn(4, 64, 32)
    ours = dropit_fx.transform(copied := copy.deepcopy(model), preset=preset, example_args=(x,))
    expected, found = step(model, model, x), step(ours, copied, x)
    if preset == "balanced":  # whose gradients are rounded
        expected, found = [expected[0], expected[-1]], [found[0], found[-1]]
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    report = dropit_fx.report(ours)
    assert measure.saved_bytes(ours, x) == report.kept_bytes
    # spelled out, lossless keeps one copy of the weights: what dropout makes of them is repeated
    assert report.ratio < (0.15 if preset == "balanced" else 0.3 if spelled is fused else 0.6)


@pytest.mark.parametrize("inner", ["aot_eager", "aot_eager_decomp_partition"])
def test_compiled_it_draws_as_the_dense_model_does(inner: str) -> None:
    model, x = Attention(fused).train(), torch.randn(4, 64, 32)
    torch._dynamo.reset()
    theirs = torch.compile(copied := copy.deepcopy(model), backend=inner)
    options = {"preset": "balanced", "inner": inner}
    ours = torch.compile(model, backend="dropit", options=options)
    expected, found = step(theirs, copied, x), step(ours, model, x)
    torch.testing.assert_close([found[0], found[-1]], [expected[0], expected[-1]], rtol=0, atol=0)
    assert measure.saved_bytes(ours, x) < 0.15 * measure.saved_bytes(theirs, x)


def test_in_eval_mode_nothing_is_dropped() -> None:
    model, x = Attention(fused).train(), torch.randn(4, 64, 32)
    ours = dropit_fx.transform(copied := copy.deepcopy(model), example_args=(x,))
    expected, found = step(model.eval(), model, x), step(ours.eval(), copied, x)
    torch.testing.assert_close(found[0], expected[0], rtol=0, atol=0)


def test_what_dropout_gave_is_made_again_of_its_mask() -> None:
    x = torch.randn(64, 32)
    layers = nn.Linear(32, 64), nn.GELU(), nn.Dropout(0.15), nn.Linear(64, 32)
    model = nn.Sequential(*layers).train()
    ours = dropit_fx.transform(copied := copy.deepcopy(model), example_args=(x,))
    rows = [r for r in dropit_fx.report(ours).rows if r.codec == "derived"]
    assert [(r.op, r.kept_bytes) for r in rows] == [("linear", 0)]
    expected, found = step(model, model, x)[3], step(ours, copied, x)[3]  # of the second weight
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()  # another mask: about as large


def test_lossless_repeats_what_dropout_gave_of_what_stays() -> None:
    """The weights, which softmax keeps, and not what a layer gave, which nothing does."""
    model, x = Attention(spelled_out).train(), torch.randn(4, 64, 32)
    rows = dropit_fx.report(dropit_fx.transform(model, preset="lossless", example_args=(x,))).rows
    repeated = [r for r in rows if r.codec == "derived"]
    assert [(r.name, r.op, r.kept_bytes) for r in repeated] == [("dropout", "matmul", 0)]
    assert repeated[0].dense_bytes == 4 * 4 * 64 * 64 * 4
    config = {"preset": "lossless", "derive": False}
    rows = dropit_fx.report(dropit_fx.transform(model, config, example_args=(x,))).rows
    assert not [r for r in rows if r.codec == "derived"]
    layers = nn.Linear(32, 32), nn.Dropout(0.1), nn.Linear(32, 32)
    packed = dropit_fx.transform(nn.Sequential(*layers), preset="lossless", example_args=(x,))
    assert not [r for r in dropit_fx.report(packed).rows if r.codec == "derived"]


@pytest.mark.parametrize("p", [0.1, 0.15, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_dropout_is_repeated_to_the_bit(p: float, dtype: torch.dtype) -> None:
    x = torch.randn(4096, generator=torch.Generator().manual_seed(2)).to(dtype)
    torch.manual_seed(3)
    given, mask = drop(x, p)
    assert torch.equal(dropped_again(x, mask, p), given)


HEADS, WIDE = 4, 8


def distances(q: Tensor, k: Tensor) -> Tensor:
    to, at = torch.arange(k.shape[2]), torch.arange(q.shape[2])
    return to[None, :] - at[:, None]


def alibi(q: Tensor, k: Tensor) -> Tensor:
    return -distances(q, k).abs() * torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]


def padding(q: Tensor, k: Tensor) -> Tensor:
    return (torch.arange(k.shape[2]) < k.shape[2] - 7).expand(q.shape[0], 1, 1, -1)


def repeated(x: Tensor) -> Tensor:
    """The two heads of keys or values for four of queries, as Hugging Face's ``repeat_kv``."""
    few = x[:, :2, None].expand(-1, -1, 2, -1, -1)
    return few.reshape(x.shape[0], HEADS, x.shape[2], WIDE)


def written_out(
    masks: Callable[[Tensor, Tensor, Tensor], Tensor], upcast: bool = False
) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    """Attention op by op; ``masks`` makes what softmax reads of scores, queries and keys."""

    def spelled(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        scores = masks(q @ k.transpose(-1, -2) / WIDE**0.5, q, k)
        dtype = torch.float32 if upcast else None
        return F.dropout(scores.softmax(-1, dtype=dtype).to(q.dtype), p) @ v

    return spelled


def asked(
    mask: Callable[[Tensor, Tensor], Tensor] | None = None, **how: Any
) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    def spelled(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
        given = None if mask is None else mask(q, k)
        return F.scaled_dot_product_attention(q, k, v, given, dropout_p=p, **how)

    return spelled


def by_einsum(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    weights = torch.einsum("bhqd,bhkd->bhqk", q, k).div(WIDE**0.5).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", F.dropout(weights, p), v)


def by_bmm(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """As Bloom's: the bias of each head is what the products are added to."""
    bias, k = alibi(q, k).repeat(q.shape[0], 1, 1), k.flatten(0, 1).transpose(1, 2)
    scores = torch.baddbmm(bias, q.flatten(0, 1), k, alpha=WIDE**-0.5)
    weights = F.dropout(scores.softmax(-1), p)
    return torch.bmm(weights, v.flatten(0, 1)).unflatten(0, (-1, HEADS))


LOW = torch.finfo(torch.float32).min
# each with what lossless and balanced keep of dense, at most
TABLE: dict[str, tuple[Callable[[Tensor, Tensor, Tensor, float], Tensor], float, float]] = {
    "grouped heads": (
        lambda q, k, v, p: F.scaled_dot_product_attention(
            q, k[:, :2], v[:, :2], dropout_p=p, is_causal=True, enable_gqa=True
        ),
        *(0.2, 0.05),
    ),
    "repeated heads": (
        lambda q, k, v, p: asked(is_causal=True)(q, repeated(k), repeated(v), p),
        *(0.2, 0.05),
    ),
    "window": (asked(lambda q, k: distances(q, k).abs() < 5), 0.2, 0.05),
    "padding": (asked(padding), 0.2, 0.05),
    "bias": (asked(alibi), 0.3, 0.12),  # which stays whole: dense attention keeps none of it
    "added": (written_out(lambda s, q, k: s + (distances(q, k) > 0) * LOW), 0.6, 0.12),
    "filled, upcast": (
        written_out(lambda s, q, k: s.masked_fill(~padding(q, k), LOW), upcast=True),
        *(0.6, 0.12),
    ),
    "where": (written_out(lambda s, q, k: torch.where(distances(q, k) <= 0, s, LOW)), 0.6, 0.12),
    "bias added": (written_out(lambda s, q, k: s + alibi(q, k)), 0.6, 0.12),
    "capped": (written_out(lambda s, q, k: 5 * torch.tanh(s / 5)), 0.6, 0.12),
    "einsum": (by_einsum, 0.6, 0.12),
    "bmm": (by_bmm, 0.6, 0.12),
}


@pytest.mark.parametrize("spelling", TABLE)
def test_weights_are_kept_in_bits_in_every_spelling(spelling: str) -> None:
    spelled, *limits = TABLE[spelling]
    torch.manual_seed(0)
    model, x = Attention(spelled).train(), torch.randn(4, 64, 32)
    expected = step(model, model, x)
    for preset, limit in zip(("lossless", "balanced"), limits, strict=True):
        ours = packed(model, preset)
        found = step(ours, model, x)
        exact = slice(None) if preset == "lossless" else slice(0, 1)
        torch.testing.assert_close(found[exact], expected[exact], rtol=0, atol=0)
        assert torch.equal(found[-1], expected[-1])
        report = compiled_graphs()[-1].report
        assert report.kept_bytes == measure.saved_bytes(ours, x)
        assert report.ratio <= limit, str(report)
    weights = 4 * 4 * 64 * 64
    whole = [r for r in report.rows if r.kept_bytes >= 4 * weights]
    assert not whole, str(report)


class Attends(nn.Module):
    """PyTorch's own module, twice; ``how``: what it is asked for."""

    def __init__(self, how: str, batch_first: bool = True) -> None:
        super().__init__()
        self.how = how
        made = {"dropout": 0.2, "batch_first": batch_first}
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 8)
        self.one, self.two = (nn.MultiheadAttention(64, 4, **made) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        h, asked = self.first(x), {"need_weights": self.how in ("weights", "each head")}
        if self.how == "each head":
            asked["average_attn_weights"] = False
        if self.how == "masked":
            asked["attn_mask"] = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        h, weights = self.one(h, h, h, **asked)
        other = self.one if self.how == "again" else self.two
        return self.last(other(h, h, h, need_weights=False)[0]), weights


def stepped(model: nn.Module, x: Tensor) -> list[Tensor | None]:
    """Outputs and gradients, by the names of parameters."""
    model.zero_grad()
    torch.manual_seed(5)
    outs = [t for t in model(x) if t is not None]
    sum((t * t).sum() for t in outs).backward()
    return [*outs, *(p.grad for _, p in sorted(model.named_parameters()))]


def alike(ours: nn.Module, theirs: nn.Module, x: Tensor) -> bool:
    found = zip(stepped(ours, x), stepped(theirs, x), strict=True)
    return all(torch.equal(a, b) for a, b in found if a is not None)


HOWS = [(h, True) for h in ("plain", "weights", "each head", "masked", "again")]


@pytest.mark.parametrize(("how", "batch_first"), [*HOWS, ("plain", False)])
def test_attention_modules_are_opened_and_keep_their_modes(how: str, batch_first: bool) -> None:
    torch.manual_seed(0)
    model, x = Attends(how, batch_first), torch.randn(4, 32, 64)
    packed = dropit_fx.transform(model, preset="lossless", example_args=(x,))
    assert measure.saved_bytes(packed, x) == dropit_fx.report(packed).kept_bytes
    for run in (packed, copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
        assert alike(run, model, x)
    packed.one.eval()
    assert model.one.training
    model.one.eval()
    assert alike(packed, model, x)
    packed.eval()
    assert alike(packed, model.eval(), x)
    assert alike(packed.train(), model.train(), x)
    small = dropit_fx.transform(model, example_args=(x,))
    needs = how in ("weights", "each head")  # what is returned stays
    assert dropit_fx.report(small).ratio < (0.25 if needs else 0.1)
