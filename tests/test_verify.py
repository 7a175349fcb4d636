import json
import os
import zipfile
import zlib

import numpy as np
import pytest
import torch

from visattn import cli
from visattn.ops import dual, external, multihead, pyramid_squeeze, selective_kernel
from visattn.registry import MECHANISMS
from visattn.verify import SHIPPED, check_case, load_cases
from visattn.verify.check import skip_reason

CASES = load_cases(SHIPPED)
CHECKED = [case for case in CASES if skip_reason(case, MECHANISMS) is None]
CPU = torch.device("cpu")


def verify(*arguments, capsys=None):
    """Exit code and output of the command."""
    with pytest.raises(SystemExit) as exit_:
        cli.main(["verify", *map(str, arguments)])
    captured = capsys.readouterr()
    return exit_.value.code, captured.out, captured.err


@pytest.fixture
def run(capsys):
    return lambda *arguments: verify(*arguments, capsys=capsys)


# ---- the shipped cases ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CHECKED, ids=lambda case: case.name)
def test_every_shipped_case_in_float64(case):
    result = check_case(case, device=CPU, debug=True)
    assert result.reasons == []
    assert result.verdict == "passed"
    compared = {name for name in case.expected if not name.endswith("_nan_rows")}
    assert compared <= result.errors.keys()
    assert max(result.errors.values()) < 1e-10


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_the_command_passes(dtype, run, tmp_path):
    code, out, err = run("--dtype", dtype, "--json", tmp_path / "result.json")
    assert (code, err) == (0, "")
    assert "50 passed" in out
    assert ", 0 failed, 9 skipped on cpu" in out
    content = json.loads((tmp_path / "result.json").read_text())
    assert content["dtype"] == dtype
    assert content["device"] == "cpu"
    assert (content["passed"], content["failed"], content["skipped"]) == (50, 0, 9)
    assert content["versions"].keys() == {"visattn", "torch", "numpy", "python"}
    assert len(content["cases"]) == 59
    by_name = {case["case"]: case for case in content["cases"]}
    assert by_name["pam_a"]["source"]["commit"] == "b0a0fa008148f102321cdaa7ca38fb0ddd0239d1"
    assert by_name["pam_a"]["errors"].keys() == {
        "out",
        "grad_x",
        "grad:gamma",
        "grad:query_conv.weight",
        "grad:value_conv.weight",
    }
    assert by_name["danet_head_train"]["largest"].keys() == {
        "outputs",
        "input_gradients",
        "parameter_gradients",
        "buffers",
    }
    assert by_name["danet50_eval"]["verdict"] == "skipped"
    assert bool(by_name["pam_a"]["budget_used"]) == (dtype != "float64")
    assert max(max(case["float64_errors"].values()) for case in content["cases"] if case["errors"]) < 1e-10
    assert list(tmp_path.iterdir()) == [tmp_path / "result.json"]


def test_exactly_nine_cases_are_skipped_each_with_its_reason(run):
    reasons = {case.name: skip_reason(case, MECHANISMS) for case in CASES if case not in CHECKED}
    assert {name: reason.split(" is ")[0].split(" ")[0] for name, reason in reasons.items()} == {
        "eanet50_eval": "EANet",
        "danet50_eval": "DANet",
        "sknet26_eval": "SKNet26",
        "epsanet50_eval": "epsanet50",
        "skunit_dilated_eval": "SKUnit",
        "skunit_train": "SKUnit",
        "sk_resnet_block": "a",
        "sk_timm_split_eval": "split_input=True",
        "sk_timm_split_groups": "split_input=True",
    }
    _, out, _ = run("pyramid_squeeze", "skunit_train")
    assert "pyramid_squeeze/epsanet50_eval: epsanet50 is a whole network: visattn verify --networks checks it" in out
    assert "selective_kernel/skunit_train: SKUnit is the unit of a network: visattn verify --networks checks it" in out


