"""Tests for train.report: the page of a run, the comparison, charts and formats."""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dvc.repo import Repo

from model import GPT, GPTConfig
from pipeline.format import tokenizer
from pipeline.format.manifest import NAME, DroppedExample, SelectedFile, SelectionManifest
from pipeline.runtime.errors import UserError
from pipeline.store import atomic
from tests.support.browser import CHROMIUM, browser
from tests.support.small_data import flip
from tests.support.training import Project, make_project, train_here
from train import evaluate
from train.monitor.history import SAMPLE_PROMPT
from train.params import EvaluateParams
from train.report import compare, html, model_probe, run_charts
from train.report import page as report
from train.report.__main__ import main as report_main
from train.report.charts import MAX_POINTS, Curve, _downsample, line_chart, running_mean
from train.report.run_log import Log
from train.samples import as_markdown

MODEL = {"positions": "rotary", "qk_norm": True, "activation": "relu_squared", "zero_init": True}
EVALUATE = {"temperature": 0.8, "top_k": 50, "prompts": ["", "The <i>people</i> of"]}


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Project]:
    """Project with a finished run and its page; the current directory."""
    project = make_project(tmp_path_factory.mktemp("reported"))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project.folder)
        project.write(model=MODEL, evaluate=EVALUATE)
        train_here()
        evaluate.main()
        data: dict[str, Any] = {
            "documents": 14,
            "tokens": 7000,
            "duplicates": 2,
            "gigatoken_share": 0.997,
        }
        hosts, curve = Path("metrics/hosts.csv"), Path("metrics/reference.csv")
        hosts.write_text("host,documents\na.example,3\n<b>.example,1\n")
        curve.write_text("step,reference\n6,10.1\n12,9.9\n")
        data["tables_sha256"] = {hosts.name: atomic.sha256_file(hosts)}
        Path("data/statistics.json").write_text(json.dumps(data))
        example = DroppedExample(path="a.parquet", row=7, value=0.25, text="<b>Dropped</b> text")
        selection = SelectionManifest(
            selection_key="k",
            params={},
            files=[SelectedFile(source="main", path="a.parquet", sha256="a", rows=80, kept=60)],
            dropped={"fineweb.max_newlines": 20},
            examples={"fineweb.max_newlines": [example]},
        )
        atomic.write_json(report.SELECTION / NAME, selection.model_dump(mode="json"))
        found = atomic.read_sealed(report.EVALUATION)
        found["reference_sha256"] = atomic.sha256_file(curve)
        atomic.write_json(report.EVALUATION, atomic.sealed(found))
        report_main([])
        yield project


def test_page_shows_the_run_and_is_reproducible_and_self_contained(reported: Project) -> None:
    page = report.OUT.read_text()
    loss = reported.results("evaluation")["val_loss"]
    state = json.loads(Path("artifacts/checkpoint/state.json").read_text())
    for text in (
        f"{loss:.4f}", state["run_key"], state["code_key"], "k" * 64,
        "99.7 %", "published run", "a.example", "step 12", "learning_rate", "attn.c_proj",
        "fineweb.max_newlines", "60 of 80 rows", "25 %", "&lt;b&gt;Dropped",
    ):  # fmt: skip
        assert text in page, text
    assert re.search(r"positions\s+rotary", page)
    # Loss twice, logged curves, hosts, weights, activations.
    assert page.count("<svg") == page.count("<figure") >= 8
    assert "<b>.example" not in page
    assert "<i>people</i>" not in page
    assert not re.findall(r"""(?:src|href)=["'](?!#|data:,)|@import|url\((?!#)|<script""", page)
    report_main([])
    assert report.OUT.read_text() == page


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
def test_browser_renders_it_at_any_width_and_in_print(reported: Project) -> None:
    figures = report.OUT.read_text().count("<figure")

    async def scenario() -> None:
        async with browser() as page:
            for width, dark in ((1280, False), (390, False), (768, True)):
                await page.screen(width, 800, dark=dark)
                await page.open(report.OUT.absolute().as_uri())
                assert await page.js("document.documentElement.scrollWidth") <= width
                drawn = await page.js(
                    "[...document.querySelectorAll('svg')].filter(s => s.clientWidth).map(s =>"
                    "Math.max(...[...s.querySelectorAll('path')].map(p => p.getBBox().width))"
                    " / s.viewBox.baseVal.width)"
                )
                assert len(drawn) == figures - 1  # the wide loss or the narrow one
                assert min(drawn) > 0.5
                colour = await page.js("getComputedStyle(document.body).backgroundColor")
                assert (colour == "rgb(255, 255, 255)") == (not dark)
            await page.pdf(Path("report.pdf"))
            assert Path("report.pdf").read_bytes().startswith(b"%PDF")
            assert page.complaints == []

    asyncio.run(scenario())


