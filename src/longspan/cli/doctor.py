"""`longspan doctor`: what is installed, what is usable and why the rest is not.

Each finding is made by trying: a kernel is usable when it computes four tokens correctly. Nothing here
raises because something is missing; that is what it is there to say.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from longspan.cli.output import Json, example, print_json, print_table
from longspan.core.errors import ArgumentError
from longspan.core.log import get_logger

EXAMPLE = example(
    "longspan doctor --json",
    "longspan doctor --certify --schedule striped --world 2",
    "longspan doctor --certify --layers gdn --world 2",
)
FIRST_STEPS = "\b\nFirst steps:\n  longspan doctor\n  longspan quickstart --out quickstart-run"

REQUIRED = ("torch", "transformers", "tokenizers", "gigatoken", "numpy", "pyarrow", "safetensors")


def doctor(
    certify: Annotated[
        bool,
        typer.Option(
            "--certify",
            help="Prove context parallelism instead: every schedule on every mask against one device.",
        ),
    ] = False,
    schedule: Annotated[
        str, typer.Option(help="With --certify: schedules, with commas between, or all.")
    ] = "all",
    world: Annotated[
        str, typer.Option(help="With --certify: numbers of processes, with commas between.")
    ] = "2,3,4,8",
    layers: Annotated[
        str,
        typer.Option(
            help="With --certify: instead of attention, kinds of layers with a state (gdn, kda, mamba2, mamba1, conv, "
            "lightning), with commas between, or all."
        ),
    ] = "",
    as_json: Json = False,
) -> None:
    """Say what is installed, which backends are usable and why the others are not.

    The exit code is 1 when a required package is missing, or when a proof fails. Under torchrun, --certify uses
    the processes there are, on their GPUs; else it starts processes on this machine's CPU.
    """
    if certify:
        from longspan.cli.certify import certify_schedules
        from longspan.cli.certify_layers import certify_state_layers

        if layers:
            passed = certify_state_layers(layers, schedule, world, as_json=as_json)
        else:
            passed = certify_schedules(schedule, world, as_json=as_json)
        if not passed:
            raise typer.Exit(1)
        return
    if (schedule, world, layers) != ("all", "2,3,4,8", ""):
        raise ArgumentError("--schedule, --world and --layers say what is proved", fix="give --certify")
    get_logger("longspan").setLevel(logging.WARNING)  # what the parts say while they are tried is no result
    report = examine()
    if as_json:
        print_json(report)
    else:
        _print(report)
    if None in report["packages"].values():
        raise typer.Exit(1)


def examine() -> dict[str, Any]:
    """Return the findings as plain values; a part that cannot be examined says why."""
    return {
        "longspan": _version("longspan"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in REQUIRED},
        "extras": _extras(),
        "machine": _machine(),
        "devices": _attempt(_devices),
        "attention": _attempt(_kernels),
        "tokenizer": _attempt(_tokenizer),
    }


def _attempt(look: Callable[[], Any]) -> Any:
    try:
        return look()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the installation is the finding
        return {"problem": _in_a_line(error)}


def _in_a_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _extras() -> dict[str, dict[str, str | None]]:
    """Return the packages of each optional extra, `longspan[name]`, with the installed version or None."""
    try:
        requirements = importlib.metadata.requires("longspan") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    extras: dict[str, dict[str, str | None]] = {}
    for requirement in requirements:
        package = re.match(r"[A-Za-z0-9._-]+", requirement)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
        if package and extra:
            extras.setdefault(extra.group(1), {})[package.group()] = _version(package.group())
    return extras


def _machine() -> dict[str, Any]:
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    disk = shutil.disk_usage(Path.cwd())
    memory = None
    if hasattr(os, "sysconf") and {"SC_PAGE_SIZE", "SC_PHYS_PAGES"} <= set(os.sysconf_names):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpus": cpus,
        "memory_bytes": memory,
        "disk_free_bytes": disk.free,
        "disk_total_bytes": disk.total,
    }


def _devices() -> list[str]:
    import torch

    names = [f"cpu ({torch.get_num_threads()} threads)"]
    if torch.cuda.is_available():
        names += [f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())]
    return names


def _kernels() -> list[dict[str, Any]]:
    """Return every attention kernel on every device: usable or not, why, and which one is chosen."""
    import torch

    from longspan.kernels.attention import choose_kernel
    from longspan.kernels.attention.cpu_flash import CpuFlashKernel
    from longspan.kernels.attention.cuda_varlen import CudaVarlenKernel
    from longspan.kernels.attention.reference import ReferenceKernel

    places: list[tuple[Any, str, torch.dtype]] = [
        (CpuFlashKernel, "cpu", torch.float32),
        (ReferenceKernel, "cpu", torch.float32),
        (CudaVarlenKernel, "cuda", torch.bfloat16),
        (ReferenceKernel, "cuda", torch.bfloat16),
    ]
    found = []
    for kernel, device, dtype in places:
        if device == "cuda" and not torch.cuda.is_available():
            reason: str | None = f"torch {torch.__version__} sees no CUDA device"
        else:
            reason = _attention_problem(kernel, device, dtype)
        usable = reason is None
        chosen = usable and choose_kernel(device).name == kernel.name
        found.append({
            "kernel": kernel.name, "device": device, "usable": usable, "chosen": chosen,
            "reason": reason or "gives the same output as the reference on four tokens",
        })  # fmt: skip
    return found


def _attention_problem(kernel: Any, device: str, dtype: Any) -> str | None:
    """Run four tokens of two documents through a kernel; return what is wrong with the outcome, or None."""
    import torch

    from longspan.kernels.attention import Bands
    from longspan.kernels.attention.reference import ReferenceKernel

    try:
        generator = torch.Generator().manual_seed(0)
        q, k, v = (torch.randn(4, 2, 16, generator=generator).to(device, dtype) for _ in range(3))
        bands = Bands.from_documents([0, 1, 4])
        out, _ = kernel().forward(q, k, v, bands, 0.25)
        expected, _ = ReferenceKernel().forward(q, k, v, bands, 0.25)
        difference = (out.float() - expected.float()).abs().max().item()
    except Exception as error:  # noqa: BLE001 - whatever a kernel says is why it is not usable
        return _in_a_line(error)
    limit = 1e-5 if dtype == torch.float32 else 3e-2
    return None if difference <= limit else f"differs from the reference by {difference:.1e}"


def _tokenizer() -> dict[str, Any]:
    """Train a throw-away tokenizer, load it and return which engine was taken and why."""
    from longspan.data.tokenizer import load_tokenizer, train_bpe

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "tokenizer"
        train_bpe(["the quick brown fox jumps over the lazy dog"] * 4, place, vocab_size=300)
        tokenizer = load_tokenizer(place)
    return {"backend": tokenizer.backend, "reason": tokenizer.backend_reason}


def _state(kernel: dict[str, Any]) -> str:
    if kernel["chosen"]:
        return "chosen"
    return "usable" if kernel["usable"] else "not usable"


def _print(report: dict[str, Any]) -> None:
    from longspan.core.units import format_bytes

    rows: list[tuple[str, object]] = [
        ("longspan", report["longspan"] or "not installed as a package"),
        ("python", report["python"]),
        ("platform", report["platform"]),
        *((name, version or "MISSING") for name, version in report["packages"].items()),
    ]
    for name, packages in report["extras"].items():
        missing = [package for package, version in packages.items() if version is None]
        state = f"missing {', '.join(missing)}: pip install 'longspan[{name}]'" if missing else "installed"
        rows.append((f"extra {name!r}", state))
    machine = report["machine"]
    memory = "unknown" if machine["memory_bytes"] is None else format_bytes(machine["memory_bytes"])
    rows.append(("processors", machine["cpus"]))
    rows.append(("memory", memory))
    free, total = format_bytes(machine["disk_free_bytes"]), format_bytes(machine["disk_total_bytes"])
    rows.append(("disk here", f"{free} free of {total}"))
    devices = report["devices"]
    rows.append(("devices", ", ".join(devices) if isinstance(devices, list) else devices["problem"]))
    tokenizer = report["tokenizer"]
    rows.append(("tokenizer", tokenizer.get("problem") or f"{tokenizer['backend']}: {tokenizer['reason']}"))
    print_table("installation", ("what", "found"), rows)
    kernels = report["attention"]
    if isinstance(kernels, dict):
        print_table("attention kernels", ("what", "found"), [("problem", kernels["problem"])])
        return
    print_table(
        "attention kernels",
        ("kernel", "device", "state", "why"),
        [(k["kernel"], k["device"], _state(k), k["reason"]) for k in kernels],
    )
