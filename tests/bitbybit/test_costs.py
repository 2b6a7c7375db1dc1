"""Counts of work against counts by hand, brute force, and each other; energies against their constants."""

import json
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import onnx
import pytest
import torch
from command_line import refused, rewrite
from networks import SmallResNet, hashed_network, write_artifact
from onnx import helper
from torch import nn

import bitbybit as bb
from bitbybit.artifact_costs import artifact_costs
from bitbybit.costs import COUNTS, LayerCost, NetworkCost, dot_cost, encode_cost, exact_cost, hashed_positions
from bitbybit.energy import EnergyConstants, compare_energy, float32_energy, hashed_energy, int8_energy
from bitbybit.model_costs import model_costs
from compiler import compile_model
from runtime.loader import load_model

pytest_plugins = ["command_fixtures"]

# Where the compiler fuses an activation or a residual, a module's own counts cannot show it.
OUTSIDE = {"float_additions", "traffic_bytes", "dense_additions", "dense_elements"}


def counted(model, shape):
    return artifact_costs(load_model(compile_model(model.eval(), shape).model_proto.SerializeToString()))


def by_name(costs):
    return {layer.name: layer for layer in costs.layers}


# by hand


def test_counts_a_pixel_tiled_layer_by_hand():
    module = nn.Sequential(nn.Conv2d(20, 6, 3, stride=2, padding=1))
    settings = {"hash_length": 12, "input_tile_size": 16, "output_tile_size": None, "tiling": "pixel", "centring": True}
    bb.patch_model(module, {"0": settings})
    module[0].centre.fill_(0.5)
    for costs in (model_costs(module, (20, 8, 8)), counted(module, (20, 8, 8))):
        layer = by_name(costs)["0"]
        assert layer.positions == 64 + 1  # all pad pixels are one vector
        assert (layer.tile_size, layer.smallest_tile, layer.tiles) == (16, 4, 2)
        assert layer.conversions == 65 * 2 * 12
        assert layer.analog_macs == 65 * 20 * 12
        assert layer.lookups == 16 * 6 * 9 * 2  # 4 x 4 outputs
        assert layer.lookup_bits == 12 * layer.lookups
        assert layer.macs == 65 * (20 + 2) + 2 * layer.lookups + 16 * 6
        assert layer.additions == 65 * 20
        assert layer.code_bytes == 6 * 9 * 2 * 2
        assert layer.weight_bytes == layer.code_bytes + 6 * 9 * 2 * 4 + 2 * 8 * 6 + 4 * 20
        assert layer.projection_bytes == 4 * 12 * 20
        assert layer.traffic_bytes == 4 * 20 * 64 + 2 * 100 * 2 * (2 + 4) + 4 * 6 * 16
        assert layer.dense_macs == 16 * 6 * 180
        assert layer.dense_weights == 6 * 180 + 6
        assert layer.dense_elements == 20 * 64 + 6 * 16
        assert layer.has_small_tile


def test_counts_a_patch_tiled_layer_by_hand():
    module = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1))
    bb.patch_model(module, {"0": {"hash_length": 8, "input_tile_size": 18, "output_tile_size": 4}})
    for costs in (model_costs(module, (4, 5, 5)), counted(module, (4, 5, 5))):
        layer = by_name(costs)["0"]
        assert layer.positions == 2 * 25  # each output tile hashes every window
        assert layer.conversions == 2 * 25 * 2 * 8
        assert layer.lookups == 25 * 6 * 2
        assert layer.analog_macs == 2 * 25 * 36 * 8
        assert layer.additions == 0
        assert layer.dense_elements == 4 * 25 + 6 * 25  # the exact layer reads its input once
        assert not layer.has_small_tile