def test_names_choose_mechanisms_aliases_forms_and_cases(run):
    code, out, _ = run("psa_custom", "mha_self")
    assert code == 0
    assert "2 passed" in out
    for name in ("ea", "external", "external_tokens"):
        assert "8 passed" in run(name)[1]


def test_published_nan_rows_state_what_is_given_instead(run):
    code, out, _ = run("mha_mask_full_row")
    assert code == 0
    assert "the published code gives NaN where a query's keys are all masked" in out
    (case,) = (case for case in CASES if case.name == "mha_mask_full_row")
    assert np.isnan(case.expected["out"]).any()
    errors = check_case(case, device=CPU).errors
    assert {"out", "grad_queries", "grad_keys", "grad_values", "grad:fc_q.weight", "grad:fc_o.bias"} <= errors.keys()


def test_only_skipped_cases_are_no_success(run):
    code, out, _ = run("eanet50_eval")
    assert code == 1
    assert "Nothing was verified" in out


# ---- broken blocks --------------------------------------------------------------------------------------------------


def swapped_axis(logits, eps):
    attention = logits.softmax(dim=-2)
    return attention / (eps + attention.sum(dim=-1, keepdim=True))


def swapped_branches(features, gates, *_):
    weights = gates.softmax(dim=1)[..., None, None]
    return torch.cat([feature * weights[:, i] for i, feature in enumerate(features)], dim=1)


def not_inverted(flat, inverted, by):
    return (flat @ flat.transpose(1, 2)).softmax(dim=-1)


def over_keys_axis(query, key, value, *_):
    return (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-2) @ value


def unweighted(features, logits, *_):
    return torch.stack(list(features), dim=1).mean(dim=1)


BROKEN = {
    "wrong softmax axis": (external, ("_double_normalize", "_double_normalize_reference"), swapped_axis, "external"),
    "swapped branch order": (pyramid_squeeze, ("_auto", "_reference"), swapped_branches, "pyramid_squeeze"),
    "swapped branch order, one implementation": (pyramid_squeeze, ("_auto",), swapped_branches, "pyramid_squeeze"),
    "swapped branch order, the reference": (pyramid_squeeze, ("_reference",), swapped_branches, "pyramid_squeeze"),
    "channel attention not inverted": (dual, ("_weights_of",), not_inverted, "cam_a"),
    "softmax over queries": (multihead._MULTIHEAD, ("auto", "reference"), over_keys_axis, "mha_self"),
    "branches not weighed": (selective_kernel, ("_select", "_select_reference"), unweighted, "selective_kernel"),
}


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_block_fails(what, dtype, run, monkeypatch):
    module, names, broken, chosen = BROKEN[what]
    for name in names:
        (monkeypatch.setitem if isinstance(module, dict) else monkeypatch.setattr)(module, name, broken)
    code, out, _ = run(chosen, "--dtype", dtype)
    assert code == 1
    assert "failed" in out
    assert "in float64, allowed 1e-10" in out


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_every_implementation_is_checked_when_asked_for(dtype, run, monkeypatch):
    code, out, _ = run("--impl", "all", "--dtype", dtype)
    assert code == 0
    assert 'impl="fused" is not checked: torch\'s kernels know no attention_weights' in out
    monkeypatch.setitem(dual._CHANNEL, "plain", lambda x, gamma, inverted: x)
    assert run("cam_a")[0] == 0
    code, out, _ = run("cam_a", "--impl", "all", "--dtype", dtype)
    assert code == 1
    assert '(impl="plain")' in out


def test_one_implementation_by_name(run):
    code, out, _ = run("--impl", "pieces")
    assert code == 0
    assert "its block has no implementation 'pieces'" in out
    code, _, error = run("--impl", "turbo")
    assert code == 2
    assert "unknown implementation 'turbo'. Choose from all, auto, buffered, channels_last, fused" in error


