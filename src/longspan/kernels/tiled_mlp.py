"""The MLP of a block, and its experts, over tiles of tokens: their intermediate [tokens, intermediate] never exists.

An MLP treats every token by itself, and so do the experts of a mixture once a router has chosen them: a tile takes a
span of tokens with their choices. So the forward pass runs tile after tile and keeps only its input; the backward
pass computes each tile again and takes its gradients. Memory beyond input, output and gradients is that of one
tile: for 65,536 tokens and an intermediate size of 14,336 in bf16, a tile of 2,048 tokens replaces the 5.3 GiB of
the three intermediates by 0.17 GiB. Cost: one more forward pass of the MLP, but none where the block is
checkpointed anyway (`_Keep`). Experts hold the intermediates of every token `num_experts_per_tok` times: with 8 of
them, and in bf16, 65,536 tokens of experts of 768 take 2.3 GiB of intermediates and 2.1 GiB of outputs of 2,048, and a
tile of 2,048 tokens a 32nd of both.

All tiles are one node of the autograd graph whose inputs are the parameters, so each parameter receives its
gradient once, summed in fp32 (fp64 for fp64), rounded once: hooks on gradients, FSDP2's among them, fire once
and see what they would see without tiles. bf16 sums over dozens of tiles would lose what later tiles add.
(Tiled MLP: Arctic Long Sequence Training, arXiv:2506.13996, section 3.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeVar, cast

import torch
from torch.autograd.function import once_differentiable

from longspan.core.errors import ArgumentError
from longspan.kernels.experts import experts_in, innermost, takes_choices

__all__ = ["TiledMLP", "check_token_wise", "enable_tiled_mlp"]

ModelT = TypeVar("ModelT", bound=torch.nn.Module)

MLP_NAMES = ("mlp", "feed_forward", "ffn")
"""What the families call the MLP of a block."""
SHARED_NAMES = ("shared_expert", "shared_experts", "shared_mlp")
"""What they call the MLP beside the experts, which every token goes through."""

NORMS = (torch.nn.LayerNorm, torch.nn.RMSNorm)
CONTAINERS = (torch.nn.ModuleDict, torch.nn.ModuleList, torch.nn.ParameterDict, torch.nn.ParameterList)


class TiledMLP(torch.nn.Module):
    """Put in front of an MLP's own class by `enable_tiled_mlp`; parameters and their names stay as they are.

    Attributes:
        tile_tokens: tokens computed at once.
    """

    tile_tokens: int

    def forward(self, x: torch.Tensor, *choices: torch.Tensor) -> torch.Tensor:
        """Return the MLP of x [..., tokens, hidden]; experts take the `choices` of each token too, [tokens, chosen]."""
        # Three dimensions for those that unpack (batch, tokens, hidden); the tokens of a batch make one row.
        row = x.reshape(1, -1, x.shape[-1]) if x.ndim >= 3 else x
        parameters = self._trainable()
        if row.shape[-2] <= self.tile_tokens:
            return super().forward(x, *choices)
        asked = any(tensor.requires_grad for tensor in (x, *choices)) or parameters
        if not torch.is_grad_enabled() or not asked:
            return self._in_tiles(row, *choices).reshape(*x.shape[:-1], -1)
        anchor = torch.empty(0, device=x.device, requires_grad=True)
        kept = _Keep.apply(anchor, row, *choices)
        return _Tiles.apply(self, kept[0].grad_fn, len(kept), *kept, *parameters).reshape(*x.shape[:-1], -1)

    def _trainable(self) -> list[torch.nn.Parameter]:
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    def _tiles(self, num_tokens: int) -> Iterator[tuple[int, int]]:
        """Yield (first token, tokens) of each tile."""
        for start in range(0, num_tokens, self.tile_tokens):
            yield start, min(self.tile_tokens, num_tokens - start)

    def _one_tile(self, *inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(*inputs)

    def _in_tiles(self, *inputs: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor | None = None
        x = inputs[0]
        for start, length in self._tiles(x.shape[-2]):
            tile = self._one_tile(*(tensor.narrow(-2, start, length) for tensor in inputs))
            if out is None:
                out = tile.new_empty(*x.shape[:-1], tile.shape[-1])
            out.narrow(-2, start, length).copy_(tile)
        assert out is not None
        return out


def enable_tiled_mlp(model: ModelT, tile_tokens: int) -> ModelT:
    """Run the MLP of each block of a model over tiles of `tile_tokens` tokens, in place, and return the model.

    Works before and after FSDP2 wraps the blocks, with frozen weights and adapters, and in any state of
    checkpointing. Names of parameters, saved files and results do not change. Small tiles cost speed, not
    accuracy: a tile should keep the device busy, 1,024 tokens and more on a GPU.

    Raises:
        ArgumentError: a tile without a token, no MLP where one is expected, or one whose tokens may depend on each
            other (dropout, unknown layers, experts that do not get each token with its choices).
    """
    if tile_tokens < 1:
        raise ArgumentError("a tile needs at least one token", found=tile_tokens, allowed=">= 1")
    mlps = _mlps_of(model)
    for mlp in mlps:
        if takes_choices(mlp):
            _check_experts(mlp)
        else:
            check_token_wise(mlp)
    classes = {kind: _tiled_class(kind) for kind in {type(mlp) for mlp in mlps}}
    for mlp in mlps:
        mlp.__class__ = classes[type(mlp)]
        cast(TiledMLP, mlp).tile_tokens = tile_tokens
    return model


def check_token_wise(mlp: torch.nn.Module) -> None:
    """Refuse a module unless each token's output depends on that token only, and is the same when computed again.

    Its layers must be linear layers, normalisations of the last dimension or functions without parameters; then
    four tokens must give the same together and alone (tried where the weights are plain tensors).

    Raises:
        ArgumentError: naming the module and the reason.
    """
    name = type(mlp).__name__
    for path, layer in mlp.named_modules():
        kind = type(layer).__name__
        own = [key for key, _ in layer.named_parameters(recurse=False)]
        if isinstance(layer, torch.nn.modules.dropout._DropoutNd) and layer.p > 0:
            raise ArgumentError(
                f"{name} has dropout, which would differ when a tile is computed again",
                found=f"{path or name}: p={layer.p}",
                fix="set the dropout to 0",
            )
        if own and not isinstance(layer, (torch.nn.Linear, *NORMS, *CONTAINERS)):
            raise ArgumentError(
                f"{name} is not known to treat every token by itself, so it cannot run in tiles",
                found=f"{path or 'itself'} is a {kind} with parameters {', '.join(own)}",
                allowed="MLPs of linear layers and activation functions; experts that get each token with its choices",
                fix="train this model without the tiled MLP",
            )
    linear = next((layer for layer in mlp.modules() if isinstance(layer, torch.nn.Linear)), None)
    # Sharded and quantised weights cannot be tried from outside; their modules were looked at above.
    if linear is not None and type(linear.weight.data) is torch.Tensor and linear.weight.is_floating_point():
        _try_tokens(mlp, linear)


def _try_tokens(mlp: torch.nn.Module, first: torch.nn.Linear) -> None:
    if not first.weight.is_meta:
        _compare_tokens(mlp, _four_tokens(first.in_features, first.weight)[None])


def _check_experts(experts: torch.nn.Module) -> None:
    """Refuse experts whose four tokens do not give the same together and alone, where their weights are plain."""
    # By the type of the data: a weight of an adapter's base is one too.
    weight = next(weight for weight in experts.parameters() if weight.ndim == 3)
    hidden = getattr(innermost(experts), "hidden_dim", None) or getattr(
        innermost(experts), "hidden_size", None
    )
    if type(weight.data) is not torch.Tensor or weight.is_meta or not isinstance(hidden, int):
        return
    tokens = torch.arange(4, device=weight.device)
    chosen = torch.stack((tokens % len(weight), (tokens + 1) % len(weight)), dim=1)
    shares = torch.linspace(0.2, 0.9, 8, device=weight.device, dtype=weight.dtype).view(4, 2)
    _compare_tokens(experts, _four_tokens(hidden, weight), chosen, shares)


def _four_tokens(width: int, like: torch.Tensor) -> torch.Tensor:
    # Fixed numbers, none alike: the global generator stays as it is.
    return torch.linspace(-2, 2, 4 * width).view(width, 4).T.sin().to(like.device, like.dtype)


def _compare_tokens(mlp: torch.nn.Module, x: torch.Tensor, *choices: torch.Tensor) -> None:
    with torch.no_grad():
        together = mlp(x, *choices)
        alone = [mlp(*(each.narrow(-2, token, 1) for each in (x, *choices))) for token in range(4)]
    if not isinstance(together, torch.Tensor) or together.shape[:-1] != x.shape[:-1]:
        raise ArgumentError(
            f"{type(mlp).__name__} does not map [batch, tokens, hidden] to one tensor of as many tokens",
            found=type(together).__name__,
        )
    error = (together - torch.cat(alone, dim=-2)).abs().max() / together.abs().max().clamp_min(1e-30)
    # Products of four rows and of one may add in another order, or be rounded to TF32.
    if not float(error) <= max(2e-3, torch.finfo(x.dtype).eps ** 0.5):
        raise ArgumentError(
            f"{type(mlp).__name__} lets tokens depend on each other, so it cannot run in tiles",
            found=f"four tokens together and alone differ by {float(error):.1e} of the largest value",
        )


def _mlps_of(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Return what runs in tiles: experts, and MLPs that hold none."""
    found: list[torch.nn.Module] = []
    for path, blocks in model.named_modules():
        if not isinstance(blocks, torch.nn.ModuleList):
            continue
        inside = [_mlps_in(block) for block in blocks]
        if any(inside):
            for index, (block, mlps) in enumerate(zip(blocks, inside)):
                if not mlps:
                    raise _no_mlp(f"{path}.{index}, a {type(block).__name__}", block)
                found += [mlp for mlp in mlps if not any(mlp is other for other in found)]
    if not found:
        raise _no_mlp(f"any block of {type(model).__name__}", model)
    return found


