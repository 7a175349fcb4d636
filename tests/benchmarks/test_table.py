from pathlib import Path

import pytest

from visattn.benchmarks import results
from visattn.benchmarks.table import main, render
from visattn.errors import UserError

from .test_results import content

ROOT = Path(__file__).parents[2]


def test_the_committed_page_is_what_the_recorded_results_give():
    page = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    assert page == render(ROOT / "benchmarks" / "results"), "run: python -m visattn.benchmarks.table"


def test_losses_and_reasons_stay_in(tmp_path):
    found = content()
    found["rows"][3]["ratio"] = 0.5
    found["rows"][5] |= {"verdict": "NOT EQUAL", "reason": "output | is off"}
    results.write(tmp_path / "a.json", found)
    page = tmp_path / "page.md"
    main(["--results", str(tmp_path), "--page", str(page)])
    text = page.read_text()
    assert "## A machine, 2 threads, float32" in text
    assert "| b | 2 | visattn | 4.00 | 4.00 | 4.00 | - | - | - | 0.50 | - | equal |" in text
    assert "NOT EQUAL: output \\| is off" in text
    assert "least 0.50 at b" in text
    assert "1 without a time, in no mean" in text
    assert "- skipped timm: not installed" in text


def test_no_results(tmp_path):
    assert "No results are recorded yet." in render(tmp_path)
    (tmp_path / "a.json").write_text("{}")
    with pytest.raises(UserError, match="holds no results of visattn bench"):
        render(tmp_path)
