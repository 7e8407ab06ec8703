"""The MLP in tiles against the MLP at once: values, gradients, memory, and what it refuses."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from longspan.core.errors import ArgumentError
from longspan.kernels.tiled_mlp import TiledMLP, enable_tiled_mlp


class Gated(torch.nn.Module):
    """The MLP of Llama: down(silu(gate(x)) * up(x)); counts how often it is computed."""

    def __init__(self, hidden: int = 16, intermediate: int = 40, *, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = torch.nn.Linear(hidden, intermediate, bias=bias)
        self.up_proj = torch.nn.Linear(hidden, intermediate, bias=bias)
        self.down_proj = torch.nn.Linear(intermediate, hidden, bias=bias)
        self.act_fn = torch.nn.SiLU()
        self.calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Block(torch.nn.Module):
    def __init__(self, mlp: torch.nn.Module) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(16)
        self.mlp = mlp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


def model_of(*mlps: torch.nn.Module) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.ModuleList([Block(mlp) for mlp in mlps]))


def tiled(mlp: torch.nn.Module, tile_tokens: int) -> Any:
    enable_tiled_mlp(model_of(mlp), tile_tokens)
    return mlp


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def seeded(mlp: torch.nn.Module, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    for index, parameter in enumerate(mlp.parameters()):
        parameter.data = numbers(*parameter.shape, seed=index, dtype=dtype) / parameter.shape[-1] ** 0.5
    return mlp


def run(mlp: torch.nn.Module, x: torch.Tensor, dout: torch.Tensor) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    mlp.zero_grad()
    out = mlp(x)
    out.backward(dout)
    return {"out": out.detach(), "x": x.grad} | {n: p.grad for n, p in mlp.named_parameters()}


def relative(found: torch.Tensor, truth: torch.Tensor) -> float:
    return float((found.double() - truth.double()).norm() / truth.double().norm())


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-14), (torch.float32, 1e-6)])
@pytest.mark.parametrize("tile_tokens", [1, 7, 20, 41, 1000])
@pytest.mark.parametrize("shape", [(41, 16), (1, 41, 16), (3, 13, 16)])
def test_equals_the_mlp_at_once(
    dtype: torch.dtype, limit: float, tile_tokens: int, shape: tuple[int, ...]
) -> None:
    """Guards the last, shorter tile, rows of a batch, and the sum of the weights' gradients over tiles."""
    plain = seeded(Gated(bias=True), dtype)
    mine = tiled(copy.deepcopy(plain), tile_tokens)
    x, dout = numbers(*shape, seed=8, dtype=dtype), numbers(*shape, seed=9, dtype=dtype)
    truth, found = run(plain, x, dout), run(mine, x, dout)
    assert found["out"].shape == shape
    for name in truth:
        assert relative(found[name], truth[name]) <= limit, name
    with torch.no_grad():
        assert relative(mine(x), truth["out"]) <= limit


def test_bf16_gradients_do_not_get_worse_with_the_number_of_tiles() -> None:
    """A running sum in bf16 stops growing: after some hundred tiles, what is added is less than half a step."""
    plain = seeded(Gated(), torch.bfloat16)
    # All alike, so that the sum grows evenly: the worst case for a rounded sum.
    x, dout = numbers(1, 16).expand(512, 16).bfloat16(), torch.ones(512, 16).bfloat16()
    exact = copy.deepcopy(plain).double()
    truth = run(exact, x.double(), dout.double())
    at_once = run(plain, x, dout)
    in_tiles = run(tiled(copy.deepcopy(plain), 1), x, dout)
    for name in ("gate_proj.weight", "up_proj.weight", "down_proj.weight"):
        assert in_tiles[name].dtype == torch.bfloat16
        assert relative(in_tiles[name], truth[name]) <= 2 * relative(at_once[name], truth[name]) + 2e-3


def test_each_gradient_arrives_once() -> None:
    """FSDP2 reduces a gradient when it arrives: one per tile would be reduced as many times."""
    mlp = tiled(seeded(Gated()), 5)
    seen: dict[str, int] = {}
    for name, parameter in mlp.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda _, name=name: seen.__setitem__(name, seen.get(name, 0) + 1)
        )
    run(mlp, numbers(23, 16), numbers(23, 16))
    assert seen == {"gate_proj.weight": 1, "up_proj.weight": 1, "down_proj.weight": 1}


@pytest.mark.parametrize("x_needs_gradient", [False, True])
def test_frozen_weights_get_no_gradient(x_needs_gradient: bool) -> None:
    """Adapters train a few weights of frozen models, in the first block on inputs without gradient."""
    mlp = tiled(seeded(Gated()), 5)
    mlp.gate_proj.weight.requires_grad_(False)
    plain = copy.deepcopy(mlp)
    plain.tile_tokens = 1000
    for module in (mlp, plain):
        x = numbers(23, 16).requires_grad_(x_needs_gradient)
        module(x).square().sum().backward()
        assert (x.grad is not None) == x_needs_gradient
    assert mlp.gate_proj.weight.grad is None
    assert relative(mlp.up_proj.weight.grad, plain.up_proj.weight.grad) <= 1e-6


def test_all_weights_frozen_still_pass_the_gradient_on() -> None:
    """Guards adapters that sit in the attention only."""
    mlp = tiled(seeded(Gated()).requires_grad_(False), 5)
    x = numbers(23, 16).requires_grad_()
    mlp(x).sum().backward()
    assert x.grad.abs().min() > 0


