"""The chat templates that a configuration may name, as transformers (jinja) reads them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from della_dist.wording import few

#: By the names that mergekit has for them: the formats of their models, written anew.
CHAT_TEMPLATES: Mapping[str, str] = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{% for message in messages %}"
        "{% if loop.first and bos_token %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim + '<|eot_id|>' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
        "{% elif message['role'] == 'assistant' %}"
        "{{ '### Response:\\n' + message['content'] + '\\n\\n' }}"
        "{% endif %}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
    "exaone": (
        "{% for message in messages %}"
        "{% if loop.first and message['role'] != 'system' %}"
        "{{ '[|system|][|endofturn|]\\n' }}{% endif %}"
        "{{ '[|' + message['role'] + '|]' + message['content'] }}"
        "{{ '\\n' if message['role'] == 'user' else '[|endofturn|]\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]' }}{% endif %}"
    ),
}

#: Tokens that a template marks turns by, which the tokenizer should have as such.
TURN_TOKENS: Mapping[str, tuple[str, ...]] = {
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "exaone": ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
}


def syntax_error(template: str) -> str | None:
    """Return what is wrong with the text of a template, as jinja reads it; None if nothing is."""
    import jinja2  # takes a while, and few configurations have a template
    from jinja2.ext import Extension

    class Generation(Extension):
        """The tag of transformers' own, which marks what the assistant says."""

        tags = {"generation"}  # noqa: RUF012  (as jinja has it)

        def parse(self, parser: Any) -> Any:  # noqa: ANN401
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    environment = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", Generation])
    try:
        tree = environment.parse(template)
        if missing := _missing(environment, tree):
            return few(missing, separator="; ")
        environment.compile(tree)
    except jinja2.TemplateSyntaxError as error:
        return f"{error.message} (line {error.lineno})"
    except SyntaxError as error:
        return f"{error.msg}"
    return None


#: Filters that take the name of another one, or of a test -> which of their arguments it is.
_TAKES_FILTER = {"map": 0}
_TAKES_TEST = {"select": 0, "reject": 0, "selectattr": 1, "rejectattr": 1}


def _missing(environment: Any, tree: Any) -> list[str]:  # noqa: ANN401
    """Return which filters, tests and templates there are not, each with its line.

    Jinja finds out itself, but below an `if` only when it gets there. A template that asks which
    there are is taken at its word.
    """
    from jinja2 import nodes

    files = (nodes.Include, nodes.Import, nodes.FromImport, nodes.Extends)
    found = [(f.lineno, "there are no other templates to take in") for f in tree.find_all(files)]
    if not any(test.name in ("filter", "test") for test in tree.find_all(nodes.Test)):
        filters = [(used.name, used.lineno) for used in tree.find_all(nodes.Filter)]
        tests = [(used.name, used.lineno) for used in tree.find_all(nodes.Test)]
        for used in tree.find_all(nodes.Filter):
            for names, takes in ((filters, _TAKES_FILTER), (tests, _TAKES_TEST)):
                named = used.args[takes[used.name] :][:1] if used.name in takes else []
                names += [(n.value, n.lineno) for n in named if isinstance(n, nodes.Const)]
        for kind, names, known in (
            ("filter", filters, environment.filters),
            ("test", tests, environment.tests),
        ):
            found += [(line, f"there is no {kind} {n!r}") for n, line in names if n not in known]
    return [f"{what} (line {line})" for line, what in sorted(set(found))]


def turn_tokens(template: str) -> tuple[str, ...]:
    """Return the tokens that `template` marks turns by, if it is one of those with a name."""
    names = (name for name, text in CHAT_TEMPLATES.items() if text == template)
    return TURN_TOKENS.get(next(names, ""), ())
