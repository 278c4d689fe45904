"""pack_checkpoints: whatever turned checkpoints on, their inputs are packed in eager mode

The oracle is the same run without it: the loss has its bits, and so has every gradient that reads
nothing that is packed.
"""

import copy
import gc
import pickle
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import REENTRANT, ROWS, WIDTH, Block, Net, batch, error, net, step
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from dropit_fx import ConfigError, measure, pack_checkpoints, pack_saved


@REENTRANT
def test_inputs_of_checkpoints_are_packed_and_the_forward_keeps_its_bits(
    use_reentrant: bool,
) -> None:
    model, x = net(use_reentrant=use_reentrant), batch()
    loss, grads = step(model, x)
    dense = measure.saved_bytes(model, x)
    packed = pack_checkpoints(model, bits=8)
    assert step(model, x)[0] == loss
    assert 0 < error(step(model, x)[1], grads) < 0.02
    report = packed.report()
    assert [row.op for row in report.rows] == ["checkpoint"] * 3
    assert report.dense_bytes == 3 * ROWS * WIDTH * 4
    assert report.ratio < 0.26
    assert dense - measure.saved_bytes(model, x) == report.dense_bytes - report.kept_bytes
    packed.remove()
    assert measure.saved_bytes(model, x) == dense
    again = step(model, x)
    assert again[0] == loss
    assert error(again[1], grads) == 0


def test_gradients_in_front_of_no_packed_input_are_exact() -> None:
    """Of the head, which is behind all regions, and of the last bias that a region adds."""
    model, x = net(), batch()
    grads = step(model, x)[1]
    pack_checkpoints(model, bits=4)
    found = step(model, x)[1]
    for name in ("head.weight", "head.bias"):
        assert torch.equal(found[name], grads[name]), name
    assert not torch.equal(found["blocks.0.up.weight"], grads["blocks.0.up.weight"])


def test_the_error_falls_with_the_bits() -> None:
    model, x = net(), batch()
    grads = step(model, x)[1]
    errors = []
    for bits in (3, 4, 6, 8):
        packed = pack_checkpoints(model, bits=bits)
        errors.append(error(step(model, x)[1], grads))
        packed.remove()
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01


@REENTRANT
def test_what_several_regions_read_is_kept_once(use_reentrant: bool) -> None:
    """A table of constants stays exact, a mask and an activation are packed once."""
    table = torch.randn(ROWS, WIDTH)
    mask = torch.rand(ROWS, WIDTH) > 0.5

    class Shared(Net):
        def forward(self, x: Tensor) -> Tensor:
            side = self.stem(x).tanh()
            return super().forward(x, table * 1, mask.clone(), side, side[:, :32].repeat(1, 2))

    torch.manual_seed(0)
    model, x = Shared(use_reentrant=use_reentrant), batch()
    loss, grads = step(model, x)
    packed = pack_checkpoints(model, bits=8)
    found = step(model, x)
    assert found[0] == loss
    assert error(found[1], grads) < 0.02
    rows = packed.report().rows
    size = ROWS * WIDTH * 4
    kept = {row.codec: row for row in rows if row.op == "checkpoint" and row.dense_bytes != size}
    assert kept["bitmask(bits=1)"].dense_bytes == 8 * kept["bitmask(bits=1)"].kept_bytes
    (constant,) = [row for row in rows if "no gradient flows" in row.reason]
    assert constant.kept_bytes == size
    assert len([row for row in rows if row.codec == "quant(bits=8)"]) == 3 + 2


def test_keyword_arguments_and_tuples_are_handed_on() -> None:
    model, x = net(), batch()
    side = torch.randn(ROWS, WIDTH)
    loss, grads = step(model, x, (side, "a word"), 2.0, scale=0.5)
    pack_checkpoints(model, bits=8)
    found = step(model, x, (side, "a word"), 2.0, scale=0.5)
    assert found[0] == loss
    assert error(found[1], grads) < 0.02


