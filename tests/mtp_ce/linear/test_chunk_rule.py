"""Rows of a chunk: from V, D and the number of rows, so that sums over chunks cost little and one chunk no memory."""

import pytest
import torch

from mtp_ce.ops.chunks import GPU_ROWS, ChunkDtypes, most_rows, rows_at_once

GPU, CPU = torch.device("cuda"), torch.device("cpu")
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SUMMED = ChunkDtypes(logits=BF16, layer=BF16, total=FP32)
DTYPES = {
    "bf16": SUMMED,
    "bf16, fp32 logits": ChunkDtypes(FP32, BF16, FP32),
    "bf16, fp64 sums": ChunkDtypes(BF16, BF16, FP64),
    "bf16 sums": ChunkDtypes(BF16, BF16, BF16),
    "fp16": ChunkDtypes(FP16, FP16, FP32),
    "fp32": ChunkDtypes(FP32, FP32, FP32),
    "bf16, frozen unembed": ChunkDtypes(BF16, BF16, None),
}
MODELS = {"Llama-3 8B": (128256, 4096), "Qwen3 0.6B": (151936, 1024), "SmolLM2 135M": (49152, 576), "small": (1000, 64)}


def size(M: int, V: int, D: int, dtypes: ChunkDtypes, device: torch.device) -> int:
    return rows_at_once(M, most_rows(M, V, D, dtypes, device), device)


@pytest.mark.parametrize(
    ("model", "M", "rows"),
    [
        ("Llama-3 8B", 2048, 2048),
        ("Llama-3 8B", 8192, 8192),  # one chunk, up to D + D rows
        ("Llama-3 8B", 8193, 2816),  # three
        ("Llama-3 8B", 32768, 4096),
        ("Qwen3 0.6B", 4480, 4480),  # 3456 rows of 1 GiB, and D
        ("Qwen3 0.6B", 8192, 2816),
        ("SmolLM2 135M", 8768, 8768),
        ("SmolLM2 135M", 32768, 8192),
    ],
)
def test_rows_of_a_gpus_chunk_for_the_shapes_of_models(model: str, M: int, rows: int) -> None:
    """Those of the table in benchmarks/LOG.md: bf16, gradients of hidden and unembed."""
    assert size(M, *MODELS[model], SUMMED, GPU) == rows


def peak_bytes(M: int, rows: int, V: int, D: int, dtypes: ChunkDtypes) -> int:
    """Chunk, sum and d_unembed; a second statement of the model in `most_rows`."""
    copy = dtypes.layer.itemsize if dtypes.logits != dtypes.layer else 0
    chunk = min(rows, M) * V * (dtypes.logits.itemsize + copy)
    if dtypes.total is None:
        return chunk
    if rows >= M and dtypes.layer == BF16 and dtypes.total == FP32:
        return chunk + V * D * dtypes.layer.itemsize
    cast = V * D * dtypes.layer.itemsize if dtypes.total != dtypes.layer else 0
    return max(chunk + V * D * dtypes.total.itemsize, V * D * dtypes.total.itemsize + cast)


@pytest.mark.parametrize("device", [GPU, CPU], ids=str)
@pytest.mark.parametrize("name", DTYPES)
def test_one_chunk_for_all_rows_takes_no_more_memory_than_several(name: str, device: torch.device) -> None:
    """At the last number of rows that are one chunk, against the chunks of the next number."""
    dtypes = DTYPES[name]
    for V, D in MODELS.values():
        alone = max(M for M in range(1, 3 * D + 20000, 13) if size(M, V, D, dtypes, device) >= M)
        several = most_rows(10**7, V, D, dtypes, device)
        assert peak_bytes(alone, alone, V, D, dtypes) <= peak_bytes(10**7, several, V, D, dtypes)
        assert alone >= min(several, 3 * D + 20000) - 13
        if name == "bf16":
            assert alone > several + D - 20


@pytest.mark.parametrize("device", [GPU, CPU], ids=str)
@pytest.mark.parametrize("name", [name for name in DTYPES if name != "bf16, frozen unembed"])
def test_where_the_sum_is_cast_a_chunk_takes_its_room_or_a_bounded_one(name: str, device: torch.device) -> None:
    """No more than the cast of the sum at the end, or 1 GiB on a GPU and 64 MiB on a CPU, where rows are still few."""
    dtypes, most = DTYPES[name], 2**30 if device.type == "cuda" else 2**26
    for V, D in MODELS.values():
        rows = most_rows(10**7, V, D, dtypes, device)
        row = V * (dtypes.logits.itemsize + (dtypes.layer.itemsize if dtypes.logits != dtypes.layer else 0))
        cast = V * D * dtypes.layer.itemsize if dtypes.total != dtypes.layer else 0
        assert row * (rows - GPU_ROWS) <= max(cast, most)
        assert rows > min(8192 if device.type == "cuda" else 512, most // row) - GPU_ROWS


def test_chunks_of_a_gpu_are_whole_tiles_of_like_sizes() -> None:
    """The last one is no remainder of a few rows, for which the device would read and write the whole sum."""
    for M in range(8193, 60000, 777):
        rows = size(M, 128256, 4096, SUMMED, GPU)
        assert rows % GPU_ROWS == 0
        count = -(-M // rows)
        assert M - (count - 1) * rows > rows - count * GPU_ROWS
