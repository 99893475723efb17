"""The study of linear probes: each layer once, and a table that chooses by validation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pra.evaluation import classifier
from studies import SETTINGS, STUDIES, Cell, Scale, Setting, run_study
from studies.records import read_rows
from studies.report_probe import by_name, chosen, probe_table
from studies.run import Workplace

CPU = torch.device("cpu")


def test_the_study_probes_each_layer_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(classifier, "RECIPE", classifier.Recipe(epochs=1))
    scale = Scale(
        name="small", width=16, depth=2, heads=1, codec_depth=1, head_depth=1, steps=1, batch_factor=1, samples=40,
        guidances=(1.0,), brief=True,
    )  # fmt: skip

    def cells(setting: Setting, scale: Scale) -> Iterator[Cell]:
        for cell in STUDIES["probe"].cells(setting, scale):
            if cell.system in ("pra", "pixels", "jit") or cell.value == "pra":
                yield replace(cell, measures=cell.measures[:2])

    study = replace(STUDIES["probe"], cells=cells)
    place = Workplace(tmp_path / "runs", CPU, 1)
    for _ in range(2):
        run_study(study, [SETTINGS["digits-16"]], scale, [0], tmp_path, place, progress=False)
        rows = read_rows(tmp_path / "probe" / "results.csv")
        assert len(list((tmp_path / "runs").glob("digits-16-*"))) == 2  # PRA, its baselines beside it, and JiT
    found = [(row["system"], row.get("layer"), row.get("pooling"), row.get("time")) for row in rows]
    assert found.count(("pixels", None, None, None)) == 1
    for system in ("pra", "random"):
        assert [entry for entry in found if entry[0] == system] == [
            (system, layer, pooling, None) for layer in (1, 2) for pooling in ("both", "last", "mean")
        ]
    assert {entry[3] for entry in found if entry[0] == "jit"} == {0.5, 0.75}
    by_pixels = next(row["top1"] for row in rows if row["system"] == "pixels")
    readme = (tmp_path / "probe" / "README.md").read_text()
    assert f"| raw pixels | {100 * by_pixels:.1f} % |" in readme
    assert "Top-1 accuracy on 80 held-out images" in readme


def row(system: str, seed: int, layer: int | None, top1: float, validation: float, **more: Any) -> dict[str, Any]:
    where = {"layer": layer, "pooling": None if layer is None else "mean"}
    return {"system": system, "seed": seed, "top1": top1, "validation": validation} | where | more


def test_the_table_chooses_by_validation() -> None:
    rows = [
        row("pra", 0, 1, 0.5, 0.7), row("pra", 1, 1, 0.6, 0.7), row("pra", 0, 2, 0.9, 0.6), row("pra", 1, 2, 0.9, 0.6),
        row("pra", 0, 3, 0.9, 0.9),  # one seed alone decides nothing
        row("random", 0, 1, 0.3, 0.3, value="pra"), row("pixels", 0, None, 0.8, 0.8),
    ]  # fmt: skip
    assert chosen(by_name(rows)["PRA"]).layer == 1
    _, lines = probe_table(rows)
    assert [line[0] for line in lines] == ["raw pixels", "PRA", "random weights (PRA)"]
    assert lines[1][1:4] == ["55.0 % ± 7.1", "1", "mean"]
    assert lines[0][1:4] == ["80.0 %", "-", "-"]