@pytest.mark.parametrize("inner", [False, True], ids=["plain", "reentrant"])
@REENTRANT
def test_checkpoints_in_a_checkpoint_are_left_to_it(use_reentrant: bool, inner: bool) -> None:
    class Nested(Net):
        def forward(self, x: Tensor) -> Tensor:
            def pair(x: Tensor) -> Tensor:
                for block in self.blocks[:2]:
                    x = checkpoint(block, x, use_reentrant=inner)
                return x

            x = checkpoint(pair, self.stem(x), use_reentrant=use_reentrant)
            return self.head(self.blocks[2](x)).square().mean()

    torch.manual_seed(0)
    model, x = Nested(), batch()
    loss, grads = step(model, x)
    packed = pack_checkpoints(model, bits=8)
    found = step(model, x)
    assert found[0] == loss
    assert error(found[1], grads) < 0.02
    assert len(packed.report().rows) == 1


def test_a_model_without_checkpoints_is_told_how_to_turn_them_on() -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 1))
    packed = pack_checkpoints(model)
    with torch.no_grad():
        model(batch())
    model.eval()(batch())
    for way in ("gradient_checkpointing_enable", "checkpoint_wrapper", "pack_saved", "backend="):
        with pytest.raises(RuntimeError, match=way):
            model.train()(batch())
    packed.remove()
    model(batch()).sum().backward()


def test_a_second_call_takes_the_place_of_the_first() -> None:
    """That of a copy undoes what the copy took along."""
    model, x = net(), batch()
    grads = step(model, x)[1]
    first = pack_checkpoints(model, bits=2)
    second = pack_checkpoints(model, bits=8)
    first.remove()
    assert 0 < error(step(model, x)[1], grads) < 0.02
    assert {row.codec for row in second.report().rows} == {"quant(bits=8)"}
    other = copy.deepcopy(model)
    pack_checkpoints(other).remove()
    assert error(step(other, x)[1], grads) == 0
    second.remove()
    second.remove()
    assert error(step(model, x)[1], grads) == 0


@pytest.mark.parametrize("bits", [0, 9, 2.5, True, "4", None])
def test_bits_that_no_value_has_are_an_error(bits: Any) -> None:
    with pytest.raises(ConfigError, match="must be 1 to 8"):
        pack_checkpoints(net(), bits=bits)
    with pytest.raises(ConfigError, match="must be 1 to 8"):
        pack_saved(bits=bits)


def test_only_the_model_that_is_packed_is_packed() -> None:
    model, other, x = net(), net(), batch()
    grads = step(other, x)[1]
    pack_checkpoints(model, bits=4)
    assert error(step(other, x)[1], grads) == 0
    assert error(step(model, x)[1], grads) > 0
    assert error(step(other, x)[1], grads) == 0


def test_an_error_in_the_forward_leaves_nothing_behind() -> None:
    model, x = net(), batch()
    other = net()
    grads = step(other, x)[1]
    pack_checkpoints(model, bits=4)
    for kind in (ValueError, KeyboardInterrupt):

        def fail(*args: Any, kind: type[BaseException] = kind) -> None:
            raise kind

        handle = model.blocks[1].register_forward_hook(fail)
        with pytest.raises(kind):
            model(x)
        handle.remove()
        assert error(step(other, x)[1], grads) == 0
    assert step(model, x)[0] == step(other, x)[0]


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_and_pickles_of_the_model_pack_as_well(how: str, tmp_path: Path) -> None:
    model, x = net(), batch()
    packed = pack_checkpoints(model, bits=4)
    found = step(model, x)
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        torch.save(model, tmp_path / "model.pt")
        other = torch.load(tmp_path / "model.pt", weights_only=False)
    assert other.state_dict().keys() == net().state_dict().keys()
    assert error(step(other, x)[1], found[1]) == 0
    packed.remove()  # of the model, not of its copy
    assert error(step(other, x)[1], found[1]) == 0
    assert error(step(model, x)[1], found[1]) > 0