def test_a_broken_gradient_fails(run, monkeypatch):
    def detached(x, gamma, inverted):
        flat = x.flatten(2)
        energies = (flat @ flat.transpose(1, 2)).detach()
        return x + gamma * ((-energies if inverted else energies).softmax(dim=-1) @ flat).view(x.shape)

    monkeypatch.setitem(dual._CHANNEL, "auto", detached)
    code, out, _ = run("cam_a")
    assert code == 1
    assert "cam_a: grad_x: relative error" in out
    assert "cam_a: out:" not in out


def test_a_block_that_wastes_precision_fails_below_float64_only(run, monkeypatch):
    exact, excite = pyramid_squeeze._auto, pyramid_squeeze._excite

    def wasted(x):
        return x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x

    def by_kernels(means, squeeze):
        tape = excite(means, squeeze)
        return tape._replace(weights=wasted(tape.weights))

    monkeypatch.setattr(pyramid_squeeze, "_excite", by_kernels)
    monkeypatch.setattr(
        pyramid_squeeze, "_auto", lambda features, gates, layout: exact(features, wasted(gates), layout)
    )
    assert run("psa_default")[0] == 0
    code, out, _ = run("psa_default", "--dtype", "float32")
    assert code == 1
    assert "times the budget in float32" in out


def test_a_block_that_raises_fails_with_its_message_and_with_debug_its_traceback(run, monkeypatch):
    def raising(*_):
        raise RuntimeError("no such kernel\nsecond line")

    monkeypatch.setitem(dual._CHANNEL, "auto", raising)
    code, out, _ = run("cam_a", "cam_soft")
    assert code == 1
    assert "failed dual/cam_a: RuntimeError: no such kernel\n" in out
    assert "0 passed (within 1e-10), 2 failed, 0 skipped on cpu" in out
    with pytest.raises(RuntimeError, match="no such kernel"):
        cli.main(["verify", "cam_a", "--debug"])


# ---- cases of the user's ---------------------------------------------------------------------------------------------


def numbers(case, key, shape):
    seed = zlib.crc32(f"{case}/{key}".encode()) & 0x7FFFFFFF
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).requires_grad_()


