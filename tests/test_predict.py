"""The model of times on a GPU: what is counted of a call, what a kernel takes, and that its tables are up to date."""

import json
import re

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdfast import bench

predict, devices, work = (bench.load(name) for name in ("predict", "devices", "work"))
H100 = devices.H100

if not predict.COUNTS.exists():
    pytest.skip("needs the source tree", allow_module_level=True)


# ---- what a call asks for --------------------------------------------------------------------------------------------
def recorded(function, *inputs, **options):
    with work.Recorder(inputs, **options) as recorder:
        function(*inputs)
    return recorder.records


def test_an_operation_reads_its_inputs_and_writes_its_result():
    x, row = torch.ones(8, 4), torch.ones(4)
    assert recorded(lambda x, row: x + row, x, row) == [{"op": "add", "bytes": 128 + 16 + 128, "fresh": 128 + 16}]
    assert recorded(lambda x: x.exp().sum(), x) == [
        {"op": "exp", "bytes": 256, "fresh": 128},
        {"op": "sum", "bytes": 128 + 4},
    ]
    assert recorded(lambda x: x.mul_(2), x) == [{"op": "mul_", "bytes": 256, "fresh": 128}]


def test_what_has_no_kernel():
    x = torch.ones(8, 4)
    assert recorded(lambda x: x.t().view(4, 2, 4)[0].detach(), x) == []
    assert recorded(lambda x: torch.empty_like(x).new_empty(3), x) == []
    expanded = torch.ones(1, 4).expand(8, 4)
    assert recorded(torch.sum, expanded) == [{"op": "sum", "bytes": 16 + 4, "fresh": 16}]


def test_a_gather_reads_what_it_gathers():
    table, index = torch.ones(1000, 4), torch.tensor([1, 2])
    assert recorded(lambda t, i: t[i], table, index) == [{"op": "index", "bytes": 32 + 16 + 32, "fresh": 32 + 16}]


def test_products_have_flops():
    a, b = torch.ones(8, 4), torch.ones(4, 16)
    (record,) = recorded(torch.mm, a, b)
    assert record["flops"] == 2 * 8 * 4 * 16 and record["dtype"] == "float32"


def test_formulas_of_fake_tensors():
    """Also where a mask decides a size, and with a backward."""
    with FakeTensorMode():
        x = torch.ones(8, 4, requires_grad=True)
        records = recorded(lambda x: x[x > 0].mean().backward(), x, all_of_masks=True)
    assert {"gt", "index", "mean", "div"} <= {record["op"] for record in records}


# ---- what a kernel takes ---------------------------------------------------------------------------------------------
KERNEL = {"launches": 1, "warps": 8 * 132, "at_once": 2, "clocks": 0}


def parts(hbm_bytes=0, **counts):
    return predict.kernel_seconds(KERNEL | counts, hbm_bytes, H100)


def test_issue():
    """A clock of the device issues 4 instructions on each of 132 multiprocessors; of a class, as many as its pipe."""
    all_slots, pipe = 132 * 4 * H100.clock, devices.PIPES["mufu"]
    assert parts(move=132_000)["issue"] == pytest.approx(132_000 / (H100.issued * all_slots))
    assert parts(mufu=132_000)["issue"] == pytest.approx(132_000 * pipe / all_slots)
    assert parts(move=132_000, warps=8)["issue"] == pytest.approx(132 * 132_000 / (H100.issued * all_slots))
    assert parts(banks=[1000, 320])["issue"] == pytest.approx(1320 / (132 * H100.clock))


def test_memory():
    assert parts(9e9)["HBM"] == pytest.approx(9e9 / (0.9 * 3.35e12))
    assert parts(loads=[1, 10**6, 10**6])["L2"] == pytest.approx(32e6 / H100.l2_rate)


def test_latency():
    """A round of blocks takes as long as its longest warp; several rounds one after another."""
    one = parts(trips=[8 * 132 * 3, 3])["latency"]
    assert one == pytest.approx(3 * H100.l2_clocks / H100.clock)
    far = parts(1, trips=[8 * 132 * 3, 3], far=8 * 132 * 3)["latency"]
    assert far == pytest.approx(3 * H100.hbm_clocks / H100.clock)
    assert parts(trips=[8 * 132 * 30, 3], warps=8 * 132 * 10)["latency"] == pytest.approx(5 * one)


def test_bytes_that_come_from_hbm():
    """Where all fits into L2, what an earlier op had; else what is read again, too."""
    kernels = {"a": {"loads": [0, 0, 3 * 10**6]}, "b": {"loads": [0, 0, 10**6]}}
    assert predict.hbm_bytes({"op": "x", "bytes": 4e6, "fresh": 1e6, "kernels": kernels}, H100) == [0.75e6, 0.25e6]
    assert predict.hbm_bytes({"op": "x", "bytes": 4e6, "kernels": kernels}, H100) == [0, 0]
    large = predict.hbm_bytes({"op": "x", "bytes": 96e6, "fresh": 96e6, "kernels": kernels}, H100)
    assert sum(large) == 96e6 + 32e6


def test_eager():
    product = ["mm", 100, 100, 67e9, "float32", 2]
    seconds, launches = predict.torch_seconds([product], H100)
    assert launches == 2 and seconds["matmul"] == pytest.approx(2 * 1e-3 / H100.product_reached)
    assert predict.torch_seconds([product], H100, tf32=True)[0]["matmul"] < seconds["matmul"] / 7
    assert seconds["launch"] == 2 * H100.launch


# ---- the tables ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "path", [predict.RESULTS / f"{name}{end}" for name in devices.DEVICES for end in (".json", ".md")]
)
def test_tables_are_up_to_date(path):
    assert predict.files()[path] == path.read_text(), "run `python -m benchmarks.predict`"


@pytest.mark.parametrize("name", devices.DEVICES)
def test_what_is_slower_is_said(name):
    """In the table of the device and in the page on CUDA; and every heading says that it is predicted."""
    results = json.loads((predict.RESULTS / f"{name}.json").read_text())
    text = (predict.RESULTS / f"{name}.md").read_text()
    assert results["predicted"] and all("redicted" in line for line in text.splitlines() if line.startswith("#"))
    page = predict.ROOT / "docs/cuda.md"
    texts = [re.sub(" +", " ", t) for t in (text[: text.index("TF32\n\n|")], text, page.read_text())]
    assert predict.slower(results, "eager") and predict.slower(results, "eager TF32")
    for over, where in (("eager", texts[0]), ("eager TF32", texts[1]), ("eager TF32", texts[2])):
        for row in predict.slower(results, over):
            assert f"| {row['loss']} | {predict.shape_of(row)} |" in where
    worst = [row["x eager"] for row in predict.slower(results, "eager")]
    assert worst == sorted(worst) and worst[-1] < 1


def test_beside_what_was_measured():
    case = json.loads((predict.RESULTS / "h200.json").read_text())["rows"][0]
    figure = {key: case[key] for key in ("loss", "shape", "dtype", "phase")} | {"implementation": "kdfast"}
    figure["median"] = 2.0 * case["kdfast"]["seconds"]
    results = {"machine": {"device": "NVIDIA H200"}, "figures": [figure, figure | {"loss": "another"}]}
    (error,) = predict.compared(results)
    assert error["log_ratio"] == pytest.approx(0.6931, abs=1e-3) and error["implementation"] == "kdfast"
    assert predict.compared_rows([error])[1][-1] == "2.00"
    for name in ("Tesla T4", "NVIDIA H100 PCIe"):
        assert predict.compared(results | {"machine": {"device": name}}) == []
    assert predict.of_device("NVIDIA H100 80GB HBM3")
