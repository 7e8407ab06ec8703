"""Servers that are started for an evaluation: flags, handshake, and that none is left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longspan.core.errors import ConfigError, RunError
from longspan.data.tokenizer import Tokenizer
from longspan.infer.config import AnswererConfig
from longspan.infer.requests import Request
from longspan.infer.serving import PROGRAMS, installed, served
from tests.patience import PATIENCE_SECONDS

PROGRAM = """#!{python}
import json, os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
folder, mode = {folder!r}, {mode!r}
if "--version" in sys.argv:
    sys.exit(print("load_backend: CPU\\nversion: 11434 (fake)" if mode == "parts" else "1.2.3 (fake)"))
open(os.path.join(folder, "told.json"), "w").write(json.dumps([os.getpid(), *sys.argv[1:]]))
if mode == "fails":
    sys.exit("no memory for a cache")
worker = os.fork()
if worker == 0:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.pause()
open(os.path.join(folder, "worker"), "w").write(str(worker))
class Handler(BaseHTTPRequestHandler):
    def reply(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.reply({{"version": "4.5.6"}} if self.path == "/version" and mode == "says" else {{}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        count = len(asked["prompt"]) + (9 if mode == "counts" else 0)
        usage = {{"prompt_tokens": count, "completion_tokens": 1}}
        text = ("ids " if isinstance(asked["prompt"], list) else "text ") + str(asked["max_tokens"])
        self.reply({{"choices": [{{"index": 0, "text": text, "finish_reason": "stop"}}], "usage": usage}})
    def log_message(self, *a):
        pass
HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a program of some name before all others, which behaves in one of some ways."""

    def made(name: str = "vllm", mode: str = "") -> Path:
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(PROGRAM.format(python=sys.executable, folder=str(tmp_path), mode=mode))
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{path.parent}{os.pathsep}{os.environ['PATH']}")
        return tmp_path

    return made


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def gone(*pids: int) -> bool:
    """Return whether processes that were killed are gone, which takes the kernel a moment."""
    for _ in range(int(PATIENCE_SECONDS / 0.01)):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.01)
    return False


def test_a_server_is_told_what_fits_and_is_gone_afterwards(program: Any, tokenizer: Tokenizer) -> None:
    """A server without the RoPE of the model answers wrongly, and one that is left holds the card's memory."""
    folder = program()
    settings: dict[str, Any] = {
        "model": "meta/some",
        "serve": "vllm",
        "max_length": 4096,
        "tp": 2,
        "kv_dtype": "fp8",
    }
    config = AnswererConfig(**settings, serve_flags="--seed=3 --chat-template 'a b.jinja'")
    ids = np.arange(5)
    with served(config, tokenizer, {"rope_type": "linear", "factor": 4.0}) as answerer:
        [(_, answer)] = answerer.generate([Request("12345", ids, max_new_tokens=7)])
        worker = int((folder / "worker").read_text())
        assert alive(worker)
    told = json.loads((folder / "told.json").read_text())
    assert answer.text == "ids 7" and answer.prompt_tokens == 5
    assert told[1:-4] == [
        *(
            "serve",
            "meta/some",
            "--enable-prefix-caching",
            "--tensor-parallel-size",
            "2",
            "--max-model-len",
            "4096",
        ),
        *("--kv-cache-dtype", "fp8", "--hf-overrides"),
        json.dumps(
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "max_position_embeddings": 4096}
        ),
        *("--seed=3", "--chat-template", "a b.jinja"),
    ]
    assert gone(told[0], worker)
    said = answerer.identity
    assert (said["backend"], said["version"], said["kv_dtype"]) == ("vllm", "1.2.3 (fake)", "fp8")
    assert "--port" not in said["flags"] and said["rope"] == {"rope_type": "linear", "factor": 4.0}
    assert "--seed=3" in said["flags"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--max-model-len=9", "told already"),
        ("--port 80", "told already"),
        ("--seed 'a", "not a command line"),
    ],
)
def test_flags_that_cannot_be_added_are_refused(
    program: Any, tokenizer: Tokenizer, flags: str, words: str
) -> None:
    """The last of two flags counts for most servers: the records would name a length that was not the server's."""
    folder = program()
    config = AnswererConfig(model="meta/some", serve="vllm", max_length=4096, serve_flags=flags)
    with pytest.raises(ConfigError, match=words), served(config, tokenizer):
        raise AssertionError("a server was started")
    assert not (folder / "told.json").exists()


def test_a_server_that_says_its_version_is_believed(program: Any, tokenizer: Tokenizer) -> None:
    """The package of this environment is not what a program of another one runs."""
    program(mode="says")
    with served(AnswererConfig(model="meta/some", serve="vllm"), tokenizer) as answerer:
        assert answerer.identity["version"] == "4.5.6"


@pytest.mark.parametrize("how", ["error", "sigterm"])
def test_no_server_outlives_a_failure(program: Any, tokenizer: Tokenizer, how: str) -> None:
    """An exception, Ctrl-C or SIGTERM left a server behind that no later run could start beside."""
    folder = program()
    config = AnswererConfig(model="meta/some", serve="vllm")
    with (
        pytest.raises(KeyboardInterrupt if how == "sigterm" else ZeroDivisionError),
        served(config, tokenizer),
    ):
        if how == "sigterm":
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        raise ZeroDivisionError
    assert gone(json.loads((folder / "told.json").read_text())[0], int((folder / "worker").read_text()))
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_servers_that_do_not_come_up(program: Any, tokenizer: Tokenizer) -> None:
    """What a server says when it ends, and a tokenizer that is not its own, are known before the work begins."""
    config = AnswererConfig(model="meta/some", serve="vllm")
    program(mode="fails")
    message = r"(?s)vllm ended before it answered.*no memory for a cache"
    with pytest.raises(RunError, match=message), served(config, tokenizer):
        pass
    program(mode="counts")
    with pytest.raises(RunError, match="vllm counts other tokens"), served(config, tokenizer):
        pass


def test_flags_of_the_others(tmp_path: Path) -> None:
    """Each has its own words for length, cache and RoPE; what it cannot be told is refused."""
    yarn = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5e5, "original_max_position_embeddings": 8192}
    file = tmp_path / "m.gguf"
    write_rope(file)
    gguf = AnswererConfig(model=str(file), serve="llama.cpp", max_length=32768, kv_dtype="q8_0")
    assert " ".join(PROGRAMS["llama.cpp"].flags(gguf, {**yarn, "beta_fast": 16.0})) == (
        f"--model {file} --parallel 1 --ctx-size 32768 --cache-type-k q8_0 --cache-type-v q8_0 --flash-attn on "
        "--rope-scaling yarn --rope-scale 4.0 --rope-freq-base 500000.0 --yarn-orig-ctx 8192 --yarn-beta-fast 16.0"
    )
    alone = gguf.model_copy(update={"kv_dtype": None})
    flags = PROGRAMS["llama.cpp"].flags(alone, {"rope_theta": 1e6})  # the scaling stays the file's
    assert " ".join(flags).endswith("--ctx-size 32768 --rope-freq-base 1000000.0")
    plain = AnswererConfig(model="m", serve="sglang", kv_dtype="fp8")
    assert (
        " ".join(PROGRAMS["sglang"].flags(plain, None)) == "--model-path m --tp 1 --kv-cache-dtype fp8_e5m2"
    )
    with pytest.raises(ConfigError, match="takes no other RoPE"):
        PROGRAMS["transformers"].flags(AnswererConfig(model="m", serve="transformers"), yarn)
    for values, message in (
        ({"model": "openai:m", "serve": "vllm"}, "leave out serve"),
        ({"model": "m", "serve": "vllm", "cp": 2}, "leave out cp"),
        ({"model": "m", "serve": "vllm", "server": "http://a/v1"}, "leave out its address"),
        ({"model": "m", "kv_dtype": "q8_0"}, "llama.cpp's cache"),
        ({"model": "m", "kv_dtype": "int8", "cp": 2}, "takes no cp"),
    ):
        with pytest.raises(ConfigError, match=message):
            AnswererConfig.from_dict(values)