def token_case(folder, case="ours", tokens=6, dim=5, slots=3, mechanism="external", **changes):
    """Record the published token form by its formula, and return the paths of the case."""
    x, mk, mv = (
        numbers(case, key, shape)
        for key, shape in (("input:x", (2, tokens, dim)), ("mk.weight", (slots, dim)), ("mv.weight", (dim, slots)))
    )
    attention = torch.softmax(torch.einsum("bnc,sc->bns", x, mk), dim=1)
    attention = attention / attention.sum(dim=2, keepdim=True)
    out = torch.einsum("bns,cs->bnc", attention, mv)
    (out * numbers(case, "cotangent:out", tuple(out.shape))).sum().backward()
    normal = {"kind": "normal", "scale": 1.0}
    meta = {
        "mechanism": mechanism,
        "case": case,
        "source": {"repo": "someone/else", "commit": "0123456789abcdef", "file": "ea.py", "class": "ExternalAttention"},
        "constructor": {"d_model": dim, "S": slots},
        "forward": {
            "call": "module(x)",
            "inputs": [{"name": "x", "shape": list(x.shape), "fill": normal}],
            "outputs": [{"name": "out", "shape": list(out.shape), "fill": normal}],
        },
        "mode": "eval",
        "state": [
            {"name": "mk.weight", "shape": list(mk.shape), "fill": normal},
            {"name": "mv.weight", "shape": list(mv.shape), "fill": normal},
        ],
        "sampled": {"grad:mk.weight": 4},
        "notes": "",
        **changes,
    }
    arrays = {
        "out": out.detach().numpy(),
        "grad_x": x.grad.numpy(),
        "grad:mk.weight": mk.grad.numpy().reshape(-1)[::4],
        "grad:mv.weight": mv.grad.numpy(),
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{case}.json").write_text(json.dumps(meta))
    np.savez(folder / f"{case}.npz", **arrays)
    return folder / f"{case}.json", folder / f"{case}.npz"


def rewrite(npz, **changes):
    with np.load(npz) as file:
        arrays = {**dict(file), **changes}
    np.savez(npz, **{name: array for name, array in arrays.items() if array is not None})


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_cases_of_another_folder(dtype, run, tmp_path):
    token_case(tmp_path / "deep" / "er", "ours")
    token_case(tmp_path / "wide", "other", tokens=11, dim=7, slots=13)
    code, out, _ = run("--cases", tmp_path, "--dtype", dtype)
    assert code == 0, out
    assert "2 passed" in out
    assert "someone/else ExternalAttention @ 0123456" in out
    assert "1 passed" in run("--cases", tmp_path, "other")[1]


def test_a_mechanism_that_does_not_exist_here_yet_is_skipped_and_nothing_checked_is_no_success(run, tmp_path):
    token_case(tmp_path, "theirs", mechanism="triplet")
    code, out, _ = run("--cases", tmp_path)
    assert code == 1
    assert "triplet/theirs: visattn has no mechanism 'triplet' yet" in out
    assert "Nothing was verified" in out
    token_case(tmp_path, "ours")
    code, out, _ = run("--cases", tmp_path)
    assert code == 0
    assert "1 passed (within 1e-10), 0 failed, 1 skipped" in out


def change(array):
    array = array.copy()
    array.reshape(-1)[-1] += 1e-8
    return array


@pytest.mark.parametrize("name", ["out", "grad_x", "grad:mk.weight", "grad:mv.weight"])
def test_a_recording_that_differs_in_one_number_fails(name, run, tmp_path):
    _, npz = token_case(tmp_path)
    with np.load(npz) as file:
        changed = change(file[name])
    rewrite(npz, **{name: changed})
    code, out, _ = run("--cases", tmp_path)
    assert code == 1
    assert f"failed external/ours: {name}: relative error" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"out": None}, "the recording has no 'out'"),
        ({"grad_x": None}, "the recording has no 'grad_x'"),
        ({"surplus": np.ones(2)}, "'surplus' is recorded, but the format has no array of that name"),
        ({"grad:nothing": np.ones(2)}, "grad:nothing: recorded, but our block has none"),
        ({"out": np.ones((2, 6, 4))}, "'out' is recorded as [2, 6, 4], the case says [2, 6, 5]"),
        ({"out": np.full((2, 6, 5), np.nan)}, "out: relative error inf"),
        ({"out_nan_rows": np.ones((2, 6), bool)}, "'out_nan_rows' does not mark the rows of NaN in the output"),
    ],
)
def test_arrays_that_lack_or_cannot_be_compared_fail(changes, message, run, tmp_path):
    _, npz = token_case(tmp_path)
    rewrite(npz, **changes)
    code, out, _ = run("--cases", tmp_path)
    assert code == 1
    assert f"failed external/ours: {message}" in out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"constructor": {"d_model": 5, "S": 3, "dropout": 0.5}}, "unexpected keyword argument 'dropout'"),
        ({"constructor": {"d_model": 5, "S": 4}}, "size mismatch for mk.weight"),
        ({"constructor": {"S": 3}}, "missing a required argument: 'd_model'"),
        (
            {"source": {"repo": "a/b", "commit": "c", "file": "d", "class": "EANet101"}},
            "no block of 'external' stands for the published class 'EANet101'",
        ),
        (
            {"forward.call": "module.train()"},
            "call 'module.train()' is not of the form module(input, ..., name=input, ...)",
        ),
        ({"forward.call": "module(y)"}, "call 'module(y)' does not use exactly the inputs ['x']"),
        ({"forward.call": "module(x, mask=x)"}, "got an unexpected keyword argument 'mask'"),
    ],
)
def test_a_case_that_nothing_serves_fails_with_its_reason(changes, message, run, tmp_path):
    path, _ = token_case(tmp_path)
    meta = json.loads(path.read_text())
    for key, value in changes.items():
        if key == "forward.call":
            meta["forward"]["call"] = value
        else:
            meta[key] = value
    path.write_text(json.dumps(meta))
    code, out, err = run("--cases", tmp_path)
    assert (code, err) == (1, "")
    assert message in " ".join(out.split())
    assert "0 passed (within 1e-10), 1 failed" in out


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extrenal"], "unknown mechanism or case 'extrenal'. Did you mean external?"),
        (["zzz"], "unknown mechanism or case 'zzz'. Choose from dual, external, multihead,"),
        (["--dtype", "int8"], "unknown dtype 'int8'. Choose from float64, float32, bfloat16, float16"),
        (["--device", "gpu"], "unknown device 'gpu'. Devices here: cpu"),
        (["--device", "meta"], "verify runs on cpu and cuda, got device 'meta'. Devices here: cpu"),
        (["--device", "cuda:99"], "no device 'cuda:99' here. Devices here: cpu"),
        (["--cases", "no/such"], "no such folder: no/such"),
        (["--cases", __file__], f"not a folder: {__file__}. Give the folder that holds the cases"),
        (["--json", "no/such/file.json"], "no such folder: no/such"),
        (["--json", "."], ". is a folder. Give the name of a file for --json"),
    ],
)
def test_bad_arguments_get_one_line(arguments, message, run):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"visattn: {message}")
    assert err.count("\n") == 1


