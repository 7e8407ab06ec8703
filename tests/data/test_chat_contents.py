"""`data chat`: what is in conversations, and what cannot be used."""

from __future__ import annotations

import html
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from longspan.cli.main import app
from longspan.core.errors import ArgumentError
from tests.data.chat_tokenizers import chatty_tokenizer
from tests.data.malformed_chats import DIALECTS

PLAIN = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    orphan = [{"role": "user", "content": "Hi"}, {"role": "tool", "content": "12"}]
    records = [{"messages": turns, **values} for turns, values in DIALECTS.values()]
    records += [
        {"messages": talk},
        {"messages": orphan},
        {"messages": [{"role": "narrator", "content": "x"}]},
    ]
    records += [{"messages": "{"}, {"other": 1}]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["data", "chat", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_is_in_conversations(chats):
    """Calls kept in a text, thoughts in a turn of their own and faults are seen before a job of hours, not after it."""
    found = json.loads(run(chats, "--json"))
    same = len(DIALECTS)
    assert found["unit"] == "characters" and found["learnt"] is None
    assert found["counts"]["conversations"] == same + 2
    assert found["counts"]["conversations with tools"] == same
    assert found["counts"]["results without a call"] == 1
    assert found["counts"]["conversations that end without an answer"] == 1
    assert found["counts"]["conversations that cannot be used"] == 3
    assert {name: part["number"] for name, part in found["parts"].items()} == {
        "system": same, "user": same + 2, "answers": same + 1, "thoughts": same, "calls": same,
        "results of tools": same + 1, "schemas of tools": same,
    }  # fmt: skip
    assert found["parts"]["thoughts"]["longest"] == len("look first")
    assert any("unknown role" in reason for reason in found["faults"])
    text = run(chats)
    assert "conversations that cannot be used" in text and "unknown role" in text


def test_branches_go_on_where_their_text_ends(tmp_path):
    """Every text with questions was said to end without an answer, and a result behind the border to have no call."""
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": {}}}
    asked = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    said = {"role": "assistant", "content": "Hello"}
    result = {"role": "tool", "tool_call_id": "c1", "content": "12"}
    records = [
        {"messages": asked[:1], "branches": [[said], [asked[0], said]]},
        {"messages": asked, "branches": [[result, said], [result], [asked[0]]]},
    ]
    path = tmp_path / "branches.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert json.loads(run(path, "--json"))["counts"] == {
        "conversations": 2,
        "turns": 10,
        "calls without a result": 1,
        "conversations that begin as another": 3,
        "conversations that end without an answer": 2,
    }


def test_what_would_be_learnt(chats, tmp_path):
    """The share that is learnt, by the template that will write it: records that it cannot write are faults."""
    chatty_tokenizer(tmp_path / "tok")
    template = tmp_path / "plain.jinja"
    template.write_text(PLAIN)
    options = ("--tokenizer", tmp_path / "tok", "--chat-template", template)
    found = json.loads(run(chats, *options, "--json"))
    # "Hello" and the token that ends it.
    assert found["unit"] == "tokens" and found["learnt"]["learnt"] == 2
    assert found["counts"]["conversations that cannot be used"] == len(DIALECTS) + 3
    assert "learnt: 2 of" in run(chats, *options)
    result = CliRunner().invoke(app, ["data", "chat", str(chats), "--chat-template", "qwen-3"])
    assert result.exit_code != 0


def test_page(chats, tmp_path):
    """A mask that is off by a token is seen at a glance in colour, and never in a table of shares; what a stranger
    wrote into a conversation must not become part of the page."""
    chatty_tokenizer(tmp_path / "tok")
    template = tmp_path / "plain.jinja"
    template.write_text(PLAIN)
    with chats.open("a") as file:
        talk = [
            {"role": "user", "content": "<script>x</script>" * 300},
            {"role": "assistant", "content": "So\n"},
        ]
        file.write(json.dumps({"messages": talk}) + "\n")
    page = tmp_path / "chats.html"
    options = ("--tokenizer", tmp_path / "tok", "--chat-template", template, "--page", page)
    found = json.loads(run(chats, *options, "--json"))
    whole = found["histograms"]["conversations"]
    assert "shown" not in found and sum(whole["counts"]) == found["counts"]["conversations"] == 3
    text = page.read_text()
    end = html.escape("<|im_end|>")
    assert f'<span class="learnt">Hello</span><span class="end">{end}</span>' in text
    assert f'<span class="learnt">So\n</span><span class="end">{end}</span>' in text
    assert (
        "<script" not in text
        and "&lt;script&gt;" in text
        and 'tokens left out</span><span class="read">' in text
    )
    assert text.count("<svg") == len(found["parts"]) + 1 and "unknown role" in text
    run(chats, "--page", page)
    assert "give --tokenizer and --chat-template" in page.read_text()
    result = CliRunner().invoke(app, ["data", "chat", str(chats), "--page", str(tmp_path / "chats.txt")])
    assert isinstance(result.exception, ArgumentError) and "one HTML file" in str(result.exception)