def write_rope(path: Path, *, slowed: bool = False) -> None:
    """Write a GGUF file of 4,096 positions and a linear RoPE, or of one that is a tensor; no layer is in it."""
    gguf = pytest.importorskip("gguf")
    file = gguf.GGUFWriter(path, "llama")
    file.add_context_length(4096)
    file.add_rope_freq_base(5e5)
    if not slowed:
        file.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        file.add_rope_scaling_factor(4.0)
    file.add_tensor("rope_freqs.weight" if slowed else "output_norm.weight", np.ones(4, dtype=np.float32))
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.mark.parametrize(
    ("values", "rope", "part"),
    [
        ({"model": "m"}, None, "one GGUF file"),
        ({"model": "no.gguf"}, None, "one GGUF file"),
        ({"tp": 2}, None, "takes no --tp"),
        ({"dtype": "float16"}, None, "takes no --tp"),
        ({}, {"rope_type": "dynamic", "factor": 2.0}, "told no such RoPE"),
        ({}, {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0}, "attention_factor: 1.0"),
        ({}, {"rope_type": "yarn", "attention_factor": 1.0}, "yarn without factor"),
        ({}, {"rope_type": "linear", "factor": 4.0, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"model": "slowed.gguf"}, {"rope_type": "linear", "factor": 4.0}, "RoPE as a tensor"),
    ],
)
def test_what_llama_cpp_would_not_heed_is_refused(tmp_path: Path, values: Any, rope: Any, part: str) -> None:
    """A setting that goes by the board gives the label of a model that was not asked."""
    write_rope(tmp_path / "m.gguf")
    write_rope(tmp_path / "slowed.gguf", slowed=True)
    values = {"model": "m.gguf", **values}
    config = AnswererConfig(**{**values, "model": str(tmp_path / values["model"])}, serve="llama.cpp")
    with pytest.raises(ConfigError, match=part):
        PROGRAMS["llama.cpp"].flags(config, rope)


