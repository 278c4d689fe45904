"""The page: its timeline and sums, what stands in the file, and what a real browser makes of it."""

import json
import re
import shutil
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import dropit_fx
from dropit_fx.bench import model_spec
from dropit_fx.cli import main
from dropit_fx.codecs import CODEC, STAND_INS
from dropit_fx.planner.size import shown
from dropit_fx.planner.timeline import SAVED
from dropit_fx.report import step_view
from dropit_fx.report.page import PLACE, block_of, page_data, sums_by_codec, timeline, write_page
from dropit_fx.report.palette import palette
from dropit_fx.report.rows import Report, Row
from dropit_fx.report.step_view import step_data

TEMPLATE = (Path(dropit_fx.__file__).parent / "report/page.html").read_text()
NASTY = "</script><!-- <b>\u2028 & <img src=x onerror=alert(1)>"


def row(dense: int, kept: int, codec: str = "quant(bits=5)", **changed: Any) -> Row:
    made = Row(
        name="add",
        module="blocks.0",
        op="gelu",
        where="/home/someone/net.py:7",
        shape=(dense // 4,),
        dtype="float32",
        dense_bytes=dense,
        kept_bytes=kept,
        codec=codec,
        reason="",
    )
    return replace(made, **changed)


class Made(NamedTuple):
    model: nn.Module
    packed: nn.Module
    report: Report


@pytest.fixture(scope="module")
def made() -> Made:
    model, args = model_spec.build("dropit_fx.bench.model_spec:small_net", 128)
    packed = dropit_fx.transform(model, example_args=args)
    return Made(model, packed, dropit_fx.report(packed))


@pytest.fixture(scope="module")
def report(made: Made) -> Report:
    return made.report


# What is computed ---------------------------------------------------------------------------------


def test_timeline_by_hand() -> None:
    rows = [row(100, 16), row(40, 40), row(60, 5)]
    assert timeline(rows) == [
        (0, 100, 16),
        (1, 140, 56),
        (2, 200, 61),
        (2, 200, 61),
        (1, 140, 56),
        (0, 100, 16),
    ]


def test_a_shared_copy_counts_once_and_goes_with_its_first_tensor() -> None:
    rows = [row(100, 16), row(100, 0, "derived")]
    assert [level.kept for level in timeline(rows)] == [16, 16, 16, 16]


def test_the_peak_is_the_totals_of_the_report(report: Report) -> None:
    levels = timeline(report.rows)
    assert len(levels) == 2 * len(report.rows)
    assert max(level.dense for level in levels) == report.dense_bytes > 0
    assert max(level.kept for level in levels) == report.kept_bytes > 0
    middle = levels[len(report.rows) - 1]
    assert (middle.dense, middle.kept) == (report.dense_bytes, report.kept_bytes)


def test_a_checkpointed_region_is_listed_but_not_counted() -> None:
    made = Report((row(100, 16), row(80, 80, "keep", region="wrap_body_0"), row(60, 5)))
    assert [level.row for level in timeline(made.rows)] == [0, 2, 2, 0]
    assert len(page_data(made)["rows"]) == 3
    assert [one["codecs"] for one in sums_by_codec(made.rows)] == [("quant",)]


def test_a_model_that_saves_nothing() -> None:
    data = page_data(Report(()))
    assert (data["timeline"], data["codecs"], data["rows"]) == ([], [], [])
    assert data["ratio"] == 1.0


def test_sums_by_codec_add_up(report: Report) -> None:
    sums = sums_by_codec(report.rows)
    assert sum(one["dense_bytes"] for one in sums) == report.dense_bytes
    assert sum(one["kept_bytes"] for one in sums) == report.kept_bytes
    assert sums == sorted(sums, key=lambda one: -one["dense_bytes"])


def test_codecs_of_a_row() -> None:
    assert row(8, 1, "drop+mink(gamma=0.5, bits=4)").codecs == ("mink",)
    assert row(8, 1, "mink(gamma=0.5)+bitmask(bits=1)").codecs == ("bitmask", "mink")
    assert row(8, 1, "drop").codecs == ("drop",)


def test_the_curves_are_what_autograd_holds() -> None:
    layers = nn.GELU(), nn.Linear(256, 256), nn.Tanh(), nn.Linear(256, 256), nn.ReLU()
    model = nn.Sequential(nn.Linear(64, 256), *layers, nn.Linear(256, 8))
    x = torch.randn(512, 64)
    packed = dropit_fx.transform(model, example_args=(x,))
    levels = timeline(dropit_fx.report(packed).rows)
    for module, curve in ((model, [s.dense for s in levels]), (packed, [s.kept for s in levels])):
        held = iter(levels_held(module, x))
        assert all(level in held for level in curve), curve  # in this order
        assert max(levels_held(module, x)) == max(curve)


def levels_held(model: nn.Module, x: Tensor) -> list[int]:
    """Bytes that autograd holds after each tensor that it saves or lets go, storage by storage."""
    boxes: dict[int, Tensor] = {}  # by the id of what autograd holds in the tensor's place
    levels: list[int] = []

    def note() -> None:
        alive = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in boxes.values()}
        levels.append(sum(alive.values()))

    def let_go(key: int) -> None:
        del boxes[key]
        note()

    class Box:
        def __init__(self, tensor: Tensor) -> None:
            self.tensor = tensor.detach()

    def pack(tensor: Tensor) -> Box:
        box = Box(tensor)
        if all(tensor.data_ptr() != other.data_ptr() for other in (x, *model.parameters())):
            boxes[id(box)] = box.tensor
            weakref.finalize(box, let_go, id(box))
            note()
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        loss = model(x).sum()
    levels.append(levels[-1])  # the backward of what was saved last begins
    loss.backward()
    return levels


