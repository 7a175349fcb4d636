import copy
import json
import math
from pathlib import Path

import pytest

from visattn.benchmarks import results
from visattn.benchmarks.results import Row, file_name, geometric_mean, read, summarise, validate
from visattn.errors import UserError

RECORDED = Path(__file__).parents[2] / "benchmarks" / "results"


def row(shape, contender, median, mode="inference"):
    times = {} if median is None else {"median_ms": median, "p20_ms": median, "p80_ms": median, "runs": 5}
    return Row(shape, "dual", "dual", [64, 7, 5], 2, mode, contender, "equal", **times)


ROWS = [
    *(row("a", name, ms) for name, ms in (("visattn", 1.0), ("reference", 8.0), ("compiled", 4.0))),
    *(row("b", name, ms) for name, ms in (("visattn", 4.0), ("reference", 2.0))),
    *(row("c", name, ms) for name, ms in (("visattn", None), ("reference", 2.0))),
    *(row("a", name, ms, "training") for name, ms in (("visattn", 2.0), ("fused", 1.0), ("reference", 3.0))),
]


def content():
    return {
        "format": 1,
        "date": "2026-01-31",
        "commit": None,
        "versions": {"visattn": "1", "torch": "2", "python": "3"},
        "machine": {
            "device": "cpu",
            "name": "A machine",
            "system": "Linux",
            "threads": 2,
            "gemm_gflops": 100.0,
            "copy_gbps": 10.0,
            "kernels": True,
        },
        "settings": {
            "names": [],
            "shapes": "paper",
            "dtype": "float32",
            "modes": ["inference", "training"],
            "against": ["reference"],
            "gate": True,
        },
        "rows": [results.record(entry) for entry in ROWS],
        "summary": [results.record(entry) for entry in summarise(ROWS)],
        "skipped": [{"contender": "timm", "reason": "not installed"}],
        "memory_note": "counted",
    }


def test_geometric_mean():
    assert geometric_mean([2.0, 8.0]) == pytest.approx(4)
    assert geometric_mean([0.5]) == pytest.approx(0.5)


def test_summary_takes_the_shapes_that_both_have_a_time_for():
    found = {(s.mode, s.contender, s.against): s for s in summarise(ROWS)}
    reference = found["inference", "visattn", "reference"]
    assert (reference.shapes, reference.worst, reference.worst_ratio) == (2, "b", 0.5)
    assert reference.geometric_mean == pytest.approx(math.sqrt(8 * 0.5))
    assert found["inference", "visattn", "compiled"].shapes == 1
    assert found["training", "fused", "reference"].geometric_mean == pytest.approx(3)
    assert len(found) == 4


def test_results_that_fit_are_written_and_read_back(tmp_path):
    file = tmp_path / "a.json"
    results.write(file, content())
    assert read(file) == content()


def broken(change):
    found = copy.deepcopy(content())
    change(found)
    return found


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.pop("commit"), "results lacks 'commit'"),
        (lambda c: c.update(extra=1), "results has an unknown key 'extra'"),
        (lambda c: c.update(format=2), "results.format is 2, known is 1"),
        (lambda c: c["rows"][0].update(batch="two"), r"results.rows\[0\].batch is 'two', not int"),
        (lambda c: c["rows"][0].update(batch=True), "is True, not int"),
        (lambda c: c["rows"][1].update(ratio=math.inf), "is inf, not finite"),
        (lambda c: c["rows"][1].update(ratio="x"), "is 'x', not float or int or null"),
        (lambda c: c["rows"][0].update(verdict="fine"), "verdict is 'fine', known are equal, NOT EQUAL"),
        (lambda c: c["rows"][0].update(p20_ms=9.0), r"rows\[0\]: p20, median and p80 are out of order"),
        (lambda c: c["rows"][0].update(p20_ms=None), r"rows\[0\]: p20, median and p80 are out of order"),
        (lambda c: c.update(rows={}), "results.rows is no list"),
        (lambda c: c.update(machine=[]), "results.machine is no object"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        validate(broken(change))
    file = tmp_path / "a.json"
    with pytest.raises(ValueError, match=message):
        results.write(file, broken(change))
    assert not file.exists()


@pytest.mark.parametrize("text", ["{", "[]", json.dumps({"format": 1})])
def test_a_file_of_something_else_is_the_users_to_mend(tmp_path, text):
    file = tmp_path / "a.json"
    file.write_text(text)
    with pytest.raises(UserError, match=r"a.json holds no results of visattn bench \("):
        read(file)


def test_names_of_files():
    assert file_name("AMD EPYC 7B13 (x2)", "2026-01-31", "float32") == "amd-epyc-7b13-x2-2026-01-31.json"
    assert file_name("NVIDIA H100", "2026-01-31", "bfloat16") == "nvidia-h100-2026-01-31-bfloat16.json"


def test_recorded_results_fit():
    assert RECORDED.is_dir()
    for file in RECORDED.glob("*.json"):
        found = read(file)
        assert found["rows"], file.name
        assert [results.record(s) for s in summarise(Row(**entry) for entry in found["rows"])] == found["summary"]