def test_the_json_replaces_files_alone(run, tmp_path):
    pipe, link, target = tmp_path / "pipe", tmp_path / "link", tmp_path / "target.json"
    os.mkfifo(pipe)
    code, _, err = run("cam_a", "--json", pipe)
    assert (code, err) == (2, f"visattn: {pipe} is not a regular file. Give the name of a file for --json\n")
    assert pipe.is_fifo()
    link.symlink_to(target)
    assert run("cam_a", "--json", link)[0] == 0
    assert link.is_symlink()
    assert json.loads(target.read_text())["passed"] == 1
    code, _, err = run("cam_a", "--json", tmp_path / ("a" * 300))
    assert code == 2
    assert err.endswith("(File name too long)\n")


def test_an_empty_folder_and_a_mechanism_without_cases(run, tmp_path):
    code, _, err = run("--cases", tmp_path)
    assert code == 2
    assert err == f"visattn: no recorded case in {tmp_path}: a case is a .json beside a .npz\n"
    token_case(tmp_path)
    code, _, err = run("--cases", tmp_path, "dual")
    assert code == 2
    assert err == "visattn: no case of 'dual' among the recorded cases\n"


def damaged(path, npz, how):
    meta = json.loads(path.read_text())
    if how == "pickle":
        rewrite(npz, out=np.array([{"a": 1}], dtype=object))
    elif how == "no npz":
        npz.unlink()
    elif how == "no json":
        path.unlink()
    elif how == "broken npz":
        npz.write_bytes(npz.read_bytes()[:200])
    elif how == "not npz":
        npz.write_bytes(b"hello")
    elif how == "no array":
        with zipfile.ZipFile(npz, "a") as archive:
            archive.writestr("text.txt", "hello")
    elif how == "broken json":
        path.write_text("{")
    elif how == "binary json":
        path.write_bytes(b"\xff\xfe\x00")
    elif how == "deep json":
        path.write_text("[" * 100_000)
    elif how == "list":
        path.write_text("[]")
    else:
        how(meta)
        path.write_text(json.dumps(meta))


