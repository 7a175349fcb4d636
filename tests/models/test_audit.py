"""The networks beside the numbers of their papers."""

import json
from dataclasses import replace

import pytest

from visattn.cli import main
from visattn.models.audit import ENTRIES, audit, measure

COUNTED = {  # parameters, multiply-adds by the convention of the entry: a number that moves is a network that changed
    "resnet50": (25_557_032, 4_089_184_256),
    "resnext50_32x4d": (25_028_904, 4_230_479_872),
    "sknet26": (16_754_088, 2_586_877_952),
    "sknet50": (27_494_888, 4_462_710_784),
    "sknet101": (48_768_552, 8_448_724_992),
    "epsanet50": (22_561_715, 3_620_128_128),
    "epsanet101": (38_900_279, 6_820_588_928),
    "epsanet50_large": (27_899_518, 4_721_860_096),
    "epsanet101_large": (49_592_198, 8_966_487_552),
    "epsanet50_large(kernel_size=(3, 5, 7, 9))": (30_100_094, 5_081_521_664),
    "epsanet101_large(kernel_size=(3, 5, 7, 9))": (53_742_470, 9_708_289_536),
}


@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.label)
def test_no_number_moves_and_every_difference_is_explained(entry):
    row = measure(entry)
    assert (round(row.parameters * 1e6), round(row.multiply_adds * 1e9)) == COUNTED[entry.label]
    assert not row.unexplained
    if entry.name in ("sknet50", "epsanet50", "epsanet101"):
        assert max(abs(row.parameters_difference), abs(row.multiply_adds_difference)) < 0.5


def test_command(tmp_path, capsys):
    file = tmp_path / "audit.json"
    with pytest.raises(SystemExit) as stop:
        main(["audit", "--json", str(file)])
    assert stop.value.code == 0
    said = capsys.readouterr().out
    assert "27.49" in said
    assert "3.620" in said
    content = json.loads(file.read_text())
    assert [row["network"] for row in content["rows"]] == [entry.label for entry in ENTRIES]
    assert content["rows"][3]["published_multiply_adds"] == 4.47


def test_an_unexplained_difference_fails(capsys):
    entry = replace(next(e for e in ENTRIES if e.name == "sknet26"), parameters=16.0)
    assert not audit(entries=[entry])
    assert "sknet26 differs by more than 1%, and nothing explains it." in capsys.readouterr().out


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["audit", "--json", str(tmp_path / "no" / "audit.json")])
    assert stop.value.code == 2
    assert "no such folder" in capsys.readouterr().err
