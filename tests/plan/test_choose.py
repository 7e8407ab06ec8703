"""memory: auto takes the cheapest that fits, says why, and says what is missing when nothing does."""

from __future__ import annotations

import pytest

from longspan.core.errors import ArgumentError
from longspan.core.mesh_config import MeshConfig
from longspan.plan.choose import choose_memory
from longspan.plan.hardware import GPUS, parse_gpus
from longspan.plan.models import MODELS
from longspan.plan.search import search
from longspan.plan.training import WORKSPACE
from longspan.plan.training_step import MemoryConfig, TrainingStep

LLAMA = MODELS["llama-3-8b"]
STEP = TrainingStep(65536, parallel=MeshConfig(dp_shard=8), memory=MemoryConfig(compute_dtype="bfloat16"))


def test_less_memory_costs_more_time() -> None:
    """A choice that is dearer than it must be, or that does not fit."""
    dearer = []
    for budget in (1e13, 300e9, 80e9, 40e9):
        choice = choose_memory(LLAMA, STEP, device_bytes=budget)
        assert choice.candidate.memory.device + WORKSPACE <= budget
        assert all(other.seconds <= choice.candidate.seconds for other, _ in choice.refused)
        dearer.append(choice.dearer_by)
    assert dearer == sorted(dearer) and dearer[0] == 0 < dearer[-1]


def test_nothing_is_set_where_everything_fits() -> None:
    """Settings that cost nothing on paper still cost something."""
    choice = choose_memory(LLAMA, STEP, device_bytes=1e13)
    assert choice.candidate.step.memory.chosen == {
        "activation_checkpointing": "none", "tiled_mlp": None, "offload_parameters": False,
        "chunk_tokens": None, "offload_chunk_cache": False,
    }  # fmt: skip
    assert choice.refused == [] and choice.reasons()[0].startswith("memory: none;")


def test_a_host_without_room_is_seen() -> None:
    """What leaves the device has to go somewhere."""
    choice = choose_memory(LLAMA, STEP, device_bytes=80e9, host_bytes=1e9)
    assert choice.candidate.memory.host_bytes <= 1e9
    assert any("on the host" in lack for _, lack in choice.refused)


def test_nothing_fits() -> None:
    """The message names what is needed, what there is and what to do."""
    with pytest.raises(ArgumentError, match="does not fit") as caught:
        choose_memory(LLAMA, STEP, device_bytes=8e9)
    assert "gathered parameters" in str(caught.value) and "more GPUs" in str(caught.value)


def test_chunks_only_where_they_work() -> None:
    """A sequence that is spread over ranks cannot be walked in chunks."""
    spread = STEP._replace(parallel=MeshConfig(cp_ring=8))
    choice = choose_memory(LLAMA, spread, device_bytes=40e9)
    tried = [choice.candidate, *(other for other, _ in choice.refused)]
    assert all(other.step.memory.chunk_tokens is None for other in tried)


def test_search_prefers_what_fits_and_is_fast() -> None:
    """Steps of different numbers of tokens are compared by their rate, and what does not fit comes last."""
    found = search(LLAMA, GPUS["h100"], context=2**17, num_gpus=8, batch_tokens=2**22)
    assert all(each.limit is None for each in found)
    rates = [each.tokens / each.seconds for each in found]
    assert rates == sorted(rates, reverse=True)
    assert 0.2 < found[0].mfu < 0.6
    ring = next(each for each in found if each.candidate.step.parallel.schedule_name == "ring")
    assert ring.sent > 0 and ring.parallel()["cp_ring"] * ring.parallel()["dp_shard"] == 8
    too_long = search(LLAMA, GPUS["h100"], context=2**25, num_gpus=8, batch_tokens=2**22)
    assert {each.limit for each in too_long} <= {"device memory", "host memory"}


@pytest.mark.parametrize("text", ["8xh200", "8 x h100", "0xh100", "x", "eight", "8xb9"])
def test_gpus(text: str) -> None:
    """A number that is dropped without a word."""
    if text == "8xh200":
        assert parse_gpus(text) == (8, GPUS["h200"]) and parse_gpus("A100") == (1, GPUS["a100"])
    else:
        with pytest.raises(ArgumentError, match="8xh100"):
            parse_gpus(text)


@pytest.mark.parametrize(
    ("text", "num", "name"),
    [
        ("4090", 1, "rtx-4090"), ("2xRTX 4090", 2, "rtx-4090"), ("4xA100-80GB", 4, "a100"), ("a100-40gb", 1, "a100-40"),
        ("NVIDIA A100-SXM4-80GB", 1, "a100"), ("8xh100-sxm", 8, "h100"), ("gh200-144gb", 1, "gh200-144"),
        ("rtx6000-ada", 1, "rtx-6000-ada"), ("rtx_a6000", 1, "a6000"), ("8xh100-nvl", 0, ""), ("rtx-6000", 0, ""),
        ("h20", 0, ""), ("8", 0, ""),
    ],
)  # fmt: skip
def test_gpus_as_people_call_them(text: str, num: int, name: str) -> None:
    """Names that leave no doubt refused, or another card of a like name taken."""
    if num:
        assert parse_gpus(text) == (num, GPUS[name])
    else:
        with pytest.raises(ArgumentError, match="8xh100"):
            parse_gpus(text)