def test_a_served_gguf_file_is_what_it_says(program: Any, tokenizer: Tokenizer, tmp_path: Path) -> None:
    """Records named no RoPE and no trained length, and of a llama.cpp built in parts the name of a part as version."""
    program("llama-server", mode="parts")
    write_rope(tmp_path / "m.gguf")
    config = AnswererConfig(model=str(tmp_path / "m.gguf"), serve="llama.cpp")
    with served(config, tokenizer, {"rope_type": "default"}) as answerer:
        assert answerer.identity["rope"] == {"rope_type": "default", "rope_theta": 5e5}
    with served(config, tokenizer) as answerer:
        said = answerer.identity
    assert said["rope"] == {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
    assert (said["trained_length"], said["version"]) == (4096, "version: 11434 (fake)")


def test_llama_cpp_of_a_package_stands_in_for_its_program(tmp_path: Path, monkeypatch: Any) -> None:
    """llama.cpp's releases are no package: where a package carries its server, that is started."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"no llama-server on PATH(.|\n)*pip install xllamacpp"):
        installed("llama.cpp")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "xllamacpp")
    found = installed("llama.cpp")
    assert found.command == (sys.executable, "-m", "longspan.infer.llama_cpp")
    assert found.package == "xllamacpp"
    with pytest.raises(ConfigError, match="vllm is not installed"):
        installed("vllm")


def test_a_cache_that_an_engine_does_not_have(program: Any, tokenizer: Tokenizer) -> None:
    """--kv-dtype that is not heeded would give a label that says what was not measured."""
    config = AnswererConfig(model="m", serve="transformers", kv_dtype="fp8")
    with pytest.raises(ConfigError, match="has no such KV cache"), served(config, tokenizer):
        pass