def test_integer_arithmetic_counts_whole_numbers_and_small_norms():
    shared = {"arithmetic": "integer", "hash_length": 64, "features": 32}
    layer = encode_cost("a", **shared, tile_size=16, positions=10, grid=12, inputs=320, centred=True).plus(
        dot_cost("a", **shared, tiles=2, outputs=8, taps=9, positions=4, bounds=1, residual=True)
    )
    assert layer.integer_macs == 10 * (32 + 2) + 4 * 8 * 9 * 2  # one for each look-up, not two
    assert layer.float_macs == 4 * 8
    assert layer.integer_additions == 320 + 10 * 32
    assert layer.float_additions == layer.dense_additions == 2 * 4 * 8
    assert layer.table_bytes == 0
    assert layer.weight_bytes == 8 * 9 * 2 * 8 + 2 * 4 * 8
    assert layer.projection_bytes == 64 * 32
    assert layer.traffic_bytes == 4 * 320 + 2 * 12 * 2 * (8 + 1) + 2 * 4 * 32


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
def test_integer_layers_of_a_network_read_as_many_bits_as_float_ones(tiling):
    def network(arithmetic):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Conv2d(4, 6, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, 5))
        settings = {"hash_length": 16, "input_tile_size": 16, "output_tile_size": None, "tiling": tiling}
        bb.patch_model(module, {"common_params": settings | {"arithmetic": arithmetic}})
        return model_costs(module, (4, 6, 6)).total

    whole, real = network("integer"), network("float")
    for name in ("positions", "conversions", "analog_macs", "lookups", "code_bytes", "dense_macs", "dense_weights"):
        assert getattr(whole, name) == getattr(real, name), name
    assert whole.integer_macs > whole.float_macs > 0
    assert whole.projection_bytes * 4 == real.projection_bytes


@pytest.mark.parametrize("pads", [(0, 0, 0, 0), (1, 1, 1, 1), (0, 2, 3, 1)])
@pytest.mark.parametrize("strides", [(1, 1), (2, 1), (3, 2)])
def test_hashed_positions_are_the_distinct_pixels_that_are_met(pads, strides):
    top, left, bottom, right = pads
    image = np.arange(7 * 5).reshape(7, 5)
    padded = np.pad(image, ((top, bottom), (left, right)), constant_values=-1)
    met = padded[:: strides[0], :: strides[1]]
    assert hashed_positions((7, 5), met.shape, (top, left), strides, window=1) == len(np.unique(met))
    assert hashed_positions((7, 5), met.shape, (top, left), strides, window=9) == met.size


# two ways, one answer


@pytest.mark.parametrize("tiling", ["pixel", "patch"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"centring": False},
        {"output_tile_size": 5},
        {"hash_length": 31, "input_tile_size": 5},
        {"arithmetic": "integer"},
        {"arithmetic": "integer", "hash_length": 31, "input_tile_size": 5},
        {"arithmetic": "integer", "hash_length": 31, "input_tile_size": 5, "projection_bits": 4},
        {"arithmetic": "integer", "projection_bits": 6},
        {"arithmetic": "integer", "code_bits": 3},
    ],
    ids=["plain", "uncentred", "parts", "odd", "integer", "odd integer", "4 bits", "6 bits", "codes of 3 bits"],
)
def test_an_artifact_and_its_network_agree(tiling, settings):
    torch.manual_seed(0)
    fresh = SmallResNet()
    common = {"hash_length": 24, "input_tile_size": 8, "output_tile_size": None, "tiling": tiling, "centring": True}
    bb.patch_model(fresh, {"common_params": common | settings})
    bb.calibrate(fresh, torch.randn(4, 3, 12, 12))
    ours, theirs = by_name(model_costs(fresh, (3, 12, 12))), by_name(counted(fresh, (3, 12, 12)))
    assert set(ours) == {name for name, layer in theirs.items() if layer.hashed}
    for name, layer in ours.items():
        for count in set(COUNTS) - OUTSIDE:
            assert getattr(layer, count) == getattr(theirs[name], count), (name, count)
        assert layer.smallest_tile == theirs[name].smallest_tile
        assert layer.float_additions <= theirs[name].float_additions


def test_groups_read_their_own_channels():
    module = nn.Sequential(nn.Conv2d(6, 4, 3, padding=1, groups=2))
    settings = {"hash_length": 8, "input_tile_size": 2, "output_tile_size": None, "tiling": "pixel", "centring": True}
    bb.patch_model(module, {"0": settings})
    module[0].centre.copy_(torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0]))  # one group is not centred
    ours, theirs = by_name(model_costs(module, (6, 5, 5)))["0"], by_name(counted(module, (6, 5, 5)))["0"]
    assert ours == theirs
    assert ours.additions == 26 * 3
    assert ours.dense_macs == 25 * 4 * 27


