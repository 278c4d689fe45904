"""The report: its rows, totals, text, JSON and picture."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import dropit_fx
from dropit_fx import measure
from dropit_fx.report.plot import report_picture
from dropit_fx.report.rows import Report, Row


class Shared(nn.Module):
    """q and k read one x; a tanh, for which there is no row."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 64)
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sin(self.first(x))
        return torch.tanh(self.q(x) + self.k(x))


@pytest.fixture
def rewritten() -> nn.Module:
    return dropit_fx.transform(Shared(), preset="dropit", example_args=(torch.randn(128, 32),))


@pytest.fixture
def report(rewritten: nn.Module) -> Report:
    return dropit_fx.report(rewritten)


def row(report: Report, op: str) -> Row:
    return next(r for r in report.rows if r.op == op)


def test_totals_are_what_is_measured(rewritten: nn.Module, report: Report) -> None:
    x = torch.randn(128, 32)
    assert report.dense_bytes == measure.saved_bytes(Shared(), x)
    assert report.kept_bytes == measure.saved_bytes(rewritten, x)
    assert report.kept_bytes < report.dense_bytes


def test_a_packed_row_names_its_reader_codec_and_line(report: Report) -> None:
    packed = row(report, "linear")
    assert packed.module == "q"
    assert packed.codec == "mink(gamma=0.9)"
    assert packed.where.endswith(f"test_report.py:{_line_of('self.q(x)')}")
    assert packed.reason == ""
    assert packed.shape == (128, 64)
    assert packed.kept_bytes < packed.dense_bytes / 4


def test_a_kept_row_has_a_reason(report: Report) -> None:
    kept = [r for r in report.rows if r.codec == "keep"]
    assert kept
    assert all(r.reason and r.kept_bytes == r.dense_bytes for r in kept)


def test_text_has_one_line_for_each_tensor_and_totals(report: Report) -> None:
    lines = str(report).splitlines()
    assert len(lines) == 1 + len(report.rows) + 1
    assert "mink(gamma=0.9)" in lines[1 + report.rows.index(row(report, "linear"))]
    assert lines[-1].startswith("total")
    assert lines[-1].endswith(f"{report.kept_bytes / report.dense_bytes:.1%} of dense")


def test_reasons_with_brackets_are_printed_whole() -> None:
    made = Row(
        name="x",
        module="",
        op="linear",
        where="",
        shape=(4,),
        dtype="float32",
        dense_bytes=16,
        kept_bytes=16,
        codec="keep",
        reason="the config says so: {module: [head, head.*], codec: keep}",
    )
    assert "{module: [head, head.*], codec: keep}" in str(Report((made,)))


def test_summary_adds_up(report: Report) -> None:
    table = report.summary_table()
    tensors = list(table.columns[1].cells)
    assert sum(map(int, tensors[:-1])) == int(tensors[-1]) == len(report.rows)
    assert report.summary().splitlines()[-1].split()[:2] == ["total", str(len(report.rows))]


def test_json_holds_rows_and_totals(report: Report) -> None:
    data = json.loads(report.to_json())
    assert data == json.loads(json.dumps(report.to_dict()))
    assert data["ratio"] == report.kept_bytes / report.dense_bytes
    assert sum(r["dense_bytes"] for r in data["rows"]) == data["dense_bytes"]


def test_records_and_notebooks(report: Report) -> None:
    records = report.records()
    assert [r["kept_bytes"] for r in records] == [r.kept_bytes for r in report.rows]
    page = report._repr_html_()
    assert page.startswith("<pre")
    assert "mink(gamma=0.9)" in page
    assert f"{report.ratio:.1%} of dense" in page


def test_what_a_rewritten_model_does_not_have_is_said(rewritten: nn.Module) -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'no_weight_decay'.*ask the original"):
        rewritten.no_weight_decay()
    assert not hasattr(rewritten, "num_classes")


def test_a_model_that_was_not_rewritten_has_no_report() -> None:
    with pytest.raises(ValueError, match=r"Shared was not rewritten by dropit_fx\.transform"):
        dropit_fx.report(Shared())


class Broken(nn.Module):
    """Two blocks of one class, and a place at which Dynamo cuts the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Shared() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.blocks[0](x)[:, :32]
        torch._dynamo.graph_break()
        return self.blocks[1](x * 2)


def test_a_compiled_model_is_reported_once_it_has_run() -> None:
    model = Broken()
    fast = torch.compile(model, backend="dropit_eager")
    with pytest.raises(ValueError, match=r"Broken was not rewritten.* when a step first runs"):
        dropit_fx.report(fast)
    fast(torch.randn(64, 32)).sum().backward()
    first = dropit_fx.report(fast)
    x = torch.randn(128, 32)
    fast(x).sum().backward()  # of another size: all is compiled again
    found = dropit_fx.report(fast)
    assert found.kept_bytes == measure.saved_bytes(fast, x) < found.dense_bytes
    assert found.dense_bytes == measure.saved_bytes(model, x)
    assert len(found.rows) == len(first.rows)
    with pytest.raises(ValueError, match=r"was not rewritten by dropit_fx\.transform$"):
        dropit_fx.report(model)


def test_a_compiled_model_that_is_rewritten_is_reported() -> None:
    """Its graph has a part with the name under which ``torch.compile``'s wrapper has the model."""
    model, x = Shared(), torch.randn(64, 32)
    rewritten = dropit_fx.transform(torch.compile(model, backend="eager"), example_args=(x,))
    expected = dropit_fx.report(dropit_fx.transform(model, example_args=(x,)))
    found = dropit_fx.report(rewritten)
    assert (found.kept_bytes, found.dense_bytes) == (expected.kept_bytes, expected.dense_bytes)
    fast = torch.compile(rewritten, backend="eager")
    assert dropit_fx.report(fast).kept_bytes == measure.saved_bytes(rewritten, x)


def test_parts_compiled_in_place_are_reported_together() -> None:
    model = Broken()
    model.blocks[0].compile(backend="dropit_eager")
    model(torch.randn(128, 32)).sum().backward()
    assert dropit_fx.report(model) == dropit_fx.report(model.blocks[0])


def test_submodules_rewritten_in_place_are_reported_with_their_names() -> None:
    model = nn.Sequential(nn.Linear(32, 32), Shared())
    dropit_fx.transform(model, modules="1", example_args=(torch.randn(128, 32),))
    modules = [r.module for r in dropit_fx.report(model).rows]
    assert {"1.first", "1.q"} <= set(modules)
    assert {name.split(".")[0] for name in modules} == {"1"}


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_picture(report: Report, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"report.{suffix}"
    report.plot(path)
    assert path.stat().st_size > 5_000


def test_picture_of_many_tensors(report: Report, tmp_path: Path) -> None:
    rows = [
        Row(**{**vars(r), "module": f"blocks.{i}.{r.module}"})
        for i in range(60)
        for r in report.rows
    ]
    report_picture(Report(tuple(rows)), tmp_path / "many.png")
    assert (tmp_path / "many.png").stat().st_size > 5_000


def test_picture_of_nothing() -> None:
    with pytest.raises(ValueError, match="saves no tensor"):
        report_picture(Report(()), "unused.png")


def _line_of(code: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(i for i, line in enumerate(lines, 1) if code in line)