# The step -----------------------------------------------------------------------------------------


def test_the_step_adds_up_to_its_peak(made: Made) -> None:
    optimizer = torch.optim.AdamW(made.model.parameters())
    told, places = made.report.told({"optimizer": optimizer})
    data = step_data(told, places, None)
    totals = [sum(column["bytes"]) for column in data["columns"]]
    assert max(totals) == told.peak == data["peak"]
    assert {column["phase"] for column in data["columns"]} == {"forward", "backward", "optimizer"}
    assert sum(one["nbytes"] for one in data["alive"]) + data["others"]["nbytes"] == told.peak
    held = {"parameters", "inputs", "optimizer state", SAVED}
    assert held <= {one["kind"] for one in data["alive"]}
    state = [one["nbytes"] for one in data["alive"] if one["kind"] == "optimizer state"]
    assert state[0] > 2 * sum(4 * p.numel() for p in made.model.parameters())
    saved = next(one for one in data["alive"] if one["kind"] == SAVED)
    assert saved["module"] in dict(made.model.named_modules())


@pytest.mark.parametrize("columns", [3, 10**6])
def test_columns_show_the_fullest_op(
    made: Made, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step_view, "COLUMNS", columns)
    told, places = made.report.told({})
    data = step_data(told, places, told)
    assert max(sum(column["bytes"]) for column in data["columns"]) == told.peak
    assert max(column["dense"] for column in data["columns"]) == told.peak
    if columns > len(told.ops):
        assert [sum(column["bytes"]) for column in data["columns"]] == list(told.used)
        assert [column["dense"] for column in data["columns"]] == list(told.used)


def test_the_page_of_a_whole_model_tells_its_step_and_rules_that_hold(
    made: Made, tmp_path: Path
) -> None:
    shares: list[float] = []
    made.report.page(tmp_path / "page.html", progress=lambda text, share: shares.append(share))
    data = embedded_of(tmp_path / "page.html")
    assert 0 < data["step"]["peak"] < data["step"]["dense_peak"]
    assert shares[-1] == 1.0
    lines, saves = data["suggested"]["lines"], data["suggested"]["saves"]
    (tmp_path / "rules.yaml").write_text(lines)
    _, args = model_spec.build("dropit_fx.bench.model_spec:small_net", 128)
    again = dropit_fx.transform(made.model, str(tmp_path / "rules.yaml"), example_args=args)
    assert dropit_fx.report(again).kept_bytes == made.report.kept_bytes - saves
    made.report.page(tmp_path / "page.html", suggestions=0)
    assert embedded_of(tmp_path / "page.html")["suggested"] is None


def test_without_a_graph_the_page_says_why_there_is_no_step(tmp_path: Path) -> None:
    Report((row(100, 16),)).page(tmp_path / "page.html")
    data = embedded_of(tmp_path / "page.html")
    assert data["step"] is None
    assert "one graph of a whole model" in data["no_step"]
    assert "keep it" in data["no_suggestion"]
    with pytest.raises(ValueError, match="one graph of a whole model"):
        Report((row(100, 16),)).page(tmp_path / "page.html", loss=torch.sum)