def test_packed_copies_are_freed_with_the_graph() -> None:
    model, x = net(), batch()
    pack_checkpoints(model)
    step(model, x)
    held: list[weakref.ref[Tensor]] = []

    def note(t: Tensor) -> Tensor:
        t = t.detach()  # a result that holds its graph would never be freed
        held.append(weakref.ref(t))
        return t

    with saved_tensors_hooks(note, lambda t: t):
        loss = model(x)

    def alive() -> int:
        tensors = [t for t in (ref() for ref in held) if t is not None]
        return len([t for t in tensors if t.dtype == torch.uint8 and t.numel()])

    assert alive() == 3
    del loss
    gc.collect()
    assert alive() == 0


def test_a_graph_goes_backward_twice() -> None:
    model, x = net(), batch()
    pack_checkpoints(model, bits=4)
    loss = model(x)
    params = list(model.parameters())
    first = torch.autograd.grad(loss, params, retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, params)))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(loss, params)


def test_second_derivatives_are_refused() -> None:
    model, x = net(), batch().requires_grad_()
    pack_checkpoints(model)
    with pytest.raises(RuntimeError, match="second derivatives through packed tensors"):
        torch.autograd.grad(model(x), x, create_graph=True)


@REENTRANT
def test_autocast_and_dropout_are_made_again_as_they_were(use_reentrant: bool) -> None:
    """At a format of eight bits the gradients could not be near if masks or dtypes differed."""
    model, x = net(use_reentrant=use_reentrant), batch()
    with torch.autocast("cpu"):
        loss, grads = step(model, x)
        pack_checkpoints(model, bits=8)
        found = step(model, x)
    assert found[0] == loss
    assert error(found[1], grads) < 0.03


def test_checkpoint_wrapper_and_compiled_blocks_inside_of_checkpoints() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    torch.manual_seed(0)
    wrapped = [checkpoint_wrapper(Block()) for _ in range(2)]
    model = nn.Sequential(nn.Linear(16, WIDTH), *wrapped, nn.Linear(WIDTH, 1), nn.Flatten(0))
    x = batch()
    packed = pack_checkpoints(model, bits=6)
    model(x).sum().backward()
    assert len(packed.report().rows) == 2
    compiled = net()
    for block in compiled.blocks:
        block.compile(backend="aot_eager")
    loss, grads = step(compiled, x)
    packed = pack_checkpoints(compiled, bits=8)
    found = step(compiled, x)
    assert found[0] == loss
    assert error(found[1], grads) < 0.02
    assert packed.report().ratio < 0.27


def test_other_hooks_around_are_handed_what_is_packed() -> None:
    model, x = net(), batch()
    pack_checkpoints(model, bits=4)
    wanted = step(model, x)
    with save_on_cpu():
        found = step(model, x)
    assert found[0] == wanted[0]
    assert error(found[1], wanted[1]) == 0


def test_threads_pack_for_themselves() -> None:
    model, other, x = net(), net(), batch()
    pack_checkpoints(model, bits=4)
    wanted = {m: step(m, x)[1]["blocks.0.up.weight"] for m in (model, other)}
    wrong: list[str] = []

    def train(m: Net) -> None:
        m = copy.deepcopy(m)
        for _ in range(5):
            m.zero_grad()
            m(x).backward()
        wrong.extend(n for n, p in m.named_parameters() if p.grad is None)

    threads = [threading.Thread(target=train, args=(m,)) for m in (model, other) * 2]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    for m in (model, other):
        assert torch.equal(step(m, x)[1]["blocks.0.up.weight"], wanted[m])


def test_a_model_that_is_compiled_around_its_checkpoints_is_an_error() -> None:
    model, x = net(), batch()
    packed = pack_checkpoints(model)
    with pytest.raises(RuntimeError, match=r'torch.compile\(model, backend="dropit"\)'):
        torch.compile(model, backend="aot_eager")(x)
    model(x).backward()
    assert len(packed.report().rows) == 3


