"""Chat templates that cannot be used, and text that is none: one line each."""

from pathlib import Path
from typing import Any

import pytest

from tappa.errors import TextError
from tappa.texts import encode_texts, in_chat_template, require_unicode
from tiny import change_json, save_tiny, tiny_tokenizer

TEMPLATES = {
    "{% for m in messages %}{{ m.content }": "unexpected",
    "{{ messages[0].content.no.such }}": "no",
    "{{ raise_exception('only systems may speak') }}": "only systems may speak",
    "{{ no_such_function() }}": "no_such_function",
}


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_template_that_cannot_be_used(template: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(
        TextError, match="cannot use the chat template of this tokenizer: "
    ) as caught:
        in_chat_template(tokenizer, "Hello")
    assert TEMPLATES[template] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_several_templates_without_a_default() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"rag": "{{ messages }}", "tools": "{{ messages }}"}
    with pytest.raises(TextError, match="cannot use the chat template"):
        in_chat_template(tokenizer, "Hello")
    with pytest.raises(TextError, match="this one has none"):
        in_chat_template(tiny_tokenizer(), "Hello")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("caf\udce9", "expected UTF-8 text, got byte 0xe9 at offset 3 of it"),
        ("ab\ud83d", r"expected text, got a lone surrogate U\+D83D at offset 2 of it"),
        ("\ude00", r"a lone surrogate U\+DE00 at offset 0 of it"),
    ],
)
def test_half_of_a_surrogate_pair(text: str, expected: str) -> None:
    with pytest.raises(TextError, match=expected):
        require_unicode(text, "it")
    with pytest.raises(TextError, match="got"):
        encode_texts(tiny_tokenizer(), ["right " * 9, text])
    require_unicode("whole: \U0001f600 é", "it")


def test_generate_in_a_terminal(tmp_path: Path, run: Any) -> None:
    folder = save_tiny(tmp_path / "model")
    code, _, told = run("generate", folder, "--prompt", "caf\udce9", "--budget", 64)
    assert (code, told.count("\n")) == (2, 1)
    assert "got byte 0xe9 at offset 3 of the prompt" in told
    code, _, told = run("generate", folder, "--prompt", "Hello", "--chat", "--budget", 64)
    assert (code, told) == (
        2,
        "error: expected a tokenizer with a chat template, this one has none\n",
    )
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no') }}")
    code, _, told = run("generate", folder, "--prompt", "Hello", "--chat", "--budget", 64)
    assert (code, told) == (2, "error: cannot use the chat template of this tokenizer: no\n")


@pytest.mark.filterwarnings("default")
def test_generate_takes_methods_as_eval_does(
    tmp_path: Path, run: Any, as_users_run_it: None
) -> None:
    folder = save_tiny(tmp_path / "model")
    change_json(folder / "generation_config.json", num_beams=2)
    method = "cake(gamma=50)"
    command = ("generate", folder, "--prompt", "Hello " * 9, "--max-new-tokens", 3)
    code, shown, told = run(*command, "--method", method, "--budget", 33, "--json")
    assert code == 0, told
    assert told.count("\n") == 1
    assert told.startswith("warning: the model's generation config asks for num_beams, which is")
    assert f'"method": "{method}"' in shown
    code, _, told = run(*command, "--method", "cake(gama=50)")
    assert code == 2
    assert "it has no option 'gama'" in told
    code, _, told = run(*command, "--method", "cake(gamma=50", "--budget", 64)
    assert (code, told.count("\n")) == (2, 1)
    assert "expected a method as name(option=value,...)" in told
