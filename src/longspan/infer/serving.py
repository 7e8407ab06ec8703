"""Servers that an evaluation starts for itself: `--serve vllm` and the like start one, wait, and stop it in the end.

    with served(config, tokenizer) as answerer:      flags fit the model, its RoPE, the length and the processes
        answerer.generate(...)                       the server is gone afterwards, whatever happens

What is started is one process group: it ends with the evaluation, on Ctrl-C, on SIGTERM and on failure. Its output goes
to a log file, whose last lines are part of the message where it does not come up.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError
from urllib.request import urlopen

from longspan.api import ServerConfig
from longspan.core.errors import ConfigError, RunError
from longspan.core.files import sha256_bytes, sha256_file
from longspan.core.log import get_logger
from longspan.data.tokenizer import Tokenizer
from longspan.infer.config import AnswererConfig
from longspan.infer.handshake import shake_own_hands
from longspan.infer.remote import RemoteAnswerer, open_remote
from longspan.models.gguf_file import gguf_rope, yarn_settings_refused

READY_SECONDS = 1800.0
"""Most seconds until a server answers: weights of hundreds of gigabytes are read first."""
_POLL_SECONDS, _STOP_SECONDS = 0.1, 20.0
_LAST_LINES = 12
_TRANSFORMERS = "from transformers.cli.transformers import main; main()"
_log = get_logger("infer")

Flags = Callable[[AnswererConfig, Mapping[str, Any] | None], list[str]]
"""Settings, RoPE that is told -> flags, without host and port."""


class ServerProgram(NamedTuple):
    """How a server is started."""

    command: tuple[str, ...]
    """Before the model's name, which the flags begin with."""
    flags: Flags
    package: str
    """Whose version is recorded where the server does not say its own; empty: the command says it (--version)."""
    kv_dtypes: tuple[str, ...] = ()
    """Types that its KV cache can be told to have."""
    version_path: str = ""
    """Where it says its version; empty: nowhere."""
    takes_ids: bool = True
    """Whether a prompt may be token ids, so that it is the same here and there."""


def _vllm(config: AnswererConfig, rope: Mapping[str, Any] | None) -> list[str]:
    flags = [config.model, "--enable-prefix-caching", "--tensor-parallel-size", str(config.tp)]
    flags += _if("--max-model-len", config.max_length) + _if("--dtype", config.dtype)
    flags += _if("--kv-cache-dtype", config.kv_dtype)
    return flags + _if("--hf-overrides", _overrides(config, rope))


def _sglang(config: AnswererConfig, rope: Mapping[str, Any] | None) -> list[str]:
    flags = ["--model-path", config.model, "--tp", str(config.tp)]  # prefixes are kept by default
    flags += _if("--context-length", config.max_length) + _if("--dtype", config.dtype)
    flags += _if("--kv-cache-dtype", {"fp8": "fp8_e5m2"}.get(str(config.kv_dtype), config.kv_dtype))
    return flags + _if("--json-model-override-args", _overrides(config, rope))


def _llama_cpp(config: AnswererConfig, rope: Mapping[str, Any] | None) -> list[str]:
    if not config.model.endswith(".gguf") or not Path(config.model).is_file():
        raise ConfigError(
            "llama.cpp reads one GGUF file",
            found=config.model,
            fix="name that file with --model; `longspan export --gguf` writes one",
        )
    if config.dtype is not None or config.tp > 1:
        raise ConfigError("llama.cpp takes no --tp, and the type of the weights is the file's: no --dtype")
    flags = ["--model", config.model, "--parallel", "1"] + _if("--ctx-size", config.max_length)
    if config.kv_dtype is not None:
        flags += ["--cache-type-k", config.kv_dtype, "--cache-type-v", config.kv_dtype, "--flash-attn", "on"]
    if rope is None:
        return flags
    _refuse_for_llama_cpp(config.model, rope)
    if "rope_type" in rope:
        kind = str(rope["rope_type"])
        flags += ["--rope-scaling", {"default": "none"}.get(kind, kind)]
    for key, flag in _LLAMA_CPP_ROPE.items():
        flags += _if(flag, rope.get(key))
    return flags