def test_autocast_holds_in_the_backward_pass_too() -> None:
    """The backward pass runs outside the caller's autocast: tiles computed again in fp32 would differ."""
    plain = seeded(Gated())
    mine = tiled(copy.deepcopy(plain), 5)
    x, dout = numbers(23, 16), numbers(23, 16).bfloat16()
    results = []
    for mlp in (plain, mine):
        inside: list[torch.dtype] = []
        mlp.act_fn.register_forward_hook(lambda _, args, out, inside=inside: inside.append(out.dtype))
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = mlp(inputs)
        out.backward(dout)
        assert out.dtype == torch.bfloat16 and set(inside) == {torch.bfloat16}
        results.append((out.detach(), inputs.grad, mlp.up_proj.weight.grad))
    for truth, found in zip(*results):
        assert truth.dtype == found.dtype
        assert relative(found, truth) <= 1e-2


@pytest.mark.parametrize("checkpointed", [False, True])
def test_tiles_are_computed_twice_and_not_three_times(checkpointed: bool) -> None:
    """In a checkpointed block the forward pass over the tiles must not run once more before their backward."""
    block = Block(seeded(Gated()))
    enable_tiled_mlp(torch.nn.Sequential(torch.nn.ModuleList([block])), 6)
    block.mlp.calls = 0
    x = numbers(24, 16).requires_grad_()
    out = checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)
    assert block.mlp.calls == 4
    out.sum().backward()
    assert block.mlp.calls == 8


class PeakBytes(TorchDispatchMode):
    """Highest number of bytes in tensors made under it and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: item for key, item in self.alive.items() if not item[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def peak_bytes(mlp: torch.nn.Module, tokens: int) -> int:
    x = numbers(tokens, 16).requires_grad_()
    dout = numbers(tokens, 16)
    with PeakBytes() as counter:
        mlp(x).backward(dout)
    return counter.peak


def test_memory_does_not_hold_the_intermediate() -> None:
    """Counts the bytes of all living tensors: more tokens may cost rows of the hidden size only."""
    tokens, hidden, intermediate, item = 1024, 16, 160, 4
    mlp = seeded(Gated(hidden, intermediate))
    at_once = peak_bytes(mlp, tokens)
    assert at_once >= 3 * tokens * intermediate * item  # gate, up and their product are kept
    tiled(mlp, 64)
    weights = sum(p.numel() for p in mlp.parameters()) * item
    rows = 4 * tokens * hidden * item  # input, output and their gradients
    # The weights seen as views, their sums and one tile's share; one tile with all its intermediates.
    expected = rows + 3 * weights + 8 * 64 * intermediate * item
    mine = peak_bytes(mlp, tokens)
    assert mine <= expected < at_once / 5, (mine, expected, at_once)
    assert peak_bytes(mlp, 4 * tokens) <= mine + 3 * rows


def test_names_and_copies_stay() -> None:
    """Saved files must not change, and a copied model must not compute with the weights of the first."""
    mlp = seeded(Gated())
    names = list(mlp.state_dict())
    tiled(mlp, 4)
    assert list(mlp.state_dict()) == names and isinstance(mlp, Gated) and isinstance(mlp, TiledMLP)
    twin = copy.deepcopy(mlp)
    with torch.no_grad():
        before = mlp(numbers(9, 16))
        twin.down_proj.weight.zero_()
        assert torch.equal(mlp(numbers(9, 16)), before)
        assert twin(numbers(9, 16)).abs().max() == 0


def test_tile_size_can_be_changed() -> None:
    """Guards against a class made in front of a class made before."""
    mlp = tiled(Gated(), 4)
    kind = type(mlp)
    tiled(mlp, 8)
    assert type(mlp) is kind and mlp.tile_tokens == 8


class Shifted(Gated):
    """Half of each token's input is the one before it (as in RWKV's channel mixing)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward((x + x.roll(1, dims=-2)) / 2)


class Experts(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = torch.nn.Linear(16, 4)
        self.gate_up_proj = torch.nn.Parameter(torch.zeros(4, 16, 80))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class WithDropout(Gated):
    def __init__(self) -> None:
        super().__init__()
        self.dropout = torch.nn.Dropout(0.1)


class TwoOutputs(Gated):
    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x), None


@pytest.mark.parametrize(
    ("mlp", "message"),
    [
        (Shifted, "tokens depend on each other"),
        (Experts, "gate_up_proj"),
        (WithDropout, "dropout"),
        (TwoOutputs, "one tensor"),
        (lambda: torch.nn.Sequential(torch.nn.Conv1d(16, 16, 3)), "Conv1d"),
    ],
)
def test_refuses_what_is_not_token_wise(mlp: Any, message: str) -> None:
    """Tiles of such a module would give other numbers without a word."""
    module = seeded(mlp())
    first = Gated()
    with pytest.raises(ArgumentError, match=message):
        enable_tiled_mlp(model_of(first, module), 4)
    assert type(first) is Gated  # refused as a whole


def test_refuses_a_model_without_mlps_and_a_tile_without_tokens() -> None:
    """Nothing found must not look like success, nor half of the blocks."""
    with pytest.raises(ArgumentError, match="no MLP in any block of Linear"):
        enable_tiled_mlp(torch.nn.Linear(3, 3), 4)
    other = torch.nn.Sequential(torch.nn.ModuleList([Block(Gated()), torch.nn.Linear(2, 2)]))
    with pytest.raises(ArgumentError, match=r"0\.1, a Linear"):
        enable_tiled_mlp(other, 4)
    with pytest.raises(ArgumentError, match="at least one token"):
        enable_tiled_mlp(model_of(Gated()), 0)
