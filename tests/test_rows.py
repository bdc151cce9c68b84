"""The rule for rows on a GPU, on recorded devices. It was never measured: these are its own conditions."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mom_compile.memory.device import (
    BLOCK_ROWS,
    HOST_SECONDS,
    OVER_LAUNCHING,
    Layer,
    filled_by_products,
    for_intensity,
    for_launches,
    rows_for,
)
from mom_compile.memory.devices import DEVICES, Properties, device_of, find_device

LLAMA_8B = Layer(32, ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *[(4096, 14336)] * 2, (14336, 4096)))
LLAMA_70B = Layer(64, ((8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), *[(8192, 28672)] * 2, (28672, 8192)))
GEMMA_270M = Layer(4, ((640, 1024), (640, 256), (640, 256), (1024, 640), *[(640, 2048)] * 2, (2048, 640)))
#: What the rule says for Llama-3-8B.
ROWS = {
    "A100": 1536, "A100 40GB": 1536, "H100": 4096, "H100 PCIe": 3584, "H100 NVL": 4096, "H200": 4096, "B200": 5760,
    "GB200": 5760, "RTX 4090": 2048, "L40S": 2048, "L4": 2304, "RTX 5090": 2560, "RTX 3090": 1280, "MI300X": 7296,
}  # fmt: skip
LAYERS = {"Llama-3-8B": LLAMA_8B, "Llama-3-70B": LLAMA_70B, "Gemma-3-270M": GEMMA_270M}


@pytest.mark.parametrize(("device", "rows"), ROWS.items())
def test_what_the_rule_says_for_llama_3_8b(device: str, rows: int) -> None:
    assert rows_for(DEVICES[device], LLAMA_8B) == rows


def test_every_recorded_device_is_in_the_table_above() -> None:
    assert DEVICES.keys() == ROWS.keys()


@pytest.mark.parametrize(
    ("name", "device"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100 40GB"), ("NVIDIA A100 80GB PCIe", "A100"), ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"), ("NVIDIA GB200", "GB200"), ("NVIDIA B200", "B200"), ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA GeForce RTX 5090", "RTX 5090"), ("AMD Instinct MI300X", "MI300X"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
    ],
)  # fmt: skip
def test_a_gpu_is_found_by_what_it_calls_itself(name: str, device: str) -> None:
    """L4 is in L40S, and B200 in GB200: names are compared word by word."""
    assert device_of(Properties(name, DEVICES[device].multiprocessors, 10)) == (DEVICES[device], name)


@pytest.mark.parametrize(
    ("name", "multiprocessors", "device"),
    [
        ("NVIDIA GeForce RTX 4090 Laptop GPU", 76, "RTX 4090"), ("NVIDIA GeForce RTX 4090 D", 114, "RTX 4090"),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", 60, "H100"),
    ],
)  # fmt: skip
def test_a_smaller_gpu_of_the_same_name_has_a_share_of_its_figures(name, multiprocessors, device) -> None:
    found, text = device_of(Properties(name, multiprocessors, DEVICES[device].capability))
    share = multiprocessors / DEVICES[device].multiprocessors
    assert found.flops == pytest.approx(share * DEVICES[device].flops)
    assert found.bandwidth == pytest.approx(share * DEVICES[device].bandwidth)
    assert text.startswith(f"{name}, taken for {multiprocessors} of the ")


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("4090", "RTX 4090"), ("rtx4090", "RTX 4090"), ("NVIDIA GeForce RTX 3090", "RTX 3090"), ("l40s", "L40S"),
        ("a100-40gb", "A100 40GB"), ("A100 80GB", "A100"), ("amd instinct mi300x", "MI300X"), ("h200", "H200"),
        ("H900", None), ("", None),
    ],
)  # fmt: skip
def test_a_device_is_named_as_people_write_it(text: str, device: str | None) -> None:
    assert find_device(text) == device


def test_figures_are_of_the_right_size() -> None:
    """A slip of a power of ten would show: FLOPS, bytes per second and bytes of every device, and their order."""
    for name, device in DEVICES.items():
        assert 7e13 <= device.flops < 3e15 and 3e11 <= device.bandwidth <= 8e12, name
        assert 22 << 30 < device.memory <= 192 << 30 and 25e9 <= device.link < 2e11, name
        assert 58 <= device.multiprocessors <= 304, name
        assert device.link < device.bandwidth / 10


def test_an_h100_wants_some_1200_rows_for_each_read_of_a_matrix() -> None:
    assert for_intensity(DEVICES["H100"]) == pytest.approx(1181, abs=1)


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_rows_are_enough_and_whole_waves(device, layer) -> None:
    rows = rows_for(device, layer)
    assert rows >= for_intensity(device)
    # The device is busy with the products alone, at its peak, for longer than two thirds of the host's time.
    assert 2 * layer.parameters * rows / device.flops >= 0.65 * HOST_SECONDS
    # In attention's waves of whole rows of blocks, less is idle than another head's blocks would fill.
    at_once = 2 * device.multiprocessors
    waves = layer.heads * rows / BLOCK_ROWS / (at_once // layer.heads * layer.heads)
    assert waves == int(waves)
    assert filled_by_products(device, layer.products, rows) > 0.85


def test_small_layers_need_more_rows_for_the_hosts_launches_than_for_arithmetic() -> None:
    device = DEVICES["H100"]
    assert for_launches(device, GEMMA_270M) > for_launches(device, LLAMA_8B) > for_intensity(device)
    assert for_launches(device, LLAMA_8B) / OVER_LAUNCHING < for_intensity(device), "no device waits for its host"
    assert rows_for(device, GEMMA_270M) >= for_launches(device, GEMMA_270M)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_launches_take_a_tenth_or_rows_hold_about_as_much_as_the_layers_weights(device) -> None:
    """Unless the device waited for its host with so few, or for its memory: more is a wave at most."""
    for layer in (LLAMA_8B, LLAMA_70B):
        rows, wave = rows_for(device, layer), BLOCK_ROWS * (2 * device.multiprocessors // layer.heads)
        tenth = 2 * layer.parameters * rows / (0.65 * device.flops) >= OVER_LAUNCHING * HOST_SECONDS
        assert tenth or rows >= layer.parameters / layer.values
        assert rows <= 2 * max(layer.parameters / layer.values, for_intensity(device)) + 2 * wave


def test_experts_that_a_row_does_not_choose_count_as_weights_and_not_as_work() -> None:
    few = Layer(32, ((2048, 5120), *[(2048, 1536), (768, 2048)] * 8))
    many = replace(few, others=15 * few.parameters)
    device = DEVICES["H200"]
    assert many.parameters == few.parameters
    assert for_launches(device, many) > 2 * for_launches(device, few)


def test_a_tile_that_stands_alone_in_its_wave_leaves_the_others_idle() -> None:
    """128 x 128 values of a result on a device of 132 multiprocessors, in the quickest of tiles."""
    assert filled_by_products(DEVICES["H100"], [(64, 128)], 128) < 2 / 132