@pytest.mark.parametrize(
    "settings",
    [
        {"arithmetic": "float"},
        {"arithmetic": "integer"},
        {"arithmetic": "integer", "projection_bits": 4},
        {"arithmetic": "integer", "code_bits": 2},
    ],
    ids=["float", "integer", "4 bits", "codes of 2 bits"],
)
def test_weight_bytes_are_those_of_the_file(tmp_path, settings):
    torch.manual_seed(0)
    settings = {"hash_length": 24, "input_tile_size": 8, "output_tile_size": None} | settings
    model = bb.patch_model(SmallResNet(), {"common_params": settings}).eval()
    path = write_artifact(tmp_path / "a.onnx", model)
    stored = {tensor.name: len(tensor.raw_data) for tensor in onnx.load(path).graph.initializer}
    for layer in artifact_costs(load_model(path)).layers:
        own = {
            name: size
            for name, size in stored.items()
            if name.startswith(f"{layer.name}/") and not name.endswith("_shape")
        }
        if layer.hashed:
            assert layer.weight_bytes + layer.projection_bytes == sum(own.values())
            assert layer.code_bytes == own[f"{layer.name}/weight_codes"]


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.conv(self.conv(x))


def test_a_layer_that_is_called_twice_works_twice_and_is_stored_once():
    settings = {"hash_length": 16, "input_tile_size": 4, "output_tile_size": None, "tiling": "pixel"}
    model = bb.patch_model(Twice(), {"conv": settings})
    ours, theirs = model_costs(model, (4, 6, 6)).total, counted(model, (4, 6, 6)).total
    once = model_costs(bb.patch_model(nn.Sequential(nn.Conv2d(4, 4, 3, padding=1)), {"0": settings}), (4, 6, 6)).total
    for total in (ours, theirs):
        assert total.lookups == 2 * once.lookups
        assert total.weight_bytes == once.weight_bytes
        assert total.projection_bytes == once.projection_bytes


def test_exact_layers_and_operators_between_them_are_counted():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, bias=False), nn.ReLU(), nn.MaxPool2d(2), nn.Sigmoid(),
        nn.Flatten(), nn.Linear(36, 5),
    )  # fmt: skip
    costs = counted(model, (3, 6, 6))
    assert costs.uncounted == ("Sigmoid",)
    total = costs.total
    assert total.macs == total.dense_macs == 36 * 4 * 27 + 36 * 5
    assert total.dense_weights == 4 * 27 + 4 + 36 * 5 + 5
    assert total.additions == total.dense_additions
    assert total.additions == (36 * 4) + (36 * 4) + (9 * 4 * 4) + 5  # bias, ReLU, windows of four, bias
    assert (total.conversions, total.lookups, total.code_bytes) == (0, 0, 0)
    exact = model_costs(model, (3, 6, 6)).total
    assert (exact.macs, exact.weight_bytes) == (total.macs, total.weight_bytes)


def test_counting_leaves_the_network_as_it_was():
    model, images = hashed_network()
    expected = model(images)
    model.train()
    model_costs(model, (3, 12, 12))
    assert model.training
    assert torch.equal(model.eval()(images), expected)
    assert not any(module._forward_hooks for module in model.modules())


# energy