def test_missing_file_is_named(reported: Project, tmp_path: Path) -> None:
    Path("artifacts/log.jsonl").rename(tmp_path / "log.jsonl")
    with pytest.raises(UserError, match=r"artifacts/log\.jsonl"):
        report_main([])
    (tmp_path / "log.jsonl").rename("artifacts/log.jsonl")


@pytest.mark.parametrize("name", ["hosts.csv", "reference.csv"])
def test_damaged_table_is_named(reported: Project, name: str) -> None:
    path, page = Path("metrics") / name, report.OUT.read_bytes()
    flip(path, 5, keep_mtime=True)
    with pytest.raises(UserError, match=str(path)):
        report_main([])
    flip(path, 5)
    report_main([])
    assert report.OUT.read_bytes() == page


def test_samples_are_parsed_as_they_were_written() -> None:
    texts = [("", "A\n\nB"), ("The people", " **of** this")]
    params = EvaluateParams(val_tokens=1)
    page = as_markdown(texts, {"Before training": ("Red", "\x1b[31m")}, 1.0, params)
    assert report.parse_samples(page) == texts
    assert "\x1b" not in page


def test_training_samples_include_the_first_and_the_last() -> None:
    prompt, more = tokenizer.encode("The state of the Union")[:4], tokenizer.encode(" is strong")
    tokens = [tokenizer.EOT, *prompt, *[11] * (SAMPLE_PROMPT - 5), *more]
    log = Log([{"step": step, "sample": tokens} for step in range(5, 205, 5)])
    shown = report.training_samples(log)
    assert [shown[0][0], shown[-1][0], len(shown)] == [5, 200, 8]
    assert shown[0][1].startswith("The state of the")
    assert shown[0][2] == " is strong"
    assert report.training_samples(Log([])) == []


def test_spikes_and_skipped_steps_are_incidents() -> None:
    log = Log([{"step": 1200, "spike": 7.5}, {"step": 1300, "skipped": 1}, {"step": 9, "lr": 1}])
    spike, skipped = log.incidents()
    assert "1,200" in spike
    assert "7.5" in spike
    assert "1,300" in skipped


def test_weight_and_activation_rms() -> None:
    gpt = GPT.initialised(GPTConfig(n_layer=3, n_head=2, n_embd=64, block_size=32), seed=1)
    weights = model_probe.weight_rms(gpt)
    assert weights["mlp.c_fc"] == pytest.approx([0.02] * 3, rel=0.02)
    assert weights["attn.c_proj"] == pytest.approx([0.02 / 6**0.5] * 3, rel=0.05)
    tokens = np.arange(64).reshape(2, 32)
    sizes = model_probe.activation_rms(gpt, tokens)
    x = gpt.wte(torch.from_numpy(tokens)) + gpt.wpe(torch.arange(32))
    for layer, block in enumerate(gpt.h):
        x = block(x)
        assert sizes["residual"][layer] == pytest.approx(model_probe.rms(x))
    assert [len(values) for values in sizes.values()] == [3, 3, 3]
    assert not gpt.h[0]._forward_hooks


def test_predicted_probabilities_are_those_of_the_model() -> None:
    gpt = GPT.initialised(GPTConfig(n_layer=1, n_head=1, n_embd=8, block_size=8), seed=1)
    predicted, likeliest = model_probe.predict_text(
        gpt, "The state of the Union is strong and free", n=3
    )
    assert [token.text for token in predicted][:3] == ["The", " state", " of"]
    assert len(predicted) == 7  # cut to the context
    row = torch.tensor([[tokenizer.EOT, *tokenizer.encode("The state of the Union is strong")[:7]]])
    p = gpt(row)[0].softmax(-1).detach()
    assert predicted[1].probability == pytest.approx(float(p[1, row[0, 2]]))
    assert likeliest[0][1] == pytest.approx(float(p[-1].max()))


def test_long_curve_is_downsampled() -> None:
    n = 50_000
    svg = line_chart([Curve("a", range(n), [1.0] * n)], name='a "b" <c>', y_label="y")
    assert len(svg) < 100_000
    assert svg.count(" L") + svg.count("\nL") < 3 * MAX_POINTS
    assert 'aria-label="a &quot;b&quot; &lt;c&gt;"' in svg
    assert "#0a0b" not in svg  # all colours are CSS variables


def test_downsampling_keeps_peaks_and_both_ends() -> None:
    ys = [1.0] * 5000
    ys[2501] = 9.0
    xs, kept = _downsample(range(5000), ys)
    assert len(xs) <= MAX_POINTS
    assert (kept[xs.index(2501)], xs[0], xs[-1]) == (9.0, 0, 4999)
    assert xs == sorted(xs)


