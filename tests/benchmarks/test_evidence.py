"""The evidence on a small network: the same code as the full run, in seconds."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from fwm_audit import verify
from tests.benchmarks import baselines, edits, evidence, networks


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The slice, run once: folder, network, and one row for each state, seed and method."""
    out = tmp_path_factory.mktemp("evidence")
    folder = out / "slice"
    folder.mkdir()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a network this small gains nothing from a second one, and a busy machine loses much
    network = networks.load("slice", folder)
    evidence.measure(network, folder, None, math.inf)
    evidence.write_tables(out)
    yield out, network, evidence.rows_of(out)
    torch.set_num_threads(threads)


def of(rows, **wanted):
    return [row for row in rows if all(row[name] == value for name, value in wanted.items())]


def test_mirrored_pairs_notice_every_edit_that_must_be_noticed(measured):
    out, network, rows = measured
    assert network.accuracy > 0.9
    mirror = [row for row in of(rows, kind="edit", method="mirror") if row["elements_changed"]]
    required = [row for row in mirror if row["required"]]
    families = {"SGD, train mode", "SGD, eval mode", "last layer only", "batch norm statistics", "pruning", "noise"}
    assert {row["family"] for row in required} >= families | {"another model", "poisoning", "quantisation"}
    assert [row["edit"] for row in required if not row["detected"]] == []
    # The others are noticed as often as the key says, and every miss has its reason.
    bits = [row for row in mirror if row["predicted"] is not None]
    assert len(bits) == 3 * 7 * network.bit_tries
    assert sum(row["detected"] for row in bits) / len(bits) > min(row["predicted"] for row in bits) - 0.2
    missed = [row for row in mirror if not row["detected"]]
    assert {row["miss"] for row in missed} <= {"no logit moved", "moved less than delta"}
    assert pq.read_table(out / "evidence.parquet").num_rows == len(rows)


def test_baselines_are_measured_on_the_same_edits_and_notice_fewer(measured):
    _, network, rows = measured
    required = [row for row in of(rows, kind="edit", required=True) if row["elements_changed"]]
    shares = {m: sum(r["detected"] for r in of(required, method=m)) for m in network.methods}
    assert {len(of(required, method=method)) for method in network.methods} == {len(of(required, method="mirror"))}
    assert all(shares[method] < shares["mirror"] for method in network.methods if method != "mirror")
    swapped = of(required, family="another model")
    assert len(swapped) == len(network.methods)
    assert all(row["detected"] for row in swapped if row["method"] != "random noise")


def test_no_false_alarm(measured):
    _, _, rows = measured
    benign = of(rows, kind="benign", method="mirror")
    run = [change.name for change in edits.BENIGN if torch.cuda.is_available() or not change.elsewhere]
    assert {row["edit"] for row in benign} == {*run}
    assert len(benign) >= 25
    assert [row["edit"] for row in benign if row["detected"]] == []


def test_an_edit_is_the_same_again_and_leaves_the_released_model_alone(measured):
    _, network, _ = measured
    before = copy.deepcopy(network.model)
    one_of_each = {edit.family: edit for edit in edits.EDITS if edit.name != "epoch"}
    for edit in one_of_each.values():
        first, second = (
            [(state, copy.deepcopy(model)) for model, state in edits.edited_states(edit, network, 1)] for _ in range(2)
        )
        for (state, one), (other_state, two) in zip(first, second, strict=True):
            assert state == other_state
            assert edits.changed_elements(one, two) == 0
    assert edits.changed_elements(before, network.model) == 0


def test_a_single_bit_edit_changes_the_element_it_names(measured):
    _, network, _ = measured
    for edit in (edit for edit in edits.EDITS if edit.family == "single bit or weight"):
        ((model, state),) = edits.edited_states(edit, network, 3)
        assert edits.changed_elements(network.model, model) == 1
        old, new = (dict(m.named_parameters())[state.tensor].data.view(-1)[state.index] for m in (network.model, model))
        if state.bit >= 0:
            assert int(old.view(torch.int32) ^ new.view(torch.int32)) & 0xFFFFFFFF == 1 << state.bit
        else:
            assert new == old * torch.tensor(1 + 1e-3)


