"""A real server under it all: a model of random weights, whose replies are of no use, but nothing breaks."""

from __future__ import annotations

import pytest

from longspan.api import Client, Endpoint, Limits
from longspan.core.errors import RunError, UserError
from longspan.synth import SynthJob, UsedDocuments, require_samples

# The server and its model are those of the client's own tests.
from tests.infer.test_remote import folder, transformers_serve  # noqa: F401
from tests.patience import PATIENCE_SECONDS


@pytest.mark.slow
def test_transformers_serve_is_asked_and_all_is_rejected_with_reasons(
    settings_of,
    student,
    tmp_path,
    folder,  # noqa: F811
    transformers_serve,  # noqa: F811
):
    settings = settings_of("one_detail_book", answer_tokens=12, section_tokens=180)
    used = UsedDocuments(tmp_path / "used.sqlite")
    answers = tmp_path / "answers.sqlite"

    def run(model: str):
        endpoint = Endpoint(model=model, base_url=transformers_serve, timeout=PATIENCE_SECONDS)
        limits = Limits(concurrency=2, max_attempts=2, backoff_seconds=0.1)
        with Client(endpoint, limits=limits, cache=answers) as client:
            summary = SynthJob(settings, tmp_path / "out", student, client=client, used=used).run()
            return summary, client.report()

    with pytest.raises(UserError, match="no-such-model"):
        run("no-such-model")
    summary, report = run(str(folder))
    asked = report.attempts
    assert summary["requests"] == {"answered": asked} and asked >= 18
    rejected = {name: count for name, count in summary["questions"].items() if name.startswith("reply: ")}
    assert sum(rejected.values()) == asked
    with pytest.raises(RunError, match=r"0 samples came out(.|\n)*6 no question left"):
        require_samples(summary)
    _, again = run(str(folder))
    assert again.attempts == 0 and again.cached == asked