def test_logarithmic_axis_needs_positive_values() -> None:
    def heights(values: list[float]) -> list[float]:
        svg = line_chart([Curve("a", [1, 2, 3], values)], name="a", y_label="y", log_scale=True)
        *_, line = re.findall(r'<path d="M ([^"]*)" clip-path', svg)  # after the grid lines
        return [float(number) for number in re.findall(r"[\d.]+ ([\d.]+)", line)]

    a, b, c = heights([1.0, 10.0, 100.0])
    assert a - b == pytest.approx(b - c, abs=0.01)
    a, b, c = heights([0.0, 10.0, 100.0])
    assert b - c > 5 * (a - b)


def test_running_mean_is_unbiased() -> None:
    assert running_mean([3.0] * 5, memory=4) == pytest.approx([3.0] * 5)
    assert running_mean([1.0, 2.0], memory=1) == [1.0, 2.0]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (1234567, "1,234,567"),
        (1234.5678, "1,235"),
        (426.487, "426.49"),
        (6.05559, "6.0556"),
        (0.123456, "0.1235"),
        (0.00051234, "0.00051234"),
        (846.8, "846.8"),
        (True, "yes"),
        (None, "–"),
        ("x", "x"),
    ],
)
def test_number_format(value: Any, shown: str) -> None:
    assert html.number(value) == shown


def test_quantities_times_and_percentages() -> None:
    sizes = [html.quantity(n, "B") for n in (12, 1500, 28.97e6, 999.6e9)]
    assert sizes == ["12 B", "1.5 kB", "29 MB", "1 TB"]
    assert html.quantity(3.1e18, "FLOP") == "3.1 EFLOP"
    times = [html.duration(s) for s in (42, 254, 13920)]
    assert times == ["42 s", "4 min 14 s", "3 h 52 min"]
    assert [html.percent(p) for p in (1, 0.99999, 0.997, 0.5, 0.04, 0.0012, 1e-6, 0.0)] == [
        "100 %", "99.9 %", "99.7 %", "50 %", "4.0 %", "0.12 %", "< 0.001 %", "0 %",
    ]  # fmt: skip


def test_comparison_refuses_damaged_files_of_the_workspace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Repo.init(str(tmp_path), no_scm=True).close()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").mkdir()
    files = {"params.yaml": "train: {steps: 5}\n", "artifacts/log.jsonl": ""}
    files |= {"artifacts/training.json": "{}", "artifacts/evaluation.json": '{"val_loss": 2.0}'}
    for name, text in files.items():
        Path(name).write_text(text)
    assert compare.read("workspace").metrics == {"val_loss": 2.0}
    for name, text in (("params.yaml", "a: [\n"), ("artifacts/training.json", "{")):
        Path(name).write_text(text)
        with pytest.raises(UserError, match=rf"--compare workspace: {name} "):
            compare.read("workspace")
        Path(name).write_text(files[name])
    for name in files:
        Path(name).unlink()
        os.mkfifo(name)
        with pytest.raises(UserError, match=rf"{name}: not a regular file"):
            compare.read("workspace")
        Path(name).unlink()
        Path(name).write_text(files[name])


def test_comparison_shows_differing_parameters_and_the_best_metrics(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log = Log([{"step": step, "val/loss": 3.0, "train/loss": 4.0 / step} for step in (1, 2, 3)])
    a = compare.Experiment(
        "a", {"train.steps": 5, "train.seed": 1}, {"val_loss": 3.0, "mfu": 0.4}, log
    )
    b = compare.Experiment("<b>", {"train.steps": 9, "train.seed": 1}, {"val_loss": 2.0}, log)
    assert compare.differing_params([a, b]) == [("train.steps", [5, 9])]
    assert compare.metric_rows([a, b]) == [
        ("validation loss", [(3.0, False), (2.0, True)]),
        ("MFU", [(0.4, False), (None, False)]),
    ]
    monkeypatch.setattr(compare, "read", {"a": a, "<b>": b}.__getitem__)
    page = compare.render(["a", "<b>", "a"])
    assert "train.steps" in page
    assert "train.seed" not in page
    assert "<b>" not in page.replace('<b><span class="key"', "")
    assert page.count("<svg") == page.count("<figure") == 3  # validation loss twice, training loss
    with pytest.raises(UserError, match="--compare: 7 "):
        compare.render([str(i) for i in range(7)])


@pytest.mark.parametrize("records", [[], [{"step": 10, "val/loss": 5.0}]])
def test_loss_chart_of_a_log_that_lost_its_training_points(records: list[dict[str, Any]]) -> None:
    svg = run_charts.loss_chart(Log(records), {"unigram_entropy": 7.0}, wide=True)
    assert svg.lstrip().startswith("<svg")
