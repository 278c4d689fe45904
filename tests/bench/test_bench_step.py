"""The step benchmark, and the published algorithm that it measures against."""

import copy
import json

import pytest
import torch
from torch import nn

from dropit_fx import measure
from dropit_fx.bench.published import scatter, select, to_published
from dropit_fx.bench.step import bench_step


def test_the_published_selection_keeps_the_largest_of_the_whole_tensor():
    x = torch.randn(7, 30)
    values, index = select(x, 0.9)
    assert index.dtype == torch.int32
    assert values.numel() == int(x.numel() * (1 - 0.9))
    kept = scatter(values, index, x.shape)
    smallest_kept = kept[kept != 0].abs().min()
    assert x[kept == 0].abs().max() <= smallest_kept
    assert torch.equal(kept[kept != 0], x[kept != 0])


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Linear(12, 5), torch.randn(4, 3, 12)),
        (nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.randn(2, 3, 6, 6)),
    ],
    ids=["linear", "conv2d"],
)
def test_the_published_layers_have_exact_dx_and_the_dropped_inputs_dw(layer, x):
    published = to_published(nn.Sequential(copy.deepcopy(layer)), 0.5)
    dense, packed = x.clone().requires_grad_(), x.clone().requires_grad_()
    out = layer(dense)
    out.square().sum().backward()
    published(packed).square().sum().backward()
    torch.testing.assert_close(packed.grad, dense.grad)

    dropped = scatter(*select(x, 0.5), x.shape)
    again = copy.deepcopy(layer)
    again.zero_grad()
    torch.autograd.backward(again(dropped), 2 * out.detach())
    torch.testing.assert_close(published[0].weight.grad, again.weight.grad)


def test_the_published_format_takes_eight_bytes_a_kept_float():
    model = to_published(nn.Sequential(nn.Linear(100, 10), nn.Linear(10, 2)), 0.9)
    x = torch.randn(50, 100)
    kept = int(5000 * (1 - 0.9)) + int(500 * (1 - 0.9))
    assert measure.saved_bytes(model, x) == 8 * kept


def test_bench_step_times_every_variant_and_writes_what_it_printed(tmp_path, capsys):
    path = tmp_path / "step.json"
    result = bench_step("timm:resnet10t", 2, 32, rounds=2, compiled=False, json_path=str(path))
    assert list(result) == [f"eager, {v}" for v in ("dense", "balanced", "dropit", "published")]
    assert json.loads(path.read_text())["variants"] == result
    assert result["eager, dense"]["ratio"] == 1
    shares = [result[f"eager, {v}"]["saved_ratio"] for v in ("balanced", "dropit", "published")]
    assert shares == sorted(shares)
    assert all(row["peak_bytes"] > row["gradients_bytes"] > 0 for row in result.values())
    for row in result.values():  # SGD with momentum; buffers are no parameters
        assert row["gradients_bytes"] == row["optimizer_bytes"] < row["parameters_bytes"]
        apart = row["parameters_bytes"] + row["optimizer_bytes"]
        assert row["whole_bytes"] == row["peak_bytes"] + apart
    assert result["eager, balanced"]["whole_ratio"] < 1
    assert "eager, published" in capsys.readouterr().out
