"""The rule for rows on a GPU, on recorded devices. It was never measured: these are its own conditions."""

from __future__ import annotations

import pytest

from mom_compile.memory.rows import (
    BLOCK_ROWS,
    DEVICES,
    HOST_SECONDS,
    Layer,
    filled_by_products,
    for_intensity,
    for_launches,
    rows_for,
)

LLAMA_8B = Layer(32, ((4096, 4096), (4096, 1024), (4096, 1024), (4096, 4096), *[(4096, 14336)] * 2, (14336, 4096)))
LLAMA_70B = Layer(64, ((8192, 8192), (8192, 1024), (8192, 1024), (8192, 8192), *[(8192, 28672)] * 2, (28672, 8192)))
GEMMA_270M = Layer(4, ((640, 1024), (640, 256), (640, 256), (1024, 640), *[(640, 2048)] * 2, (2048, 640)))
LAYERS = {"Llama-3-8B": LLAMA_8B, "Llama-3-70B": LLAMA_70B, "Gemma-3-270M": GEMMA_270M}


@pytest.mark.parametrize(
    ("device", "rows"), [("A100", 1536), ("H100", 2048), ("H200", 2048), ("RTX 4090", 2048)]
)
def test_what_the_rule_says_for_llama_3_8b(device: str, rows: int) -> None:
    assert rows_for(DEVICES[device], LLAMA_8B) == rows


def test_every_recorded_device_is_in_the_table_above() -> None:
    assert set(DEVICES) == {"A100", "H100", "H200", "RTX 4090"}


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
    assert for_launches(device, GEMMA_270M) > for_intensity(device) > for_launches(device, LLAMA_8B)
    assert rows_for(device, GEMMA_270M) >= for_launches(device, GEMMA_270M)


def test_a_tile_that_stands_alone_in_its_wave_leaves_the_others_idle() -> None:
    """128 x 128 values of a result on a device of 132 multiprocessors, in the quickest of tiles."""
    assert filled_by_products(DEVICES["H100"], [(64, 128)], 128) < 2 / 132