def _mlps_in(block: torch.nn.Module) -> list[torch.nn.Module]:
    experts = experts_in(block)
    mlps = [
        module
        for name, module in block.named_modules()
        if name.rpartition(".")[2] in (*MLP_NAMES, *SHARED_NAMES)
        # A mixture is not one MLP: of what it holds, each is by itself.
        and not any(within is expert for within in module.modules() for expert in experts.values())
    ]
    return [*experts.values(), *mlps]


def _no_mlp(where: str, module: torch.nn.Module) -> ArgumentError:
    return ArgumentError(
        f"no MLP in {where}",
        found=", ".join(name for name, _ in module.named_children()) or "no layers",
        allowed=f"a layer called {' or '.join(MLP_NAMES)}",
        fix="train this model without the tiled MLP",
    )


def _tiled_class(kind: type[torch.nn.Module]) -> type[torch.nn.Module]:
    return kind if issubclass(kind, TiledMLP) else type(f"Tiled{kind.__name__}", (TiledMLP, kind), {})


class _Keep(torch.autograd.Function):
    """Saves its inputs and passes them on.

    What `_Tiles` needs later is saved here, before it computes: where a checkpointed block is computed again, torch
    stops when the last saved tensor is there, which spares a forward pass over all tiles. The anchor makes this a
    node of the graph also when no input needs a gradient.
    """

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(*(x for x in inputs if not x.is_floating_point()))
        return tuple(x.view_as(x) for x in inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        return None, *grad_outputs


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mlp: TiledMLP, keep: Any, num_inputs: int, *tensors: torch.Tensor) -> torch.Tensor:
        """`tensors`: the inputs, then the parameters that are trained."""
        inputs = tensors[:num_inputs]
        ctx.keep, ctx.mlp = keep, mlp
        device = inputs[0].device.type
        ctx.autocast = {
            "device_type": device,
            "enabled": torch.is_autocast_enabled(device),
            "dtype": torch.get_autocast_dtype(device),
        }
        return mlp._in_tiles(*inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        inputs = ctx.keep.saved_tensors
        smooth = [index for index, x in enumerate(inputs) if x.is_floating_point()]
        # Asked for again: FSDP2 takes them away after the forward pass and brings them back for this.
        parameters = ctx.mlp._trainable()
        sums: list[torch.Tensor | None] = [None] * len(parameters)
        dinputs = [torch.zeros_like(x) if index in smooth else None for index, x in enumerate(inputs)]
        for start, length in ctx.mlp._tiles(inputs[0].shape[-2]):
            tile = [x.narrow(-2, start, length).detach() for x in inputs]
            wanted = [tile[index].requires_grad_() for index in smooth]
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                out = ctx.mlp._one_tile(*tile)
            dout = grad_outputs[0].narrow(-2, start, length)
            grads = torch.autograd.grad(out, (*wanted, *parameters), dout, allow_unused=True)
            for index, grad in zip(smooth, grads):
                if grad is not None:
                    cast(torch.Tensor, dinputs[index]).narrow(-2, start, length).copy_(grad)
            for index, grad in enumerate(grads[len(smooth) :]):
                if grad is None:
                    continue
                total = sums[index]
                if total is None:
                    sums[index] = grad.to(torch.promote_types(grad.dtype, torch.float32))
                else:
                    total += grad
        rounded = [None if s is None else s.to(p.dtype) for s, p in zip(sums, parameters)]
        return None, None, None, *dinputs, *rounded