def _refuse_for_llama_cpp(file: str, rope: Mapping[str, Any]) -> None:
    """Refuse a RoPE that its server cannot be told, or would take together with what the file says."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn"):
        raise ConfigError("llama.cpp is told no such RoPE", found=kind, allowed="default, linear, yarn")
    if kind != "default" and rope.get("factor") is None:
        raise ConfigError(
            "llama.cpp has to be told how much this RoPE is scaled", found=f"{kind} without factor"
        )
    known = {"rope_type", *_LLAMA_CPP_ROPE, *(_YARN_JUDGED if kind == "yarn" else ())}
    unsaid = [key for key, value in rope.items() if key not in known and value is not None]
    if kind == "yarn":
        unsaid += yarn_settings_refused(rope)
    if unsaid:
        raise ConfigError("llama.cpp cannot be told this about a RoPE", found=", ".join(unsaid))
    if "rope_type" in rope and _gguf_rope(file)[0].get("rope_type") == "tensor":
        raise ConfigError(
            f"{file} says its RoPE as a tensor, which llama.cpp would use beside the one that is told",
            fix="write the file with the other RoPE: `longspan export --rope ... --gguf`",
        )


def _transformers(config: AnswererConfig, rope: Mapping[str, Any] | None) -> list[str]:
    if rope is not None or config.tp > 1:
        raise ConfigError(
            "transformers serve takes no other RoPE and no --tp", fix="write the RoPE with `longspan export`"
        )
    return [config.model, *_if("--dtype", config.dtype)]


_LLAMA_CPP_ROPE = {
    "factor": "--rope-scale",
    "rope_theta": "--rope-freq-base",
    "original_max_position_embeddings": "--yarn-orig-ctx",
    "beta_fast": "--yarn-beta-fast",
    "beta_slow": "--yarn-beta-slow",
}
"""What llama.cpp calls the settings of a RoPE."""
_YARN_JUDGED = ("attention_factor", "mscale", "mscale_all_dim")
XLLAMACPP = "xllamacpp"
"""The package that carries llama.cpp's server."""
PROGRAMS: Mapping[str, ServerProgram] = {
    "vllm": ServerProgram(("vllm", "serve"), _vllm, "vllm", ("fp8",), "/version"),
    "sglang": ServerProgram(
        (sys.executable, "-m", "sglang.launch_server"), _sglang, "sglang", ("fp8",), "/get_server_info"
    ),
    "llama.cpp": ServerProgram(("llama-server",), _llama_cpp, "", ("q8_0", "q4_0")),
    "transformers": ServerProgram(
        (sys.executable, "-c", _TRANSFORMERS, "serve"), _transformers, "transformers", takes_ids=False
    ),
}


@contextlib.contextmanager
def served(
    config: AnswererConfig, tokenizer: Tokenizer, rope: Mapping[str, Any] | None = None
) -> Iterator[RemoteAnswerer]:
    """Start the server that `config.serve` names, wait until it answers, stop it in the end.

    Its first request is checked before it is given out (`infer.handshake`).

    Args:
        rope: RoPE that the server is to use instead of the model's own.

    Raises:
        ConfigError: the engine cannot do what is asked, or is not installed.
        RunError: it ended, or did not answer in time.
    """
    engine = installed(str(config.serve))
    if config.kv_dtype is not None and config.kv_dtype not in engine.kv_dtypes:
        raise ConfigError(
            f"{config.serve} has no such KV cache",
            found=f"--kv-dtype {config.kv_dtype}",
            allowed=engine.kv_dtypes or "none but its own",
        )
    flags = _with_more(engine.flags(config, rope), config)
    command = [*engine.command, *flags]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = Path(tempfile.mkdtemp(prefix="longspan-serve-")) / "log.txt"
    _log.info("%s; its output: %s", " ".join(command), log)
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        with _ended_by_sigterm():
            address = f"http://127.0.0.1:{port}"
            _wait(process, f"{address}/health", log, name=str(config.serve))
            base = config.server or ServerConfig()
            server = base.model_copy(update={"base_url": f"{address}/v1", "max_length": config.max_length})
            answerer = open_remote(f"completions:{config.model}", server, tokenizer=tokenizer)
            answerer.identity, answerer.sends_ids = (
                _identity(config, flags, rope) | {"version": _version(engine, address)},
                engine.takes_ids,
            )
            with contextlib.closing(answerer):
                shake_own_hands(answerer, tokenizer, name=str(config.serve))
                yield answerer
    finally:
        _stop(process)


def _with_more(flags: list[str], config: AnswererConfig) -> list[str]:
    """Return flags and those that the user adds. Raises ConfigError: they say what is said already."""
    try:
        more = shlex.split(config.serve_flags or "")
    except ValueError as error:
        raise ConfigError(
            "serve_flags are not a command line", found=f"{config.serve_flags} ({error})"
        ) from None
    named = {flag.partition("=")[0] for flag in more if flag.startswith("-")}
    if twice := sorted(named & {*flags, "--host", "--port"}):
        raise ConfigError(
            f"serve_flags say what {config.serve} is told already",
            found=" ".join(twice),
            fix="leave them out; length, type, processes and RoPE have settings of their own "
            "(max_length, dtype, tp, rope)",
        )
    return flags + more