def test_interrupted_runs_go_on_and_give_the_same_table(measured, tmp_path):
    """A torn last line is cut off, its try done again, nothing else."""
    out, network, rows = measured
    folder = tmp_path / "slice"
    folder.mkdir()
    for path in (out / "slice").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    lines = (folder / "results.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "results.jsonl").write_bytes(b"".join(lines[:-3]) + lines[-3][:40])
    assert len(evidence.read_results(folder / "results.jsonl")) == len(lines) - 3
    evidence.measure(network, folder, None, time.monotonic() - 1)  # no time: cuts, but measures nothing
    assert (folder / "results.jsonl").read_bytes() == b"".join(lines[:-3])
    evidence.measure(network, folder, None, math.inf)
    evidence.write_tables(tmp_path)
    assert evidence.rows_of(tmp_path) == rows
    assert (tmp_path / "evidence.md").read_text() == (out / "evidence.md").read_text()


def test_a_method_can_be_added_to_finished_tries(measured, tmp_path):
    """As for `yin2022`, whose triggers take hours on a CPU: what was measured stays, what is new is added."""
    out, network, rows = measured
    folder = tmp_path / "slice"
    folder.mkdir()
    for path in (out / "slice").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    results = evidence.read_results(folder / "results.jsonl")
    for result in results:
        result["rows"] = [row for row in result["rows"] if row["method"] != "ftg"]
    (folder / "results.jsonl").write_text("".join(json.dumps(result) + "\n" for result in results))
    few = tuple(method for method in network.methods if method != "ftg")
    evidence.measure(dataclasses.replace(network, methods=few), folder, None, math.inf)
    assert evidence.read_results(folder / "results.jsonl") == results
    # By two processes that share the tries.
    for part in (1, 2):
        evidence.measure(network, folder, None, math.inf, share=(part, 2))
    shares = [len(evidence.read_results(folder / f"results-{part}-of-2.jsonl")) for part in (1, 2)]
    assert min(shares) > 0
    assert abs(shares[0] - shares[1]) <= 1

    def order(row):
        return [str(row[name]) for name in ("kind", "edit", "seed", "method")]

    assert sorted(evidence.rows_of(tmp_path), key=order) == sorted(rows, key=order)
    assert json.loads((folder / "network.json").read_text())["methods"] == list(network.methods)


def test_every_edit_has_its_first_try_before_any_has_its_second(measured):
    _, network, _ = measured
    plan = list(evidence.tasks(dataclasses.replace(network, tries=20, bit_tries=20, long_tries=5), 20))
    seeds = [task.seed for task in plan if task.kind == "edit"]
    assert seeds == sorted(seeds)
    half = plan[: len(plan) // 2]
    benign = [task for task in plan if task.kind == "benign"]
    assert len(benign) >= 300
    assert abs(sum(task.kind == "benign" for task in half) / len(benign) - 0.5) < 0.1
    assert len({task.key for task in plan}) == len(plan)


def test_why_an_edit_was_missed(measured, tmp_path):
    """A weight that no logit depends on, and one that moves them by less than delta."""
    out, network, _ = measured
    methods = baselines.make(network, out / "slice")
    dead = dataclasses.replace(network, model=copy.deepcopy(network.model))
    dead.model[1].weight.data[0] = -0.0  # batch norm answers its bias, whatever the convolution says
    dead.model[1].bias.data[0] = -1.0  # and the rectifier nothing
    untouched = dataclasses.replace(methods, logits=baselines.exact_logits(dead.model, methods.mirror))
    edited = copy.deepcopy(dead.model)
    edited[0].weight.data[0, 0, 0, 0] += 0.1
    assert untouched.explain(edited) == baselines.Missed("no logit moved", 0.0)

    nudged = copy.deepcopy(network.model).double()
    nudged[-1].bias.data[int(methods.mirror.classes[0, 0])] += methods.delta / 100
    assert verify(nudged, methods.mirror).verdict == "intact"
    assert methods.explain(nudged).reason == "moved less than delta"
    assert methods.explain(nudged).moved == pytest.approx(methods.delta / 100, rel=0.1)
    nudged[-1].bias.data[int(methods.mirror.classes[0, 0])] += methods.delta * 3
    assert verify(nudged, methods.mirror).verdict == "tampered"
    assert methods.explain(nudged).reason == "moved more than delta"


def test_an_edit_that_left_the_function_alone_is_told_and_left_out(measured):
    _, network, rows = measured
    model = copy.deepcopy(network.model)
    assert evidence.moved_by(network, model) == 0
    with torch.no_grad():
        model.get_submodule(network.head).bias[0] += 1e-6
    assert evidence.moved_by(network, model) > 0
    row = next(row for row in of(rows, kind="edit", method="mirror", required=True) if row["elements_changed"])
    idle = row | {"detected": False, "plain_moved": 0.0, "seed": 99}
    assert evidence._edits([row, idle]) == [row]
    assert evidence._edits([row | {"detected": False, "plain_moved": 1e-12}])
    described = evidence.descriptions(measured[0])["slice"]
    text = "\n".join(evidence._network_section(described, [*rows, idle]))
    assert f"left out: {row['edit']} (1)." in text


def test_the_prediction_for_the_last_bit_is_the_coverage_in_the_key(measured):
    out, network, _ = measured
    methods = baselines.make(network, out / "slice")
    for drawn_from, expected in (
        ("any parameter", methods.mirror.coverage.total),
        ("a last-layer weight", methods.mirror.coverage.layers["8.weight"]),
    ):
        last, sign = (
            methods.predicted(network, edits.Edited(f"{bit} of {drawn_from}", population=drawn_from))
            for bit in ("mantissa bit 0", "sign bit")
        )
        assert last == pytest.approx(expected, abs=2e-3)
        assert sign >= last
    assert methods.predicted(network, edits.Edited("")) is None


@pytest.mark.parametrize(
    ("successes", "tries", "low", "high"),
    # Closed forms at the ends: 1 - (alpha / 2)^(1 / n); the others from tables of Clopper and Pearson (1934).
    [(0, 10, 0, 0.3085), (10, 10, 0.6915, 1), (5, 10, 0.1871, 0.8129), (1, 20, 0.0013, 0.2487), (0, 0, 0, 1)],
)
def test_interval(successes, tries, low, high):
    assert evidence.interval(successes, tries) == pytest.approx((low, high), abs=5e-5)


def test_intervals_of_many_tries_narrow_round_the_share():
    for tries in (100, 1000, 5000):
        low, high = evidence.interval(tries // 4, tries)
        assert low < 0.25 < high
        assert (high - low) == pytest.approx(2 * 1.96 * math.sqrt(0.25 * 0.75 / tries), rel=0.1)


def test_baseline_inputs_are_within_the_input_range(measured):
    out, network, _ = measured
    low, high = network.input_range
    for inputs in baselines.make(network, out / "slice").inputs.values():
        assert inputs.shape == (baselines.COUNT, *network.input_shape)
        assert inputs.dtype == torch.float32
        assert low <= inputs.min()
        assert inputs.max() <= high


def test_ftg_and_ibsf_reach_what_they_descend_to(measured):
    """Each from the lowest-margin images: less variance of the probabilities, more entropy of the largest ones."""
    out, network, _ = measured
    probabilities = {
        method: baselines.forward(network.model, x).softmax(1)
        for method, x in baselines.make(network, out / "slice").inputs.items()
    }
    variance = {method: float(p.var(1).mean()) for method, p in probabilities.items()}
    entropy = {method: float(-(p * p.log()).sum(1).mean()) for method, p in probabilities.items()}
    assert variance["ftg"] < variance["lowest margin"] < variance["plain images"]
    assert entropy["ibsf"] > entropy["lowest margin"] > entropy["plain images"]


def test_sensitive_samples_raise_the_hidden_norm(measured):
    out, network, _ = measured
    inputs = baselines.make(network, out / "slice").inputs
    body = network.model[:-1]
    before, after = (body(inputs[m]).square().sum(1).mean() for m in ("lowest margin", "sensitive samples"))
    assert after > before


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "mobilenet_v3", "vit", "efficientnet_lite0"])
def test_permuted_channels_leave_every_architecture_alone(name):
    import timm
    import torchvision

    from jobs import digits

    torch.manual_seed(0)
    model, permute, shape = {
        "resnet20": lambda: (digits.resnet20(width=4), networks.permute_residual_blocks, (1, 28, 28)),
        "resnet18": lambda: (torchvision.models.resnet18(), networks.permute_residual_blocks, (3, 32, 32)),
        "mobilenet_v3": lambda: (
            torchvision.models.mobilenet_v3_small(), networks.permute_torchvision_bottlenecks, (3, 32, 32)
        ),
        "vit": lambda: (
            timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2),
            networks.permute_transformer_blocks,
            (3, 32, 32),
        ),
        "efficientnet_lite0": lambda: (
            timm.create_model("tf_efficientnet_lite0"), networks.permute_timm_bottlenecks, (3, 32, 32)
        ),
    }[name]()  # fmt: skip
    assert evidence.permuted_by(model.eval(), permute, torch.randn(2, *shape, dtype=torch.float64)) < 1e-9


