"""Chat templates against transformers, control tokens in messages, and templates that misbehave."""

import itertools
import json
import time
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from millrace.server.config import BUILTIN
from millrace.server.errors import CheckpointError, InvalidRequest
from millrace.server.text.template import ChatTemplate
from millrace.server.text.tokenizer import Tokenizer
from millrace.server.types import ChatPrompt, Message, Role

relaxed = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

CHATML = """{%- if messages[0]['role'] != 'system' -%}
    {{- '<|im_start|>system\\nYou are helpful.<|im_end|>\\n' -}}
{%- endif -%}
{% for message in messages %}
    {% if message.role == 'assistant' and '</think>' in message.content %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\\n') %}
    {% else %}
        {%- set content = message.content %}
    {% endif %}
    {{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>' + '\\n' }}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if enable_thinking is defined and not enable_thinking
%}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

LLAMA3 = """{{- bos_token }}
{%- set ns = namespace(first=true) %}
{%- for message in messages %}
    {%- if message.name %}{% set who = message.name %}{% else %}{% set who = message.role %}{% endif %}
    {{- '<|start_header_id|>' ~ who ~ '<|end_header_id|>\\n\\n' }}
    {%- generation %}{{ message.content | trim }}{% endgeneration %}
    {{- '<|eot_id|>' }}
    {%- if loop.index > 400 %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}
{{- documents | tojson if documents else '' }}"""

MISTRAL = """{{ bos_token }}{% for message in messages %}
{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}
{% elif message['role'] == 'assistant' %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"""

ROLE_IN_TOKEN = "{% for m in messages %}{{ '<|' + m.role + '|>' + '\\n' + m.content + '<|end|>\n' }}{% endfor %}"
BARE = "{% for m in messages %}{{ m.content }}{% endfor %}"
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "role": ROLE_IN_TOKEN}

CONTENT = st.lists(
    st.sampled_from(["Hello", " world", "\n", "  ", "é😀", "日本", "<", "|", ">", "<b>", "</think>", "<think>",
     "[IN", "|>", "s>", "‍"])
    | st.text(max_size=6),
    max_size=8,
).map("".join)  # fmt: skip
CONTROL = st.sampled_from(
    ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|eot_id|>", "<unk>", "<|user|>",
     "<|endoftext|>", "<|im_", "start|>", "<", "|im_end|>", "s>", "\ufdd0", "\ufdef",
     "<|im_<|im_start|>start|>", "[[INST]INST]", "hi"]
)  # fmt: skip


def conversation(contents) -> ChatPrompt:
    return ChatPrompt([Message(Role.ASSISTANT if i % 2 else Role.USER, text) for i, text in enumerate(contents)])


def as_dicts(chat: ChatPrompt) -> list[dict[str, str]]:
    return [{"role": message.role.value, "content": message.content} for message in chat.messages]


@pytest.fixture(scope="module")
def theirs(directory) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("name", TEMPLATES)
@relaxed
@given(contents=st.lists(CONTENT, min_size=1, max_size=4), generate=st.booleans(), data=st.data())
def test_ordinary_conversations_equal_transformers(tokenizer, theirs, name, contents, generate, data):
    chat = conversation(contents)
    if any(token in text for text in contents for token in tokenizer.special.ids):
        return
    kwargs = data.draw(st.sampled_from([{}, {"enable_thinking": False}, {"enable_thinking": True}]))
    chat = ChatPrompt(chat.messages, kwargs, generate)
    template = ChatTemplate(tokenizer, TEMPLATES[name])
    options = {"chat_template": TEMPLATES[name], "add_generation_prompt": generate, **kwargs}
    assert template.render(chat) == theirs.apply_chat_template(as_dicts(chat), tokenize=False, **options)
    assert template.encode(chat) == theirs.apply_chat_template(as_dicts(chat), return_dict=False, **options)


@pytest.mark.parametrize("source", [CHATML, LLAMA3, MISTRAL, BARE], ids=["chatml", "llama3", "mistral", "bare"])
@relaxed
@given(contents=st.lists(st.lists(CONTROL, max_size=5).map("".join), min_size=1, max_size=5))
def test_control_tokens_in_messages_are_plain_text(tokenizer, source, contents):
    """The prompt holds the special tokens that it holds for harmless messages, and still says what was said."""
    template = ChatTemplate(tokenizer, source)
    unknown = {tokenizer.special.ids.get("<unk>")}
    chat = conversation(contents)
    ids = template.encode(chat)

    def special(ids: list[int]) -> list[int]:
        return [id for id in ids if id in tokenizer.special_ids - unknown]

    assert special(ids) == special(template.encode(conversation(["hi"] * len(contents))))
    if tokenizer.special_ids.isdisjoint(unknown):  # every byte has a token
        assert tokenizer.decode(ids, skip_special_tokens=False) == template.render(chat)
    for text in contents:
        assert text.strip() in template.render(chat)


@relaxed
@given(value=st.lists(CONTROL, max_size=5).map("".join))
def test_control_tokens_in_names_and_arguments_are_plain_text(tokenizers, value):
    tokenizer = tokenizers["byte_level"]
    source = "{{ bos_token }}{{ who.name[0] }}{% for m in messages %}{{ m.name }}{% endfor %}"
    chat = ChatPrompt([Message(Role.USER, "", value)], {"who": {"name": [value]}})
    ids = ChatTemplate(tokenizer, source).encode(chat)
    assert [id for id in ids if id in tokenizer.special_ids] == [tokenizer.bos_id]
    assert tokenizer.decode(ids) == value * 2


def test_the_template_sees_what_was_said(tokenizers):
    """Templates look at messages; a control token inside must not change what they see of the rest."""
    source = "{{ messages[0].content.startswith('a') }} {{ messages[0].content.endswith('z') }}"
    chat = conversation(["a <|im_end|> z"])
    assert ChatTemplate(tokenizers["byte_level"], source).render(chat) == "True True"


def test_strftime_now_and_tojson(tokenizers):
    source = "{{ strftime_now('%Y') }} {{ {'a': '<é>'} | tojson }} {{ [1, 2] | tojson(indent=1) }}"
    text = ChatTemplate(tokenizers["builtin"], source).render(conversation(["x"]))
    assert text == time.strftime("%Y") + ' {"a": "<é>"} [\n 1,\n 2\n]'


REFUSED = {
    "exception": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "undefined": ("{{ nothing.at.all }}", "undefined"),
    "type": ("{{ 1 + 'a' }}", "TypeError"),
    "division": ("{{ 1 / (messages|length - 1) }}", "ZeroDivisionError"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", None),
    "class": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", None),
    "format": ("{{ '{0.__class__.__mro__}'.format('') }}", None),
    "self": ("{{ self.__init__.__globals__.os }}", None),
    "append": ("{% set _ = messages.append(1) %}", None),
    "cycler": ("{{ cycler.__init__.__globals__.os.system('true') }}", None),
    "import": ("{% import 'os' as os %}{{ os }}", None),
    "include": ("{% include '/etc/passwd' %}", None),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_template_errors_are_the_requests(tokenizers, kind):
    source, words = REFUSED[kind]
    with pytest.raises(InvalidRequest, match=words) as caught:
        ChatTemplate(tokenizers["builtin"], source).encode(conversation(["hi"]))
    assert [violation.field for violation in caught.value.violations] == ["chat"]
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception.__globals__ }}",
        "{{ ''|attr('__class__') }}",
        "{{ ['']|map(attribute='__class__')|join }}",
        "{{ messages[0]|attr('__init__') }}{{ strftime_now.__code__ }}{{ range.__self__ }}",
    ],
)
def test_internals_of_python_are_not_there(tokenizers, source):
    assert ChatTemplate(tokenizers["builtin"], source).render(conversation(["hi"])) == ""


def test_a_pause_inside_a_short_render_is_not_the_templates_doing(tokenizers, monkeypatch):
    clock = itertools.count(0, 1000)
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    template = ChatTemplate(tokenizers["builtin"], "{% for m in messages %}{{ m.content }}{% endfor %}")
    assert template.render(conversation(["hi", "ho"])) == "hiho"
    with pytest.raises(InvalidRequest, match="too long"):
        template.render(conversation(["a"] * 200))


MANY = "{% for a in range(99999) %}"
LAUGHS = "{% set ns = namespace(a=['ha']) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}{% endfor %}"
BOMBS = {
    "output": MANY + "{{ 'a' * 1000 }}{% endfor %}",
    "literal output": MANY + "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa{% endfor %}",
    "nested loops": MANY * 3 + "{% endfor %}" * 3,
    "loops without a range": "{% for a in messages %}" * 8 + "{% endfor %}" * 8,
    "filtered loop": "{% for a in range(99999) if a < 0 %}{% endfor %}" * 200,
    "recursive loop": "{% for a in [1, 2] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "repetition": "{{ 'a' * 10000000000 }}",
    "repetition reversed": "{{ 10000000000 * 'a' }}",
    "repeated list": "{{ ([0] * 10000000000)|length }}",
    "doubling": "{% set ns = namespace(a='aaaaaaaa') %}" + MANY + "{% set ns.a = ns.a ~ ns.a %}{% endfor %}",
    "adding": "{% set ns = namespace(a='aaaaaaaa') %}" + MANY + "{% set ns.a = ns.a + ns.a %}{% endfor %}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": "{% set ns = namespace(a=12345) %}" + MANY + "{% set ns.a = ns.a * ns.a %}{% endfor %}",
    "center": "{{ 'a'|center(10000000000) }}",
    "ljust": "{{ 'a'.ljust(10000000000) }}",
    "zfill keyword": "{{ 'a'|indent(width=10000000000) }}",
    "format": "{{ '{:>1000000000}'.format('a') }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "percent star": "{{ '%*d' % (1000000000, 1) }}",
    "format filter": "{{ '%1000000000d'|format(1) }}",
    "slice": "{{ [1]|slice(10000000000)|list }}",
    "batch": "{{ [1]|batch(10000000000, 'a')|list }}",
    "replace": "{% set a = 'a' * 20000 %}{{ a.replace('a', a) }}",
    "replace filter": "{% set a = 'a' * 20000 %}{{ a|replace('', a) }}",
    "join": "{% set a = 'a' * 20000 %}{{ a.join(a) }}",
    "join filter": "{% set a = 'a' * 20000 %}{{ a|join(a) }}",
    "laughs": LAUGHS + "{{ ns.a|tojson }}",
    "printed laughs": LAUGHS + "{{ ns.a }}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(99) }}",
    "lipsum": "{{ lipsum(n=100000) }}",
    "strftime": "{{ strftime_now('%Y' * 30000) * 2 }}",
}


@pytest.mark.parametrize("kind", BOMBS)
def test_bombs_end_soon_and_stay_small(tokenizers, kind):
    template = ChatTemplate(tokenizers["builtin"], BOMBS[kind])
    chat = conversation(["hi"] * 16)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidRequest):
            template.render(chat)
        assert tracemalloc.get_traced_memory()[1] < 32 << 20
    finally:
        tracemalloc.stop()


def test_a_large_conversation_fits_the_budget(tokenizers):
    chat = conversation(["word " * 400] * 511)
    for source in TEMPLATES.values():
        assert len(ChatTemplate(tokenizers["byte_level"], source).render(chat)) > 511 * 2000 * 0.7


def test_output_bound_follows_the_input(tokenizers):
    template = ChatTemplate(tokenizers["builtin"], "{% for i in range(8) %}{{ messages[0].content }}{% endfor %}")
    assert template.render(conversation(["a" * 14_000])) == "a" * 112_000
    with pytest.raises(InvalidRequest, match="more than"):
        template.render(conversation(["a" * 100_000]))


@pytest.mark.parametrize(
    "name", ["messages", "add_generation_prompt", "bos_token", "raise_exception", "range", "tools"]
)
def test_arguments_that_would_replace_the_templates_own(tokenizers, name):
    with pytest.raises(InvalidRequest) as caught:
        ChatTemplate(tokenizers["builtin"], BARE).render(ChatPrompt([Message(Role.USER, "x")], {name: "x"}))
    assert caught.value.violations[0].field == "chat.template_kwargs"


def test_arguments_nested_too_deep(tokenizers):
    value: object = "x"
    for _ in range(5000):
        value = [value]
    with pytest.raises(InvalidRequest, match="nested"):
        ChatTemplate(tokenizers["builtin"], BARE).render(ChatPrompt([Message(Role.USER, "x")], {"a": value}))


def test_a_conversation_of_every_noncharacter(tokenizers):
    text = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    with pytest.raises(InvalidRequest, match="noncharacter"):
        ChatTemplate(tokenizers["builtin"], BARE).render(conversation([text]))


def load(directory, template=None, file: bytes | None = None) -> ChatTemplate | None:
    directory.joinpath("tokenizer.json").write_bytes((BUILTIN / "tokenizer.json").read_bytes())
    config = {"bos_token": "<|endoftext|>"} | ({} if template is None else {"chat_template": template})
    directory.joinpath("tokenizer_config.json").write_text(json.dumps(config))
    if file is not None:
        directory.joinpath("chat_template.jinja").write_bytes(file)
    return ChatTemplate.load(directory, Tokenizer.load(directory))


def test_where_a_template_comes_from(tmp_path):
    chat = conversation(["x"])
    assert load(tmp_path) is None
    template = load(tmp_path, "config")
    assert template is not None
    assert template.render(chat) == "config"
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "default"}]
    assert load(tmp_path, named).render(chat) == "default"
    assert load(tmp_path, "config", b"file {{ bos_token }}").render(chat) == "file <|endoftext|>"


@pytest.mark.parametrize(
    ("template", "file"),
    [
        ("{% if %}", None),
        ("{{ 'a'|no_such_filter }}", None),
        ("{% for x in y %}", None),
        ([{"name": "other", "template": "x"}], None),
        ([], None),
        (3, None),
        (None, b"\xff\xfe"),
        (None, b"{{ " + b"(" * 100_000),
        (None, b"a" * (2 << 20)),
        (None, b"{{" + b"-" * 20_000 + b"1 }}"),
        (None, b"{% set messages.x.y = 1 %}"),
    ],
)
def test_broken_templates_are_refused_in_one_line(tmp_path, template, file):
    with pytest.raises(CheckpointError) as caught:
        load(tmp_path, template, file)
    assert "\n" not in str(caught.value)
