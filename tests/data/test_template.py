"""Chat templates that do what they should, and those that do anything else."""

import signal
import threading
import time
from functools import cache

import pytest
from goldens import NAMES, of_transformers

from mllm_align.data import template
from mllm_align.data.template import ChatTemplate

CHAT = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "gi?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "ku."}]},
]
BY_PARTS = "{% for m in messages %}{{ m.role }}{% for p in m.content %}{{ p }}{% endfor %}{% endfor %}"
LOOPS = {
    "nested": "{% for a in range(9999) %}{% for b in range(9999) %}{% for c in range(9999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "long": "{% set s = 'x' * 1000000 %}{% for a in range(99999) %}{% if s in s ~ a %}{% endif %}"
    "{% endfor %}",
    "macro": "{% macro f(n) %}{% for a in range(9) %}{% if n %}{{ f(n - 1) }}{% endif %}{% endfor %}"
    "{% endmacro %}{{ f(99) }}",
}


@cache
def processor(name="llava15"):
    return of_transformers(name)


def rendered(source, chat=CHAT, ask=False):
    return ChatTemplate(source, processor().tokenizer.special_tokens_map)(chat, ask)


@pytest.mark.parametrize("ask", [True, False])
@pytest.mark.parametrize("source", [BY_PARTS, "{{ bos_token }}{{ eos_token }}{{ messages }}", *NAMES])
def test_as_the_processor_renders_it(source, ask):
    own = processor(source if source in NAMES else "llava15")
    source = own.chat_template if source in NAMES else source
    theirs = own.apply_chat_template(CHAT, chat_template=source, add_generation_prompt=ask, tokenize=False)
    assert ChatTemplate(source, own.tokenizer.special_tokens_map)(CHAT, ask) == theirs != ""


@pytest.mark.parametrize("name", LOOPS)
def test_a_template_that_loops_for_ever_ends(name, monkeypatch):
    monkeypatch.setattr(template, "SECONDS", 0.2)
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"takes longer than 0\.2 seconds"):
        rendered(LOOPS[name])
    assert time.monotonic() - began < 2


def test_ten_seconds_are_the_limit():
    assert template.SECONDS == 10


def test_the_timer_of_others_goes_on():
    rang = threading.Event()
    before = signal.signal(signal.SIGALRM, lambda *_: rang.set())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert rendered("{{ messages[0].role }}") == "user"
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 0.2
        assert rang.wait(5)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    rendered("{{ messages[0].role }}")
    assert signal.getsignal(signal.SIGALRM) == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_other_threads_render_too():
    said = []
    thread = threading.Thread(target=lambda: said.append(rendered("{{ messages[1].role }}")))
    thread.start()
    thread.join()
    assert said == ["assistant"]


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{% for m in messages %}", "end of template"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{% no_such_tag %}", "no_such_tag"),
        ("{% include 'other.jinja' %}", "loader"),
        ("{{ messages[0].none.of.these }}", "no attribute"),
        ("{{ raise_exception('first\nsecond') }}", "first"),
        ("{{ raise_exception('') }}", "TemplateError"),
        ("{{ 1 / 0 }}", "division"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ 'x' * 5000000 }}", "writes 5000000 characters, the limit is 4194304"),
        ("{% for i in range(100) %}{{ 'x' * 100000 }}{% endfor %}", "writes 10000000 characters"),
        ("{{ 'x' * 10 ** 10 }}", "raises to a power"),
        ("{% set n = 9 %}{{ n**n**n**n }}", "raises to a power"),
        ("{{ dict(a=1)**2 }}", "raises to a power"),
    ],
)
def test_what_a_template_may_do_wrong(source, words):
    with pytest.raises(ValueError, match=words):
        rendered(source)


def test_two_stars_that_are_no_power():
    source = "** {# ** #}{{ '**' }}{{ dict(**{'a': 1}).a }}{{ dict({}, ** {'b': 2}).b }}"
    assert rendered(source + "{% raw %}{{ 2**3 }}{% endraw %}") == "** **12{{ 2**3 }}"