def test_a_method_can_be_added_to_published_results(measured, tmp_path):
    """Tables alone are enough to go on from: nothing is measured again, and `mirror` needs no new triggers."""
    out, network, rows = measured
    few = [row for row in rows if row["method"] != "ftg"]
    pq.write_table(pa.Table.from_pylist(few, evidence.SCHEMA), tmp_path / "evidence.parquet")
    (tmp_path / "evidence.json").write_text((out / "evidence.json").read_text())
    folder = tmp_path / "slice"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes((out / "slice" / "model.safetensors").read_bytes())
    for _ in range(2):
        evidence.measure(dataclasses.replace(network, methods=("ftg",)), folder, None, math.inf)
    assert not list(folder.glob("*.fwmkey"))
    evidence.write_tables(tmp_path)
    columns = [name for name in evidence.SCHEMA.names if name not in {"predicted", "delta"}]  # those of `mirror`

    def values(every):
        return sorted([[str(row[name]) for name in columns] for row in every])

    assert values(evidence.rows_of(tmp_path)) == values(rows)
    first, second = (json.loads((path / "evidence.json").read_text())[0] for path in (out, tmp_path))
    assert {name: first[name] for name in ("methods", "delta", "coverage")} == {
        name: second[name] for name in ("methods", "delta", "coverage")
    }


def test_the_report_counts_alarms_and_shares(measured):
    out, network, rows = measured
    text = (out / "evidence.md").read_text()
    runs = len(of(rows, kind="benign", method="mirror"))
    assert f"| **in all** | {evidence._alarms(of(rows, kind='benign', method='plain images'))}" in text
    assert f"0 of {runs} (< {3 / runs:.2g}) |" in text
    assert "## Not reproduced from the paper" in text
    widths = [line.count("|") for line in text.splitlines()]
    for first, second in itertools.pairwise(widths):
        assert first == second or 0 in {first, second}
    described = json.loads((out / "slice" / "network.json").read_text())
    assert described["pairs"] == network.pairs
