"""What names a model in an evaluation record: where it came from, its weights, its RoPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from longspan.core.files import read_json, sha256_bytes, sha256_file
from longspan.models.hf import rope_fingerprint
from longspan.models.hf_config import text_config
from longspan.models.places import OWN_FILE


def model_identity(
    model: PreTrainedModel, path: str | Path, *, shown_as: str | None = None
) -> dict[str, Any]:
    """Return path, fingerprint and RoPE ({}: none) of a model loaded from the folder or hub name `path`.

    The fingerprint covers the bytes of the weight files (a hub name is taken as given), those of an adapter's
    base by the fingerprint that it keeps, and the frequencies that the model really uses, so the same weights with
    another RoPE are another model. `shown_as` replaces the path in the record.
    """
    weights = sorted(Path(path).glob("*.safetensors"))
    parts = [sha256_file(file) for file in weights] or [str(path)]
    adapter = Path(path) / OWN_FILE
    if adapter.is_file():
        parts.append(str(read_json(adapter).get("base_fingerprint")))
    parts.append(rope_fingerprint(model))
    return {
        "path": shown_as or str(path),
        "fingerprint": sha256_bytes(" ".join(parts).encode())[:16],
        "rope": dict(getattr(text_config(model.config), "rope_parameters", None) or {}),
    }