def test_energy_follows_from_counts_and_constants():
    layer = LayerCost(
        "a", "float", conversions=3, analog_macs=5, lookup_bits=7, table_bytes=11, float_macs=13, integer_macs=17,
        float_additions=19, integer_additions=23, weight_bytes=29, traffic_bytes=31, dense_macs=37, dense_weights=41,
        dense_additions=43, dense_elements=47, outputs=53,
    )  # fmt: skip
    c = EnergyConstants()
    costs = NetworkCost((layer, replace(layer, name="b")))
    energy = hashed_energy(costs)
    assert energy.projections == pytest.approx(2 * 5 * c.analog_mac)
    assert energy.reads == pytest.approx(2 * 3 * c.one_bit_read)
    assert energy.lookups == pytest.approx(2 * (7 * c.code_bit + 11 * c.table_byte))
    assert energy.multiply_adds == pytest.approx(2 * (13 * 4.6 + 17 * 0.3))
    assert energy.additions == pytest.approx(2 * (19 * 0.9 + 23 * 0.1))
    assert energy.memory == pytest.approx(2 * 60 * c.sram_byte)
    assert energy.weights_from_dram == pytest.approx(2 * 29 * c.dram_byte)
    parts = [v for k, v in energy.to_dict().items() if k not in ("total", "weights_from_dram")]
    assert energy.total == pytest.approx(sum(parts))
    assert float32_energy(costs).total == pytest.approx(2 * (37 * 4.6 + 43 * 0.9 + 4 * 88 * c.sram_byte))
    assert int8_energy(costs).total == pytest.approx(2 * (37 * 0.3 + 53 * 4.6 + 43 * 0.03 + 88 * c.sram_byte))


def test_an_exact_network_costs_what_its_float32_form_costs():
    costs = NetworkCost((replace(exact_cost("a", macs=100, weights=20, inputs=8, outputs=4), float_additions=4,
                                 dense_additions=4),))  # fmt: skip
    assert hashed_energy(costs) == float32_energy(costs)


def test_every_constant_names_its_source():
    sources = EnergyConstants.sources()
    assert set(sources) == {f.name for f in fields(EnergyConstants)}
    assert all(len(text) > 20 for text in sources.values())
    with pytest.raises(AttributeError):
        EnergyConstants().one_bit_read = 1.0


def test_other_constants_give_another_estimate():
    costs = NetworkCost((LayerCost("a", "float", conversions=10),))
    compared = compare_energy(costs, EnergyConstants(one_bit_read=2.0))
    assert compared["hashed"]["total"] == compared["hashed"]["reads"] == 20.0
    assert compared["constants"]["one_bit_read"] == 2.0
    json.dumps(compared)


# commands


def test_inspect_prints_work_and_energy_and_marks_small_tiles(cli, tmp_path):
    model, _ = hashed_network()
    artifact = write_artifact(tmp_path / "a.onnx", model)
    costs = artifact_costs(load_model(artifact))
    outcome = cli("inspect", artifact, "--costs")
    assert (outcome.code, outcome.err) == (0, "")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    (row,) = [line for line in lines if line.startswith("conv1 24 8*")]
    layer = by_name(costs)["conv1"]
    assert f"{layer.conversions:,} {layer.lookups:,} {layer.analog_macs:,} {layer.macs:,}" in row
    assert any(line.startswith("* some tiles cover fewer than 16") for line in lines)
    total = f"{hashed_energy(costs).total / 1e6:,.3f}"
    assert any(line.startswith(f"total {total} ") for line in lines)
    summary = json.loads(cli("inspect", artifact, "--costs", "--json").out)
    assert summary["costs"] == json.loads(json.dumps(costs.to_dict()))
    assert summary["energy"]["hashed"]["total"] == pytest.approx(hashed_energy(costs).total)
    plain = json.loads(cli("inspect", artifact, "--json").out)
    assert {"costs", "energy"}.isdisjoint(plain)


def test_inspect_refuses_to_count_an_open_image_size(cli, tmp_path):
    def open_height(proto: onnx.ModelProto) -> None:
        dims = proto.graph.input[0].type.tensor_type.shape.dim
        dims[2].CopyFrom(helper.make_tensor_type_proto(1, ["h"]).tensor_type.shape.dim[0])

    model, _ = hashed_network()
    artifact = rewrite(write_artifact(tmp_path / "a.onnx", model), open_height)
    assert cli("inspect", artifact).code == 0
    refused(cli("inspect", artifact, "--costs"), "expected fixed sizes beside the batch", "h")


def test_costs_need_no_pytorch(tmp_path):
    model, _ = hashed_network()
    artifact = write_artifact(tmp_path / "a.onnx", model)
    program = (
        "import sys; sys.modules['torch'] = None\n"
        f"from bitbybit.cli.app import run\nrun(['inspect', {str(artifact)!r}, '--costs'])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "1-bit reads" in done.stdout