DAMAGE = [
    ("pickle", "holds Python objects, which are never unpickled"),
    ("no npz", "ours.npz: missing; a case is a .json beside a .npz"),
    ("no json", "ours.npz: recorded arrays without their ours.json"),
    ("broken npz", "ours.npz: broken ("),
    ("not npz", "ours.npz: broken ("),
    ("no array", "ours.npz: 'text.txt' is not an array of numbers"),
    ("broken json", "ours.json: not valid JSON ("),
    ("binary json", "ours.json: not valid JSON ("),
    ("deep json", "ours.json: not valid JSON ("),
    ("list", "ours.json: not a recorded case: an object is needed"),
    (lambda m: m.pop("state"), "not a recorded case: no 'state'"),
    (lambda m: [m.pop("mode"), m.pop("source")], "not a recorded case: no 'source', 'mode'"),
    (lambda m: m.update(case="a\nb"), "'mechanism' and 'case' must be names"),
    (lambda m: m["source"].pop("commit"), "'source' needs 'repo', 'commit', 'file' and 'class'"),
    (lambda m: m.update(constructor=[]), "'constructor' must be an object of keyword arguments"),
    (lambda m: m.update(mode="test"), "'mode' must be 'eval' or 'train', got 'test'"),
    (lambda m: m["forward"].pop("call"), "'forward' needs 'call', the call as text"),
    (lambda m: m["forward"].update(outputs=[]), "'forward' needs a list of 'outputs'"),
    (lambda m: m["forward"]["inputs"][0].pop("name"), "an entry of 'inputs' has no name"),
    (lambda m: m["forward"]["inputs"][0].update(shape=[2.5]), "inputs 'x': 'shape' must be a list of whole numbers"),
    (lambda m: m["forward"]["inputs"][0].update(shape=[10**6, 10**6]), "inputs 'x': [1000000, 1000000] is too large"),
    (lambda m: m["state"][0].update(fill={"kind": "random"}), "state 'mk.weight': 'fill' needs a kind out of normal,"),
    (lambda m: m["state"][0].update(fill={"kind": "normal"}), "fill 'normal' needs a number 'scale', got None"),
    (lambda m: m["state"][0].update(dtype="object"), "dtype must be one of float64, int64, got 'object'"),
    (lambda m: m["state"].append(m["state"][0]), "state 'mk.weight' is there twice"),
    (
        lambda m: m["state"][1].update(fill={"kind": "permute", "of": "mk", "axes": [1, 0]}),
        "permutes 'mk', which is not an earlier state array",
    ),
    (
        lambda m: m["state"][1].update(fill={"kind": "permute", "of": "mk.weight", "axes": [0, 0]}),
        "'axes' must name each axis once, got [0, 0]",
    ),
    (
        lambda m: m["forward"]["inputs"][0].update(fill={"kind": "mask", "threshold": 0, "full_rows": [[9]]}),
        "'full_rows' must be indices into [2, 6, 5], got [[9]]",
    ),
    (lambda m: m.update(sampled={"out": 0}), "'sampled' must give a whole number above 0 for each array"),
]


@pytest.mark.parametrize(("how", "message"), DAMAGE, ids=[message[:60] for _, message in DAMAGE])
def test_a_malformed_case_gets_one_line(how, message, run, tmp_path):
    token_case(tmp_path / "good", "good")
    damaged(*token_case(tmp_path / "bad"), how)
    code, out, err = run("--cases", tmp_path, "--json", tmp_path / "result")
    assert (code, out) == (2, "")
    assert err.startswith(f"visattn: {tmp_path / 'bad'}")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "result").exists()


def test_debug_shows_the_traceback_of_bad_input():
    from visattn.errors import UserError

    with pytest.raises(UserError, match="no such folder"):
        cli.main(["verify", "--cases", "no/such", "--debug"])


def test_the_json_of_a_failure_is_written_and_valid(run, tmp_path):
    _, npz = token_case(tmp_path / "cases")
    rewrite(npz, out=np.full((2, 6, 5), np.nan))
    code, _, _ = run("--cases", tmp_path / "cases", "--json", tmp_path / "result.json")
    assert code == 1
    (case,) = json.loads((tmp_path / "result.json").read_text())["cases"]
    assert case["verdict"] == "failed"
    assert case["errors"]["out"] is None
    assert case["reasons"][0].startswith("out: relative error inf")


def test_tf32_settings_are_put_back(run):
    before = torch.backends.cuda.matmul.allow_tf32
    try:
        torch.backends.cuda.matmul.allow_tf32 = True
        assert run("se_weight_r4")[0] == 0
        assert torch.backends.cuda.matmul.allow_tf32 is True
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