def test_blocks_of_modules() -> None:
    names = ("encoder.layer.11.mlp.fc1", "0.2.norm", "layer1.0.conv1", "head.fc", "stem", "")
    blocks = ["encoder.layer.11", "0", "layer1.0", "head", "stem", ""]
    assert [block_of(name) for name in names] == blocks


def test_small_tensors_are_marked() -> None:
    data = page_data(Report((row(100_000, 16), row(400, 400, "keep"), row(600, 600, "keep"))))
    assert [one["small"] for one in data["rows"]] == [False, True, False]


# What stands in the file --------------------------------------------------------------------------


def embedded(text: str) -> Any:
    found = re.findall(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert len(found) == 1
    return json.loads(found[0])


def test_the_data_survives_whatever_names_hold(tmp_path: Path) -> None:
    path = tmp_path / "nasty.html"
    made = Report((row(100, 16, module=NASTY, reason=PLACE),))
    made.page(path, {"model": NASTY, "size": None})
    text = path.read_text()
    assert text.count("</script>") == TEMPLATE.count("</script>")
    assert "<img" not in text
    assert "\u2028" not in text
    data = embedded(text)
    assert data["about"] == {"model": NASTY}
    assert data["rows"][0]["module"] == NASTY
    assert data["rows"][0]["reason"] == PLACE
    assert data["rows"][0]["where"] == "someone/net.py:7"  # not where in the file system


def test_names_of_a_real_model_are_escaped_too(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 64))
    model.add_module("</script><b>", nn.GELU())
    packed = dropit_fx.transform(model, example_args=(torch.randn(64, 8),))
    dropit_fx.report(packed).page(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert text.count("</script>") == TEMPLATE.count("</script>")
    assert "</script><b>" in json.dumps(embedded(text))


def test_numbers_are_finite(report: Report, tmp_path: Path) -> None:
    for made in (report, Report(()), Report((row(0, 8),))):
        write_page(made, tmp_path / "page.html")
        assert not re.search(r"\b(NaN|Infinity)\b", json.dumps(embedded_of(tmp_path / "page.html")))


def embedded_of(path: Path) -> Any:
    return embedded(path.read_text())


def test_nothing_is_fetched() -> None:
    assert not re.search(r"https?:|//\w", TEMPLATE)
    assert re.findall(r'(?:src|href)="([^"]*)"', TEMPLATE) == ["data:,"]
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|import\(|innerHTML", TEMPLATE)
    assert "default-src 'none'" in TEMPLATE


# Colours ------------------------------------------------------------------------------------------

NAMES = (*CODEC, *STAND_INS, "free")
SCHEMES = ("light", "dark")
# Machado et al., 2009: linear RGB as seen with protanopia, deuteranopia, tritanopia.
VISION = torch.tensor(
    [
        [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
        [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
        [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
    ]
)


def linear(colour: str) -> Tensor:
    """``#rrggbb`` as linear RGB."""
    v = torch.tensor(list(bytes.fromhex(colour[1:]))) / 255
    return torch.where(v <= 0.04045, v / 12.92, ((v + 0.055) / 1.055) ** 2.4)


def oklab(rgb: Tensor) -> Tensor:
    cones = torch.tensor(
        [[0.4122, 0.5363, 0.0514], [0.2119, 0.6807, 0.1074], [0.0883, 0.2817, 0.63]]
    )
    axes = torch.tensor(
        [[0.2105, 0.7936, -0.0041], [1.978, -2.4286, 0.4506], [0.0259, 0.7828, -0.8087]]
    )
    return (rgb.clamp(0, 1) @ cones.T) ** (1 / 3) @ axes.T


def luminance(colour: str) -> float:
    return float(linear(colour) @ torch.tensor([0.2126, 0.7152, 0.0722])) + 0.05


def variables(path: Path, scheme: str) -> dict[str, str]:
    """Name -> colour, of one scheme of a page."""
    part = path.read_text().split("@media")[SCHEMES.index(scheme)]
    return dict(re.findall(r"--(?:codec-)?([\w\\ ]+): (#\w{6})", part))


def check_colours(colours: dict[str, str], names: Sequence[str]) -> None:
    """Everyone can tell them from each other and from the page."""
    for name in set(names) - {"free"}:
        light, dark = sorted((luminance(colours[name]), luminance(colours["page"])))
        assert dark / light > 3, name
    for vision in VISION:
        seen = oklab(torch.stack([linear(colours[name]) for name in names]) @ vision.T)
        apart = torch.cdist(seen, seen) + torch.eye(len(names))
        assert apart.min() > 0.06, names[int(apart.min(0).values.argmin())]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_codec_has_a_colour_that_everyone_can_tell(scheme: str, tmp_path: Path) -> None:
    write_page(Report(()), tmp_path / "page.html")
    check_colours(variables(tmp_path / "page.html", scheme), NAMES)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_new_codecs_get_colours_by_themselves(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("half", "my own", "third"):
        monkeypatch.setitem(CODEC, name, replace(CODEC["mink"], name=name))
    told = Report((row(8, 1, "elsewhere(bits=3)"),))  # of a codec that this process lacks
    write_page(told, tmp_path / "page.html")
    names = (*NAMES, "half", "my\\20 own", "third", "elsewhere")
    check_colours(variables(tmp_path / "page.html", scheme), names)
    many = palette(f"codec_{i}" for i in range(60))
    assert len(set(many.values())) == len(many) > 60


def test_page_and_picture_have_the_same_colours(
    report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setitem(CODEC, "half", replace(CODEC["mink"], name="half"))
    made = Report((*report.rows, row(4096, 700, "half"), row(4096, 0, "unread")))
    made.page(tmp_path / "page.html")
    made.plot(tmp_path / "picture.svg")
    picture, colours = (
        (tmp_path / "picture.svg").read_text(),
        variables(tmp_path / "page.html", "light"),
    )
    for name in ("quant", "keep", "half", "unread"):
        assert f"fill: {colours[name]}" in picture, name


# The command line ---------------------------------------------------------------------------------


def test_demo(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "demo.html"
    small = ["--model", "dropit_fx.bench.model_spec:small_net", "--batch", "4", "--size", "16"]
    assert main(["demo", *small, "--preset", "max", "--out", str(out)]) == 0
    data = embedded_of(out)
    assert data["about"] == {
        "model": "dropit_fx.bench.model_spec:small_net",
        "batch": "4",
        "size": "16",
        "preset": "max",
    }
    line = capsys.readouterr().out
    dense, kept = data["dense_bytes"] / 2**20, data["kept_bytes"] / 2**20
    assert line == (
        f"{out}: {dense:.2f} MiB saved dense, {kept:.2f} MiB kept, {kept / dense:.1%} of dense\n"
    )


def test_report_as_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, model = tmp_path / "report.html", ["--model", "dropit_fx.bench.model_spec:small_net"]
    assert main(["report", *model, "--batch", "4", "--html", str(out), "--json"]) == 0
    data, printed = embedded_of(out), json.loads(capsys.readouterr().out)
    assert data["about"]["preset"] == "balanced"
    assert data["kept_bytes"] == printed["kept_bytes"]
    assert len(data["rows"]) == len(printed["rows"])
    missing = str(tmp_path / "none" / "report.html")
    assert main(["report", *model, "--html", missing]) == 2
    assert missing in capsys.readouterr().err


# A real browser -----------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    " --disable-background-networking --disable-component-update --disable-sync"
)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    path = next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser on this machine; looked for {', '.join(BROWSERS)}")
    with sync_api.sync_playwright() as playwright:
        launched = playwright.chromium.launch(executable_path=path, args=ARGUMENTS.split())
        yield launched
        launched.close()


class Opened:
    """A page in the browser, with everything that it asked for and complained about."""

    def __init__(self, browser: Any, path: Path, width: int = 1280, scheme: str = "light") -> None:
        size = {"width": width, "height": 900}
        self.page = browser.new_page(viewport=size, color_scheme=scheme)
        self.page.set_default_timeout(10_000)
        self.requests: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.errors.append(message.text))
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.goto(path.as_uri())
        self.page.wait_for_selector(".timeline svg text")

    def column(self, number: int) -> list[str]:
        cells = self.page.locator(f".tensors tr:not([hidden]) td:nth-child({number})")
        return [text.strip() for text in cells.all_text_contents()]

    def head(self, name: str) -> Any:
        return self.page.locator("thead th", has=self.page.get_by_text(name, exact=True))

    def plain(self) -> None:
        """All tensors, without blocks, in the order of the graph."""
        self.page.locator("[name=blocks]").uncheck()
        self.page.locator("[name=small]").check()
        for _ in range(2):
            self.head("#").locator("button").click()

    def colours(self) -> Sequence[tuple[int, Any]]:
        image = Image.open(BytesIO(self.page.screenshot())).convert("RGB")
        return image.getcolors(image.width * image.height) or ()


@pytest.fixture
def path(report: Report, tmp_path: Path) -> Path:
    """Of the page of a real report, and one row with a name that no module should have."""
    more = replace(report, rows=(*report.rows, row(4096, 700, module=NASTY)))
    more.page(tmp_path / "page.html", {"model": "small", "preset": "balanced"}, suggestions=1)
    return tmp_path / "page.html"


@pytest.fixture
def opened(browser: Any, path: Path) -> Iterator[Opened]:
    made = Opened(browser, path)
    yield made
    assert made.errors == []
    assert [url for url in made.requests if not url.startswith("data:")] == [path.as_uri()]
    made.page.close()


def bytes_of(cell: str) -> float:
    """Of bytes as they are shown."""
    number, unit = cell.split()
    return float(number) * 1024 ** ("B", "KiB", "MiB", "GiB").index(unit)


def test_the_page_shows_every_tensor_as_text(opened: Opened, report: Report) -> None:
    opened.plain()
    assert opened.page.locator(".tensors tbody tr").count() == len(report.rows) + 1
    assert opened.page.locator(".tensors tbody tr").last.is_visible()
    assert opened.page.locator("h1").text_content() == "small"
    assert opened.column(3)[-1] == NASTY.strip()
    assert opened.page.locator("img, td b").count() == 0
    assert shown(report.dense_bytes + 4096) in opened.page.locator(".totals").inner_text()
    assert opened.page.locator(".legend .swatch").count() == len(sums_by_codec(report.rows))
    assert opened.column(7) == [shown(r.dense_bytes) for r in report.rows] + [shown(4096)]


def test_it_opens_with_blocks_by_what_they_keep_and_folds_what_is_small(
    opened: Opened, report: Report
) -> None:
    largest = max(r.dense_bytes for r in report.rows)
    large = [r for r in report.rows if max(r.dense_bytes, r.kept_bytes) >= largest / 200]
    assert len(large) < len(report.rows)
    said = opened.page.locator("output").text_content()
    folded = len(report.rows) - len(large)
    assert f"{folded + (largest / 200 > 4096)} small ones are folded" in said
    heads = opened.page.locator("tr.block:not([hidden]) th").all_text_contents()
    kept: dict[str, int] = {}
    for r in report.rows:
        kept[block_of(r.module)] = kept.get(block_of(r.module), 0) + r.kept_bytes
    sizes = {
        block: f"{shown(kept[block])} kept of" for block in {block_of(r.module) for r in large}
    }
    told = [block for head in heads for block in sizes if head.startswith(block + sizes[block])]
    assert set(told) == set(sizes)
    assert [kept[block] for block in told] == sorted(map(kept.get, sizes), reverse=True)
    opened.page.locator("[name=small]").check()
    assert len(opened.column(1)) == len(report.rows) + 1
    opened.page.locator("[name=small]").uncheck()
    opened.page.locator("[type=search]").fill("batch_norm")  # finds the small ones too
    assert len(opened.column(1)) == sum(r.op == "batch_norm" for r in report.rows)


def test_a_click_on_a_head_sorts_by_numbers(opened: Opened) -> None:
    opened.plain()
    before = opened.column(1)
    assert before == [str(i + 1) for i in range(len(before))]
    head = opened.head("dense")
    head.locator("button").click()
    falling = [bytes_of(cell) for cell in opened.column(7)]
    assert head.get_attribute("aria-sort") == "descending"
    assert falling == sorted(falling, reverse=True)
    assert [str(v) for v in falling] != sorted(map(str, falling), reverse=True)  # not by letters
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    assert [bytes_of(cell) for cell in opened.column(7)] == falling[::-1]
    assert opened.page.locator("th[aria-sort]").count() == 1
    opened.head("#").locator("button").click()
    assert opened.column(1) == before[::-1]


def test_a_click_on_a_head_sorts_by_letters(opened: Opened) -> None:
    opened.plain()
    opened.head("read by").locator("button").click()
    assert opened.column(2) == sorted(opened.column(2))
    assert opened.head("read by").get_attribute("aria-sort") == "ascending"


def test_the_filter_and_the_legend(opened: Opened, report: Report) -> None:
    opened.page.locator("[type=search]").fill("batch_norm QUANT")
    wanted = [r for r in report.rows if r.op == "batch_norm" and r.codec.startswith("quant")]
    assert 0 < len(wanted) < len(report.rows)
    assert len(opened.column(1)) == len(wanted)
    told = opened.page.locator("output").text_content()
    assert told.startswith(f"{len(wanted)} of {len(report.rows) + 1} tensors")
    opened.page.locator(".legend button", has_text="keep").click()
    assert set(opened.column(9)) == {"100.0 %"}
    opened.page.locator("[type=search]").fill("no such word")
    assert opened.column(1) == []


def test_the_curves_and_the_tooltip(opened: Opened, report: Report) -> None:
    opened.page.locator(".timeline").scroll_into_view_if_needed()
    chart = opened.page.locator(".timeline svg").bounding_box()
    heights = {}
    for name in ("dense", "packed"):
        curve = opened.page.locator(f"path.{name}")
        assert curve.get_attribute("d").count("H") == 2 * (len(report.rows) + 1)
        box = curve.bounding_box()
        assert box["width"] > 0.9 * chart["width"]
        heights[name] = box["height"]
    assert heights["dense"] > 200
    share = report.kept_bytes / report.dense_bytes
    assert heights["packed"] / heights["dense"] == pytest.approx(share, abs=0.02)

    tip = opened.page.locator(".timeline .tip")
    assert not tip.is_visible()
    opened.page.mouse.move(chart["x"] + 0.54 * chart["width"], chart["y"] + 150)
    assert tip.is_visible()
    assert NASTY.strip() in tip.text_content()
    assert "backward" in tip.text_content()
    opened.page.mouse.move(chart["x"] + 66, chart["y"] + 150)
    first = report.rows[0]
    levels = f"dense {shown(first.dense_bytes)}, packed {shown(first.kept_bytes)}"
    assert "forward, tensor 1" in tip.text_content()
    assert levels in tip.text_content()
    opened.page.mouse.move(chart["x"] + 200, chart["y"] - 100)
    assert not tip.is_visible()


def test_it_opens_with_the_step(opened: Opened, report: Report) -> None:
    told = report.told({})[0]
    said = opened.page.locator(".step svg").text_content()
    assert f"peak {shown(told.peak)}" in said
    kinds = opened.page.locator("#step .kinds li").count()
    assert opened.page.locator("path.kind").count() == kinds >= 4
    chart = opened.page.locator(".step svg").bounding_box()
    tall = max(path.bounding_box()["height"] for path in opened.page.locator("path.kind").all())
    data = embedded_of(Path(opened.page.url.removeprefix("file://")))
    most = max(told.peak, data["step"]["dense_peak"])
    assert tall / (chart["height"] - 50) == pytest.approx(told.peak / most, abs=0.02)
    assert len(opened.page.locator(".alive tr").all()) > 4
    opened.page.mouse.move(chart["x"] + 0.3 * chart["width"], chart["y"] + 150)
    assert "saved tensors" in opened.page.locator(".step .tip").text_content()
    assert opened.page.locator("pre").text_content() == data["suggested"]["lines"]
    opened.page.locator(".copy").click()
    opened.page.wait_for_selector("text=/^(copied|selected)/")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_every_width_and_scheme(browser: Any, path: Path, scheme: str) -> None:
    for width in (480, 1280):
        opened = Opened(browser, path, width, scheme)
        assert opened.page.evaluate("document.documentElement.scrollWidth") == width
        colours = opened.colours()
        assert len(colours) > 100
        background = max(colours)[1]
        assert (sum(background) > 600) == (scheme == "light")
        assert opened.errors == []
        opened.page.close()


def test_a_model_that_saves_nothing_is_drawn(browser: Any, tmp_path: Path) -> None:
    Report(()).page(tmp_path / "nothing.html")
    opened = Opened(browser, tmp_path / "nothing.html")
    assert "no tensor is saved" in opened.page.locator(".timeline svg").text_content()
    assert "one graph of a whole model" in opened.page.locator("#step").text_content()
    assert "NaN" not in opened.page.content()
    assert opened.errors == []
    opened.page.close()