def test_a_model_whose_forward_is_called_and_not_the_model() -> None:
    """As wrappers do that hand on to what they wrap: no hook of the model runs then."""

    class Wrapper(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = net()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner.forward(x)

    model, x = Wrapper(), batch()
    grads = step(model, x)[1]
    packed = pack_checkpoints(model.inner, bits=8)
    for _ in range(2):
        assert 0 < error(step(model, x)[1], grads) < 0.02
    assert len(packed.report().rows) == 3
    packed.remove()
    assert error(step(model, x)[1], grads) == 0


# Models of other libraries ------------------------------------------------------------------------


@REENTRANT
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_twelve_layers_of_gpt2(dtype: torch.dtype, use_reentrant: bool) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 96, "n_layer": 12, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
    model = transformers.GPT2LMHeadModel(config).to(dtype).train()
    how = {"use_reentrant": use_reentrant}
    model.activation_checkpointing_enable(activation_checkpointing_kwargs=how)
    ids = torch.arange(128).view(2, 64) % 64

    def loss(**given: Tensor) -> Tensor:
        return model(input_ids=given["ids"], labels=given["ids"]).loss

    model_and_loss = nn.Module()
    model_and_loss.model, model_and_loss.forward = model, loss
    exact, grads = step(model_and_loss, ids=ids)
    dense = measure.saved_bytes(loss, ids=ids)
    packed = pack_checkpoints(model, bits=6)
    found = step(model_and_loss, ids=ids)
    assert found[0] == exact
    assert 0 < error(found[1], grads) < 0.05
    report = packed.report()
    boundary = [row for row in report.rows if row.op == "checkpoint"]
    assert sum(row.dense_bytes for row in boundary) == 12 * 2 * 64 * 96 * dtype.itemsize
    assert report.ratio <= (0.21 if dtype == torch.float32 else 0.38)
    kept = measure.saved_bytes(loss, ids=ids)
    assert dense - kept == report.dense_bytes - report.kept_bytes


def test_llama_whose_layers_share_position_tables() -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads)).train()
    model.activation_checkpointing_enable()
    ids = torch.arange(128).view(2, 64) % 64
    exact, grads = model(input_ids=ids, labels=ids).loss, {}
    exact.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    packed = pack_checkpoints(model, bits=8)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == exact.item()
    assert error({n: p.grad for n, p in model.named_parameters()}, grads) < 0.02
    assert packed.report().ratio < 0.27


def test_timm_and_diffusers() -> None:
    timm, diffusers = pytest.importorskip("timm"), pytest.importorskip("diffusers")
    torch.manual_seed(0)
    vit = timm.create_model("deit_tiny_patch16_224", img_size=64, depth=3, num_classes=4)
    vit.set_grad_checkpointing()
    unet = diffusers.UNet2DModel(
        sample_size=16,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )
    unet.enable_gradient_checkpointing()
    noisy, steps = torch.randn(2, 3, 16, 16), torch.arange(2)
    for model, run in (
        (vit.train(), lambda: vit(torch.ones(2, 3, 64, 64).cumsum(-1) / 64).square().mean()),
        (unet.train(), lambda: unet(noisy, steps).sample.square().mean()),
    ):
        grads = dict.fromkeys(["exact", "found"])
        for name in grads:
            if name == "found":
                packed = pack_checkpoints(model, bits=8)
            model.zero_grad()
            run().backward()
            grads[name] = {n: p.grad.clone() for n, p in model.named_parameters()}
        assert error(grads["found"], grads["exact"]) < 0.05
        report = packed.report()
        assert len(report.rows) >= 3
        assert report.ratio < 0.3


def test_a_model_inside_of_peft() -> None:
    transformers, peft = pytest.importorskip("transformers"), pytest.importorskip("peft")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 64}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, use_cache=False)
    base = transformers.GPT2LMHeadModel(config).train()
    base.activation_checkpointing_enable()
    packed = pack_checkpoints(base, bits=8)
    lora = peft.LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(base, lora)
    ids = torch.arange(128).view(2, 64) % 64
    for _ in range(2):
        model(input_ids=ids, labels=ids).loss.backward()
    rows = packed.report().rows
    assert [row.codec for row in rows if row.op == "checkpoint"] == ["quant(bits=8)"] * 3