def installed(name: str) -> ServerProgram:
    """Return a server's program with the path of its command. Raises ConfigError: it is not installed."""
    engine = PROGRAMS[name]
    first, *rest = engine.command
    found = shutil.which(first) or shutil.which(first, path=str(Path(sys.executable).parent))
    if found is not None:
        return engine._replace(command=(found, *rest))
    fix = None
    if name == "llama.cpp":
        if importlib.util.find_spec(XLLAMACPP) is not None:
            return engine._replace(
                command=(sys.executable, "-m", "longspan.infer.llama_cpp"), package=XLLAMACPP
            )
        fix = f"pip install {XLLAMACPP}, which carries llama.cpp's server, or put {first} on the PATH"
    raise ConfigError(f"{name} is not installed", found=f"no {first} on PATH", fix=fix)


def _wait(process: subprocess.Popen[bytes], address: str, log: Path, *, name: str) -> None:
    ends = time.monotonic() + READY_SECONDS
    while time.monotonic() < ends:
        if process.poll() is not None:
            raise RunError(
                f"{name} ended before it answered (exit code {process.returncode})", found=_tail(log)
            )
        try:
            with urlopen(address, timeout=5) as answer:
                if answer.status == 200:
                    return
        except (URLError, OSError):
            pass
        time.sleep(_POLL_SECONDS)
    raise RunError(f"{name} did not answer within {READY_SECONDS:,.0f} s", found=_tail(log))


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started, gently first."""
    for number, seconds in ((signal.SIGTERM, _STOP_SECONDS), (signal.SIGKILL, _STOP_SECONDS)):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)  # workers of its group may outlive it
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """Turn SIGTERM into the exception of Ctrl-C, so that what was started is stopped."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _identity(
    config: AnswererConfig,
    flags: list[str],
    rope: Mapping[str, Any] | None,
) -> dict[str, Any]:
    path = Path(config.model)
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    parts = [sha256_file(file) for file in files] or [config.model]
    used: Mapping[str, Any]
    if path.suffix == ".gguf":
        own, length = _gguf_rope(config.model)
        if rope is not None and "rope_type" in rope:
            own = {"rope_theta": own.get("rope_theta")}  # the file's scaling goes
        used = {**own, **(rope or {})}
    else:
        said = path / "config.json"
        values = json.loads(said.read_text(encoding="utf-8")) if said.is_file() else {}
        text = values.get("text_config", values)
        length = text.get("max_position_embeddings")
        used = rope or text.get("rope_parameters") or text.get("rope_scaling") or {}
    return {
        "path": config.model,
        "fingerprint": sha256_bytes(" ".join([*parts, json.dumps(used, sort_keys=True)]).encode())[:16],
        "rope": dict(used),
        "trained_length": length,
        "backend": str(config.serve),
        "flags": [flag for flag in flags if flag != config.model],
        "kv_dtype": config.kv_dtype or "auto",
    }


def _gguf_rope(file: str) -> tuple[dict[str, Any], int | None]:
    """Return RoPE and length that a file says; nothing where the package that reads it is not installed."""
    if importlib.util.find_spec("gguf") is None:
        return {}, None
    return gguf_rope(file)


def _version(engine: ServerProgram, address: str) -> str:
    """Return the server's version as it says it itself; the package here may be another than the one that runs."""
    if engine.version_path:
        unsaid = contextlib.suppress(OSError, ValueError, KeyError, TypeError)
        with unsaid, urlopen(address + engine.version_path, timeout=30) as answer:
            return str(json.load(answer)["version"])
    if engine.package:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            version = importlib.metadata.version(engine.package)
            return f"{XLLAMACPP} {version}" if engine.package == XLLAMACPP else version
    try:
        done = subprocess.run([engine.command[0], "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    lines = (done.stdout + done.stderr).strip().split("\n")
    # A llama.cpp that loads its parts at run time says first which.
    return next((line for line in lines if line.startswith("version")), lines[0]) or "unknown"


def _overrides(config: AnswererConfig, rope: Mapping[str, Any] | None) -> str | None:
    """Return what a server is told of the model's config; None: it reads all in the folder."""
    told: dict[str, Any] = {} if rope is None else {"rope_parameters": dict(rope)}
    if rope is not None and config.max_length is not None:
        told["max_position_embeddings"] = int(config.max_length)
    return json.dumps(told) if told else None


def _if(flag: str, value: object) -> list[str]:
    return [] if value is None else [flag, str(value)]


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_LAST_LINES:])
