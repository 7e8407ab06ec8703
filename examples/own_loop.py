"""Your own training loop, its sequences spread over several processes: three calls make the difference.

    python examples/own_loop.py                                                       one process
    torchrun --nproc-per-node 4 examples/own_loop.py                                  a ring of four
    torchrun --nproc-per-node 4 examples/own_loop.py --schedule usp --ulysses 2       two by two

It prints the same losses every time. The model is a small Llama with new weights, the text is this file; any
causal language model from transformers takes their place.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, LlamaConfig

import longspan


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--schedule", default="ring", help="ring, striped, dist_flash, ulysses, usp or all_gather"
    )
    parser.add_argument(
        "--ulysses", type=int, default=1, help="processes that trade heads, for ulysses and usp"
    )
    parser.add_argument("--steps", type=int, default=5)
    options = parser.parse_args()
    world = int(os.environ.get("WORLD_SIZE", "1"))

    with longspan.process_group(timeout_seconds=300) as device:
        # 1. Who is who: the processes of one sequence on a grid, ring x ulysses.
        mesh = longspan.build_mesh(
            longspan.MeshConfig(cp_ring=world // options.ulysses, cp_ulysses=options.ulysses), device
        )
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_llama()).to(device)
        # 2. Attention that knows documents and other processes.
        model = longspan.enable(model, schedule=options.schedule, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

        tokens = torch.tensor(list(Path(__file__).read_bytes()), device=device)
        documents = [0, 1000, 1500, len(tokens)]
        for step in range(options.steps):
            # 3. This process' part of the batch. All are given the same batch; any length will do.
            batch = longspan.shard_batch(model, tokens, cu_seqlens=documents)
            loss = model(**batch).loss
            loss.backward()
            loss = loss.detach()
            if mesh.cp_group is not None:
                # Each process has the loss and the gradients of its tokens: their sums are those of the batch.
                dist.all_reduce(loss, group=mesh.cp_group)
                for parameter in model.parameters():
                    dist.all_reduce(parameter.grad, group=mesh.cp_group)
            optimizer.step()
            optimizer.zero_grad()
            if mesh.is_first:
                print(f"step {step}: loss {loss:.6f}", flush=True)


def tiny_llama() -> LlamaConfig:
    """Return a Llama over bytes, 8 heads on 4 key/value heads."""
    return LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=4096,
    )


if __name__ == "__main__":
    main()
