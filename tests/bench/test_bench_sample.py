"""``pra bench sample``: counted and measured costs of sampling."""

import json
from dataclasses import replace

import pytest
from support.models import PIXEL_X, random_model

from pra import cli, load
from pra.bench.device import Peak
from pra.bench.sampling import count
from pra.config import GuidanceSchedule, SamplingConfig, Solver
from pra.evaluation import flops

GUIDED = SamplingConfig(guidance=3.0, steps=2)


def test_bytes_are_those_counted_by_hand():
    """Matrices as often as they are read, and the caches."""
    config, sampling = replace(PIXEL_X, class_tokens=3), SamplingConfig(solver=Solver.EULER, steps=5)
    model, patches = random_model(config), 12
    named = model.backbone.named_parameters()
    matrices = sum(p.numel() for name, p in named if name.endswith("weight") and p.ndim == 2)
    cached = sum(3 + 1 + i + 1 for i in range(patches - 1)) * 2 * 2 * 32
    head = sum(p.numel() for name, p in model.head.named_parameters() if p.ndim == 2 and "time_in" not in name)
    modulations = sum(m.weight.numel() for m in (*model.head.modulations, model.head.final_modulation))
    condition = model.head.condition_in.weight.numel()
    costs = flops.sampling_costs(config, sampling)
    assert costs["backbone"].bytes == 4 * (patches * matrices + cached)
    assert costs["head"].bytes == 4 * patches * (5 * (head - modulations - condition) + modulations + condition)
    assert costs["decoder"].bytes == 0
    lower = flops.sampling_costs(config, sampling, batch=8, element_size=2)
    assert lower["backbone"].bytes == pytest.approx(2 * (patches * matrices / 8 + cached))
    times = 5 * 2 * sum(p.numel() for name, p in model.head.named_parameters() if p.ndim == 2 and "time_in" in name)
    assert costs["head"].flops - lower["head"].flops == times * 7 // 8  # embedded once for all images


def test_no_unconditional_work_where_the_scale_is_one():
    small = replace(PIXEL_X, backbone=replace(PIXEL_X.backbone, depth=1))
    intervals = ((0.0, 1.0), (0.2, 0.7), (0.99, 1.0))
    settings = [replace(GUIDED, steps=4, guidance_interval=interval) for interval in intervals]
    whole, part, nowhere = (flops.sampling_costs(small, config) for config in settings)
    alone = flops.sampling_costs(small, SamplingConfig(steps=4))
    assert nowhere == alone
    assert alone["head"].flops < part["head"].flops < whole["head"].flops
    linear = flops.sampling_costs(small, replace(GUIDED, steps=4, schedule=GuidanceSchedule.LINEAR))
    assert linear["head"].flops < whole["head"].flops  # the first position's scale is 1


def test_bench_sample_counts_and_times_steps_along_the_raster(tmp_path, capsys):
    small = replace(PIXEL_X, backbone=replace(PIXEL_X.backbone, depth=1))
    few, some, many = (
        flops.sampling_costs(small, replace(GUIDED, steps=max(counts), raster_steps=counts))["head"]
        for counts in ((1,), (4, 1, 1), (4,))
    )
    assert few.flops < some.flops < many.flops
    assert few.bytes < some.bytes < many.bytes
    out = tmp_path / "figures.json"
    words = [
        "bench",
        "sample",
        "tiny",
        "--batch",
        "2",
        "--tflops=1",
        "--bandwidth=1",
        "--device=cpu",
        "--out",
        str(out),
    ]
    assert cli.main([*words, "--set", "steps=2", "--set", "raster_steps=[2,1]"]) == 0
    assert all(row["measured"] > 0 for row in json.loads(out.read_text())["rows"])


def test_bench_sample_counts(tmp_path, capsys):
    out = tmp_path / "figures.json"
    words = ["bench", "sample", "digits", "--batch", "1,256", "--counts", "--precision", "bfloat16", "--out", str(out)]
    assert cli.main([*words, "--set", "steps=25", "--set=solver=euler", "--tflops=790", "--bandwidth=4.3"]) == 0
    text = capsys.readouterr().out
    assert "790 TFLOP/s and 4.3 TB/s" in text
    written = json.loads(out.read_text())
    assert [row["batch"] for row in written["rows"]] == [1] * 4 + [256] * 4
    assert written["sampling"]["steps"] == 25
    alone, crowd = written["rows"][3], written["rows"][7]
    assert crowd["flops"] == pytest.approx(alone["flops"], rel=0.01)
    assert crowd["bytes"] < alone["bytes"] / 10


def test_bench_sample_measures_every_part_of_a_run(trained, tmp_path, capsys):
    out, peak = tmp_path / "figures.json", Peak(flops=1e11, bytes=1e10)
    words = ["bench", "sample", str(trained), "--batch", "1,2", "--tflops", "0.1", "--bandwidth", "0.01"]
    assert cli.main([*words, "--device", "cpu", "--out", str(out)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines[2:10]] == 2 * ["backbone", "head", "decoder", "image"]
    assert all(line.endswith(" %") for line in lines[2:10])
    rows, model = json.loads(out.read_text())["rows"], load(trained)
    assert [row["batch"] for row in rows] == [1] * 4 + [2] * 4
    counted = [row for size in (1, 2) for row in count(model.config, model.sampling, size, 4, peak)]
    for row, same in zip(rows, counted, strict=True):
        assert row | {"measured": None} == same
        assert row["measured"] > 0
    for row in counted[:3]:
        assert row["floor"] == max(row["flops"] / 1e11, row["bytes"] / 1e10)
    assert counted[3]["floor"] == pytest.approx(sum(row["floor"] for row in counted[:3]))
