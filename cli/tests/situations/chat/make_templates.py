"""Chat templates and what transformers writes with them: `templates.json` beside this file; and `../chat.json`, a few of them
run by the command, with the number of tokens that the bundled tokenizer makes of the text.

    pip install transformers==5.24 jinja2==3.1.6 tokenizers==0.23.2     # 5.23 gives the same
    LC_ALL=C python cli/tests/situations/chat/make_templates.py

Every template goes through transformers' own `render_jinja_template`, at one fixed time. The templates are ours; those under
"published" use the constructs of models' published ones. A case has what jinja2 wrote, or `error`: the first line of what it said.
"""

import datetime
import json
import os

from pathlib import Path

from tokenizers import Tokenizer
from transformers.utils import chat_template_utils

NOW = datetime.datetime(2026, 3, 5, 7, 8, 9, 12345)


class Clock(datetime.datetime):
    @classmethod
    def now(cls, tz=None):
        return NOW


chat_template_utils.datetime = Clock

SYSTEM = {"role": "system", "content": "  Be short & <plain>.\n"}
USER = {"role": "user", "content": "it's <b> \"q\" \u00e9\u2603\U0001f600 \\ end"}
TALK = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\ntwo"},
    {"role": "user", "content": "three"},
]
# What was thought apart from what was said, and a call of a tool.
APART = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two", "reasoning_content": "\nhm\n"},
    {"role": "user", "content": [{"type": "text", "text": "thr"}, {"type": "text", "text": "ee"}]},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "well",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "weather", "arguments": {"town": "\u00c5", "days": 3, "of": {"x": [1.5, None]}}}}],
    },
    {"role": "tool", "content": "rain"},
    {"role": "tool", "content": "wind"},
    {"role": "user", "content": "four"},
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "What's up & <there>",
            "parameters": {"type": "object", "properties": {"town": {"type": "string", "enum": ["\u00c5", "b"]}}, "required": ["town"]},
        },
    }
]

# Further variables of a case by its name's last part.
DATA = "{%- set d = {'b': 1, 'a': [1.0, 2.5, true, none, 'x<y>&\\'z\\''], 'é': {}} -%}"

ONE = {
    # tojson
    "tojson of text": "{{ messages[1].content|tojson }}",
    "tojson of a message": "{{ messages[1]|tojson }}",
    "tojson of a list": "{{ messages|tojson }}",
    "tojson indent": DATA + "{{ d|tojson(indent=2) }}",
    "tojson indent positional": DATA + "{{ d|tojson(false, 4) }}",
    "tojson indent 0": DATA + "{{ d|tojson(indent=0) }}",
    "tojson indent text": DATA + "{{ d|tojson(indent='--') }}",
    "tojson indent none": DATA + "{{ d|tojson(indent=none) }}",
    "tojson ensure_ascii": DATA + "{{ d|tojson(ensure_ascii=true) }}{{ messages[1].content|tojson(ensure_ascii=True) }}",
    "tojson ensure_ascii false": "{{ messages[1].content|tojson(ensure_ascii=False) }}",
    "tojson separators": DATA + "{{ d|tojson(separators=(',', ':')) }}",
    "tojson separators list": DATA + "{{ d|tojson(separators=[' ; ', ' = '], indent=1) }}",
    "tojson sort_keys": DATA + "{{ d|tojson(sort_keys=true) }}",
    "tojson all": DATA + "{{ d|tojson(ensure_ascii=true, indent=3, separators=(',', ': '), sort_keys=true) }}",
    "tojson empty": "{{ {}|tojson }}{{ []|tojson }}{{ {}|tojson(indent=2) }}{{ [[], {}]|tojson(indent=2) }}{{ ''|tojson }}",
    "tojson scalars": "{{ 1|tojson }} {{ 1.0|tojson }} {{ 1e30|tojson }} {{ 1e-7|tojson }} {{ 0.1|tojson }} {{ true|tojson }} {{ none|tojson }} {{ -3|tojson }} {{ 12345678901234567890123|tojson }}",
    "tojson integer keys": "{{ {1: 'a', true: 'b', none: 'c', 2.5: 'd'}|tojson }}",
    "tojson control characters": "{{ 'a\\tb\\n\\r\\x00\\x1f\\x7f/\\u2028\\b\\f'|tojson }}",
    "tojson tuple": "{{ (1, 'a')|tojson }}",
    "tojson undefined": "{{ nothing|tojson }}",
    "tojson bad keyword": "{{ 1|tojson(nonsense=1) }}",
    "tojson in a condition": "{% if messages[0]|tojson is string %}yes{% endif %}",
    "tojson concatenated": "{{ '<tool>' ~ (messages[0]|tojson) ~ '</tool>' }}",
    "tojson plus": "{{ '[' + messages[0].role|tojson + ']' }}",
    "tojson range": "{{ range(3)|list|tojson }}",
    "tojson dict call": "{{ dict(a=1, b='x')|tojson }}",
    "tojson namespace value": "{% set ns = namespace(x=[1]) %}{{ ns.x|tojson }}",
    "tojson nested sort": "{{ {'b': {'d': 1, 'c': 2}, 'a': [{'z': 1, 'y': 2}]}|tojson(sort_keys=true, indent=2) }}",
    # generation
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}|{% endfor %}",
    "generation on lines of its own": "{% for m in messages %}\n  {% generation %}\n  {{ m.role }}\n  {% endgeneration %}\n{% endfor %}\nend",
    "generation with white space control": "a \n {%- generation -%} \n b \n {%- endgeneration -%} \n c",
    "generation one side": "a \n {%- generation %} \n b {% endgeneration -%} \n c",
    "generation plus signs": "a\n  {%+ generation +%}\nb\n  {%+ endgeneration +%}\nc",
    "generation in raw": "{% raw %}{% generation %}x{% endgeneration %}{% endraw %}",
    "generation in a comment": "{# {% generation %} #}x{#- {% endgeneration %} -#} y",
    "generation in a string": "{{ '{% generation %}' }}{% set x = '{% endgeneration %}' %}{{ x }}",
    "generation as a name": "{% set generation = 3 %}{{ generation }}{{ {'generation': 1}.generation }}",
    "generation without spaces": "{%generation%}a{%endgeneration%}",
    "generation with line breaks": "{%\n generation\n %}a{%\tendgeneration\n%}\nb",
    "generation scope": "{% set x = 1 %}{% generation %}{% set x = 2 %}{{ x }}{% endgeneration %}{{ x }}",
    "generation namespace": "{% set ns = namespace(x=1) %}{% generation %}{% set ns.x = 2 %}{% endgeneration %}{{ ns.x }}",
    "generation around a loop": "{% generation %}{% for i in range(2) %}{{ i }}{% endfor %}{% endgeneration %}",
    "generation not closed": "{% generation %}a",
    "generation closed twice": "{% generation %}a{% endgeneration %}{% endgeneration %}",
    "generation closed by endif": "{% generation %}a{% endif %}",
    "if closed by endgeneration": "{% if true %}a{% endgeneration %}",
    "generation in generation": "{% generation %}a{% generation %}b{% endgeneration %}{% endgeneration %}",
    "loop in generation in loop": "{% for i in [1,2] %}{% generation %}{{ loop.index }}{{ i }}{% endgeneration %}{% endfor %}",
    # strftime
    "strftime date": "{{ strftime_now('%Y-%m-%d') }} {{ strftime_now('%d %b %Y') }} {{ strftime_now('%B %d, %Y') }}",
    "strftime names": "{{ strftime_now('%a|%A|%w|%d|%b|%B|%m|%y|%Y') }}",
    "strftime time": "{{ strftime_now('%H|%I|%p|%M|%S|%f|%j|%U|%W') }}",
    "strftime zone": "{{ strftime_now('[%z|%Z]') }}",
    "strftime whole": "{{ strftime_now('%c|%x|%X|%%') }}",
    "strftime iso": "{{ strftime_now('%G-%V-%u') }}",
    "strftime c": "{{ strftime_now('%e|%D|%F|%T|%R|%h|%n|%t|%C|%g|%k|%l|%P|%r') }}",
    "strftime flags": "{{ strftime_now('%-d|%_d|%0e|%-m|%-H|%-I|%^a|%^B|%-j|%_m|%#p') }}",
    "strftime unknown": "{{ strftime_now('%q|%') }}",
    "strftime plain": "{{ strftime_now('it is é') }}",
    "strftime defined": "{% if strftime_now is defined %}{% set today = strftime_now('%Y') %}{{ today }}{% endif %}",
    # newlines and white space
    "crlf": "{% if true %}\r\na\r\n  {% endif %}\r\nb\r\n",
    "crlf in data": "a\r\nb\r\n\r\nc",
    "cr alone": "a\rb\r",
    "crlf in a string": "{{ 'a\r\nb' }}",
    "crlf with control": "a\r\n{%- if true -%}\r\nb\r\n{%- endif %}\r\nc",
    "one newline at the end goes": "a\n",
    "two newlines at the end": "a\n\n",
    "trim blocks": "{% if true %}\n\n x\n{% endif %}\n\n",
    "trim after variable": "{{ 1 }}\n{{ 2 }}\n",
    "lstrip blocks": "  {% if true %}a{% endif %}\n\t {# c #}\nb {% if true %} c{% endif %}",
    "lstrip keeps with plus": "  {%+ if true %}a{% endif %}",
    "trim keeps with plus": "{% if true +%}\na{% endif +%}\nb",
    "minus both": "a  \n {{- ' b ' -}} \n c {#- x -#}\n d",
    "comment on a line": "a\n  {# c #}\nb\n{#- c #}\nc{# c -#}\n\nd",
    "raw": "{% raw %}{{ x }}{% if %}{% endraw %}{%- raw -%} {# y #} {%- endraw -%} z",
    "lstrip after a variable": "{{ 1 }}  {% if true %}x{% endif %}",
    "lstrip after a block": "{% if true %}  {% if true %}x{% endif %}  {% endif %}",
    "wide spaces": "a\u00a0{%- if true -%}\u00a0b{%- endif %}",
    "vertical tab": "a\v{%- if true %}\fb{%- endif %}",
    "form feed before a block": "x\n\f{% if true %}a{% endif %}",
    "line separator": "a\u2028  {% if true %}b{% endif %}",
    "percent": "{{ 7 % 4 }} 100% {%- if 1 %} %}{% endif %}",
    "braces": "{ {{ '{' }} }} { % } {{ '}}' }}{{ '%}' }}",
    # printing
    "print scalars": "{{ true }} {{ false }} {{ none }} {{ 1 }} {{ 1.0 }} {{ 2.50 }} {{ 1e20 }} {{ 1e-5 }} {{ 1e15 }} {{ 1e16 }} {{ 0.1 + 0.2 }} {{ -0.0 }}",
    "print containers": "{{ [1, 'a', true, none, 1.5, [], {}] }} {{ {'a': 'b', 'c': [1]} }} {{ (1,) }} {{ () }} {{ (1, 'b') }}",
    "print quotes": "{{ [\"it's\", 'a\"b', 'a\\'b\"c', 'a\\nb\\t\\\\', 'é☃', '\\x00\\x7f'] }}",
    "print message": "{{ messages[1] }}",
    "print undefined": "[{{ nothing }}][{{ messages[0].nothing }}][{{ messages[9] }}][{{ messages[0]['x'] }}]",
    "python words": "{{ True }} {{ False }} {{ None }} {{ True and not False }}",
    "arithmetic": "{{ 7 // 2 }} {{ -7 // 2 }} {{ 7 / 2 }} {{ 8 / 2 }} {{ 2 ** 3 }} {{ 2 ** -1 }} {{ 7 % 3 }} {{ -7 % 3 }} {{ 7.5 // 2 }} {{ 3 * 1.0 }} {{ 10 - 3.0 }}",
    "booleans add": "{{ true + 1 }} {{ true == 1 }} {{ 1 == 1.0 }} {{ '1' == 1 }}",
    "text times": "{{ 'ab' * 3 }} {{ 3 * 'x' }} {{ '-' * 0 }} {{ [1] * 2 }}",
    "lists add": "{{ [1] + [2, 3] }} {{ (1,) + (2,) }}",
    "tilde": "{{ 1 ~ 'a' ~ none ~ true ~ 1.0 ~ nothing ~ [1, 'x'] }}",
    "comparisons": "{{ 1 < 2 < 3 }} {{ 1 < 3 < 2 }} {{ 'a' < 'b' }} {{ [1, 2] < [1, 3] }} {{ 1 != 2 }}",
    "not in": "{{ 'a' not in 'bcd' }} {{ 'b' in 'abc' }} {{ 1 in [1, 2] }} {{ 'role' in messages[0] }} {{ 'x' not in messages[0] }} {{ not 'a' in 'a' }}",
    "ternary": "{{ 'a' if true else 'b' }}{{ 'a' if false }}{{ ('x' if 0 else 'y') ~ 'z' }}",
    "and or give values": "{{ '' or 'x' }} {{ 'a' and 'b' }} {{ none or [] }} {{ 0 and 1 }} {{ not 0 }}",
    "truth": "{% for x in ['', 'a', 0, 0.0, [], [0], {}, none, ' '] %}{{ 1 if x else 0 }}{% endfor %}",
    "adjacent strings": "{{ 'a' 'b' \"c\" }}",
    "escapes": "{{ 'a\\nb\\t\\'\\\"\\\\\\x41\\u00e9\\101\\q\\/' }}",
    "plus text and number": "{{ 'a' + 1 }}",
    "plus undefined": "{{ 'a' + nothing }}",
    "undefined attribute": "{{ nothing.x }}",
    "undefined attribute of none": "[{{ none.x }}][{{ 'a'.x }}][{{ (1).x }}]",
    "iterate undefined": "{% for x in nothing %}a{% else %}b{% endfor %}",
    "in undefined": "{{ 'a' in nothing }}",
    "undefined equals": "{{ nothing == none }} {{ nothing == other }} {{ nothing is none }} {{ nothing == '' }}",
    "undefined filters": "[{{ nothing|trim }}][{{ nothing|length }}][{{ nothing|upper }}][{{ nothing|default('d') }}][{{ nothing|list }}][{{ nothing|join(',') }}][{{ nothing|string }}][{{ nothing|first }}]",
    "none filters": "[{{ none|default('d') }}][{{ none|default('d', true) }}][{{ none|trim }}][{{ none|upper }}][{{ none|string }}]",
    # subscripts
    "slices": "{{ 'abcdef'[1:3] }} {{ 'abcdef'[:-1] }} {{ 'abcdef'[::-1] }} {{ 'abcdef'[-2:] }} {{ 'abcdef'[::2] }} {{ 'abcdef'[4:1:-1] }} {{ [1, 2, 3][1:] }} {{ [1, 2, 3][::-1] }} {{ 'abc'[5:] }} {{ [1,2,3][-2:-1] }} {{ (1, 2, 3)[1:] }}",
    "slices of wide text": "{{ 'é☃😀x'[1:3] }} {{ 'é☃😀x'[-2] }} {{ 'é☃😀x'|length }} {{ 'é☃😀x'[0] }}",
    "index": "{{ messages[-1].role }} {{ messages[0]['role'] }} {{ 'abc'[0] }} {{ 'abc'[-1] }} {{ [1, 2].0 }} {{ messages.0.role }}",
    "item over method": "{{ {'items': 1}['items'] }} {{ {'keys': 2}['keys'] }}",
    # loops
    "loop variables": "{% for m in messages %}{{ loop.index }}{{ loop.index0 }}{{ loop.revindex }}{{ loop.revindex0 }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.depth }}{{ loop.depth0 }};{% endfor %}",
    "loop previtem": "{% for x in [1, 2, 3] %}{{ loop.previtem }}<{{ x }}<{{ loop.nextitem }};{% endfor %}",
    "loop previtem defined": "{% for m in messages %}{% if loop.previtem is defined and loop.previtem.role == 'system' %}after{% endif %}{% if loop.nextitem is not defined %}end{% endif %}{% endfor %}",
    "loop cycle": "{% for x in [1, 2, 3] %}{{ loop.cycle('a', 'b') }}{% endfor %}",
    "loop changed": "{% for x in [1, 1, 2] %}{{ loop.changed(x) }}{% endfor %}",
    "loop filter": "{% for m in messages if m.role != 'system' %}{{ loop.index }}{{ m.role }}{% endfor %}",
    "loop else": "{% for m in [] %}a{% else %}none{% endfor %}",
    "loop unpack": "{% for k, v in {'a': 1, 'b': 2}.items() %}{{ k }}={{ v }};{% endfor %}{% for k, v in {'z': 1, 'y': 2}|items %}{{ k }}={{ v }};{% endfor %}",
    "loop over keys": "{% for k in {'z': 1, 'a': 2} %}{{ k }}{% endfor %}{% for k in {'z': 1, 'a': 2}.keys() %}{{ k }}{% endfor %}{% for k in {'z': 1, 'a': 2}.values() %}{{ k }}{% endfor %}",
    "loop over text": "{% for c in 'aé😀' %}{{ c }},{% endfor %}",
    "loop break": "{% for x in range(9) %}{% if x == 3 %}{% break %}{% endif %}{% if x == 1 %}{% continue %}{% endif %}{{ x }}{% endfor %}",
    "loop recursive": "{% for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is not number else x }},{% endfor %}",
    "loop scope": "{% set x = 1 %}{% for i in [1] %}{% set x = 2 %}{% endfor %}{{ x }}",
    "if scope": "{% set x = 1 %}{% if true %}{% set x = 2 %}{% endif %}{{ x }}",
    "namespace": "{% set ns = namespace(n=0, found=false) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% if m.role == 'user' %}{% set ns.found = true %}{% endif %}{% endfor %}{{ ns.n }}{{ ns.found }}",
    "namespace of a dict": "{% set ns = namespace({'a': 1}, b=2) %}{{ ns.a }}{{ ns.b }}{{ ns.c }}",
    "namespace underscore": "{% set ns = namespace(_x=1) %}{{ ns._x }}",
    "nested loops": "{% for a in [1, 2] %}{% set outer = loop %}{% for b in [1, 2] %}{{ outer.index }}{{ loop.index }} {% endfor %}{% endfor %}",
    "reversed": "{% for m in messages[::-1] %}{{ loop.index0 }}{{ m.role }}{% endfor %}{% for m in messages|reverse %}{{ m.role }}{% endfor %}{{ 'abc'|reverse }}",
    "range": "{% for i in range(2, 8, 3) %}{{ i }}{% endfor %}{% for i in range(3, 0, -1) %}{{ i }}{% endfor %}{{ range(0)|list }}",
    "range too large": "{% for i in range(1000000) %}{% endfor %}",
    "loop length of a filter": "{% for m in messages|selectattr('role', 'equalto', 'user') %}{{ loop.length }}{{ loop.last }}{% endfor %}",
    # blocks
    "set block": "{% set x %}a{{ 1 }}\n{% endset %}[{{ x }}]",
    "set block filter": "{% set x | upper | trim %} a {% endset %}[{{ x }}]",
    "set tuple": "{% set a, b = 1, 2 %}{{ a }}{{ b }}{% set (c, d) = (3, 4) %}{{ c }}{{ d }}",
    "with": "{% with a = 1, b = 2 %}{{ a + b }}{% endwith %}[{{ a }}]",
    "filter block": "{% filter upper %}a{{ 'b' }}{% endfilter %}",
    "macro": "{% macro m(a, b='d', c=none) %}[{{ a }}{{ b }}{{ c }}]{% endmacro %}{{ m(1) }}{{ m(1, 2) }}{{ m(1, c=3) }}{{ m() }}",
    "macro recursive": "{% macro m(n) %}{{ n }}{% if n > 0 %}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(4) }}",
    "macro trim": "{% macro m() -%}\n x \n{%- endmacro %}[{{ m() }}]",
    "macro sees globals": "{% set x = 1 %}{% macro m() %}{{ x }}{{ bos_token }}{% endmacro %}{% set x = 2 %}{{ m() }}",
    "macro result is text": "{% macro m() %}a{% endmacro %}{{ m() == 'a' }}{{ m()|length }}{{ m() + 'b' }}{{ m() ~ 'c' }}",
    "call": "{% macro m(x) %}<{{ caller(x) }}>{% endmacro %}{% call(y) m(3) %}{{ y }}!{% endcall %}",
    "call plain": "{% macro m() %}<{{ caller() }}>{% endmacro %}{% call m() %}a{% endcall %}",
    "elif": "{% for x in [1, 2, 3] %}{% if x == 1 %}a{% elif x == 2 %}b{% else %}c{% endif %}{% endfor %}",
    "raise": "{{ raise_exception('no such role: ' ~ messages[0].role) }}",
    "raise in a branch": "{% if messages[0].role == 'x' %}{{ raise_exception('x') }}{% endif %}fine",
    "include": "{% include 'x' %}",
    "extends": "{% extends 'x' %}",
    "do": "{% do messages.append(1) %}",
    "append is refused": "{{ messages.append(1) }}",
    "update is refused": "{% set x = {} %}{{ x.update({'a': 1}) }}",
    "autoescape": "{% autoescape true %}{{ '<' }}{% endautoescape %}",
    "debug tag": "{% debug %}",
    "self import": "{% import 'x' as y %}",
    "autoescape off": "{{ '<&>' }}{{ '<'|e }}{{ '<\\'\"'|escape }}{{ '<'|safe }}",
    "method over key": "{% set x = {'items': 1, 'keys': 2, 'get': 3} %}{{ x.items()|list }}{{ x.keys()|list }}{{ x.get('get') }}{{ x['get'] }}",
    "in a generator": "{{ 'user' in messages|map(attribute='role') }}{{ 'x' not in messages|map(attribute='role')|list }}",
    "dotted attributes": "{% set x = [{'a': {'b': 1}}, {'a': {}}] %}{{ x|map(attribute='a.b', default=0)|list }}{{ x|selectattr('a.b', 'defined')|list|length }}{{ [[1, 2]]|map(attribute=0)|list }}",
    "filter block with arguments": "{% filter indent(2) %}a\nb{% endfilter %}",
    "escapes of Python": "{{ '\\a\\v\\d\\/\\U0001F600'|length }}",
    "escapes that stay": "{{ 'a\\/b\\d\\.c' }}{{ \"\\/\" }}",
    "line end in a text": "{{ 'a\nb' }}",
    "length of undefined": "{% if nothing|length > 0 %}a{% endif %}{{ nothing|list|length }}",
    "none plus text": "{{ none + 'a' }}",
    "trim of a number": "{{ 1|trim }}{{ 1.5|trim }}{{ 1|upper }}{{ true|lower }}{{ 12|length if false else 'x' }}",
    "length of a number": "{{ 12|length }}",
    "text of a float": "{{ 1e20|string }} {{ [1.5] }} {{ 1e-7|string }}",
    "join mixes": "{{ [1, 'a', none, true, 1.5]|join('|') }}",
    "chained filters": "{{ ' A b '|trim|lower|replace(' ', '_')|upper|first }}",
    "loop over a dict sorted": "{% for k, v in {'b': 1, 'A': 2}|dictsort %}{{ k }}{{ v }}{% endfor %}{% for k in {'b': 1, 'a': 2}|sort %}{{ k }}{% endfor %}",
    "namespace of a list": "{% set ns = namespace(items=[]) %}{% for m in messages %}{% set ns.items = ns.items + [m.role] %}{% endfor %}{{ ns.items|join(',') }}",
    "elements by name": "{{ messages[0]['content'][:5] }}{{ messages[-1]['content']|length }}{{ messages|last|length }}{{ (messages|first).role }}",
    "parentheses": "{{ (1 + 2) * 3 }}{{ ((('a'))) }}{{ not (true and false) }}",
    "nested macros": "{% macro a(x) %}({{ x }}){% endmacro %}{% macro b(x) %}{{ a(x) }}{{ a(x ~ '!') }}{% endmacro %}{{ b('y') }}",
    "macro of a map": "{% macro m(p) %}{% for k, v in p.items() %}{{ k }}:{{ v if v is not mapping else m(v) }};{% endfor %}{% endmacro %}{{ m({'a': 1, 'b': {'c': 2}}) }}",
    "macro keeps white space": "{%- macro m() %}\n  x\n{% endmacro -%}\n[{{ m() }}]",
    "set of a macro's result": "{% macro m() %} a {% endmacro %}{% set x = m()|trim %}[{{ x }}]",
    "if in a line": "{% if messages|length == 2 and messages[0].role in ['system', 'developer'] %}yes{% else %}no{% endif %}",
    "selectattr with a test": "{{ messages|selectattr('role', 'ne', 'user')|list|length }}{{ messages|selectattr('content', 'string')|list|length }}",
    "text compared with a list": "{{ messages[0].content is string and messages[0].content is not mapping }}{{ 'a' == ['a'] }}",
    "loop depth": "{% for a in [1] %}{% for b in [1] %}{{ loop.depth }}{{ loop.depth0 }}{% endfor %}{% endfor %}",
    "break in nested loops": "{% for a in [1, 2] %}{% for b in [1, 2, 3] %}{% if b == 2 %}{% break %}{% endif %}{{ a }}{{ b }} {% endfor %}{% endfor %}",
    "continue at the end": "{% for a in [1, 2, 3] %}{% if a == 2 %}{% continue %}{% endif %}{{ a }}{% if not loop.last %},{% endif %}{% endfor %}",
    "call with white space": "{% macro m() -%}<{{ caller()|trim }}>{%- endmacro %}{% call m() %}\n a \n{% endcall %}\n",
    "call in a loop": "{% macro m(x) %}{{ caller(x, x + 1) }}{% endmacro %}{% for i in [1, 2] %}{% call(a, b) m(i) %}{{ a }}{{ b }}{% endcall %}{% endfor %}",
    "a dict in a tag": "{% set x = {'a': {'b': 1}} %}{{ x }}{{ {'a': {'b': {}}} }}",
    "a percent and a brace": "{% set x = '%}' %}{{ x }}{{ '}}' }}{% set y = \"{{\" %}{{ y }}",
    "quotes in quotes": "{{ \"it's\" }}{{ 'say \"x\"' }}{{ 'it\\'s' }}",
    # tests
    "tests": "{{ 'a' is string }}{{ 1 is number }}{{ 1.5 is float }}{{ 1 is integer }}{{ true is boolean }}{{ true is true }}{{ false is false }}{{ none is none }}{{ {} is mapping }}{{ [] is sequence }}{{ 'a' is sequence }}{{ {} is sequence }}{{ [] is iterable }}{{ 'a' is iterable }}{{ true is number }}{{ true is integer }}{{ 1 is boolean }}{{ () is sequence }}",
    "tests of numbers": "{{ 3 is odd }}{{ 4 is even }}{{ 9 is divisibleby(3) }}{{ 9 is divisibleby 3 }}{{ 1 is eq 1 }}{{ 1 is ne 2 }}{{ 1 is lt 2 }}{{ 2 is gt 1 }}{{ 2 is ge 2 }}{{ 1 is in [1] }}{{ 1 is not in [1] }}",
    "tests of text": "{{ 'a' is lower }}{{ 'A' is upper }}{{ 'A' is lower }}{{ raise_exception is callable }}{{ 'upper' is filter }}{{ 'odd' is test }}{{ 1 is sameas 1 }}",
    "defined": "{{ x is defined }}{{ messages is defined }}{{ messages[0].x is defined }}{{ messages[0].role is defined }}{{ x is not defined }}{{ x is undefined }}{{ tools is none }}{{ tools is defined }}{{ documents is none }}{{ enable_thinking is defined and enable_thinking is false }}",
    "is not": "{{ 'a' is not string }}{{ none is not none }}{{ not none is none }}",
    # filters
    "filters of text": "[{{ ' a '|trim }}][{{ 'xax'|trim('x') }}][{{ 'aB'|upper }}][{{ 'aB'|lower }}][{{ 'hello wORLD'|capitalize }}][{{ 'hello wORLD foo-bar it\\'s'|title }}][{{ 'aXbX'|replace('X', '-') }}][{{ 'aXbX'|replace('X', '-', 1) }}][{{ 'ab'|center(6) }}]",
    "filter indent": "[{{ 'a\\nb\\n\\nc'|indent }}][{{ 'a\\nb'|indent(2) }}][{{ 'a\\nb'|indent(2, true) }}][{{ 'a\\n\\nb'|indent(2, blank=true) }}][{{ 'a\\nb'|indent('> ') }}][{{ 'a\\nb'|indent(width=3, first=true) }}]",
    "filters of lists": "{{ [3, 1, 2]|sort }}{{ [3, 1]|first }}{{ [3, 1]|last }}{{ [1, 2]|length }}{{ [1, 2]|sum }}{{ [1, 2]|max }}{{ [2, 1]|min }}{{ [1, 1, 2]|unique|list }}{{ [1, 2]|join }}{{ [1, 2]|join(', ') }}{{ 'ab'|list }}{{ [1, 2, 3]|reverse|list }}{{ ['b', 'A']|sort }}{{ [1,3,2]|sort(reverse=true) }}",
    "filters of maps": "{{ {'b': 1, 'a': 2}|dictsort }}{{ {'b': 1, 'a': 2}|list }}{{ {'b': 1}|length }}{{ {'b': 1, 'a': 2}|items|list }}{{ {'b': 1, 'a': 2}|dictsort(false, 'value') }}",
    "map": "{{ messages|map(attribute='role')|list }}{{ messages|map(attribute='role')|join(',') }}{{ ['a', 'b']|map('upper')|list }}{{ ['a']|map('replace', 'a', 'b')|list }}{{ messages|map(attribute='x', default='d')|list }}",
    "select": "{{ [1, 2, 3]|select('odd')|list }}{{ [1, 2, 3]|reject('odd')|list }}{{ [0, 1, '']|select|list }}{{ messages|selectattr('role', 'equalto', 'user')|list|length }}{{ messages|selectattr('role', '==', 'user')|map(attribute='role')|first }}{{ messages|rejectattr('role', 'eq', 'user')|map(attribute='role')|list }}{{ messages|selectattr('nothing')|list }}{{ messages|selectattr('role', 'in', ['user'])|list|length }}{{ messages|selectattr('role', 'defined')|list|length }}",
    "filters of numbers": "{{ 3.7|int }}{{ '42'|int }}{{ 'x'|int }}{{ 'x'|int(7) }}{{ '3.5'|float }}{{ 3|float }}{{ 2.5|round }}{{ 2.567|round(2) }}{{ 2.1|round(0, 'ceil') }}{{ -3|abs }}{{ 42.0|int }}{{ '1.9'|int }}{{ 3.0|string }}{{ 1|string + 'a' }}",
    "filter string": "{{ 1|string }}{{ true|string }}{{ none|string }}{{ [1, 'a']|string }}{{ {'a': 1}|string|length }}{{ 1.0|string }}",
    "filter format": "{{ '%s is %d and %.2f'|format('a', 3, 1.5) }}{{ '%05d|%-5s|%5s'|format(3, 'a', 'b') }}",
    "filter batch and slice": "{{ [1, 2, 3]|batch(2)|list }}{{ [1, 2, 3]|batch(2, 0)|list }}{{ [1, 2, 3]|slice(2)|list }}",
    "filter groupby": "{% for g, items in messages|groupby('role') %}{{ g }}{{ items|length }}{% endfor %}",
    "filter wordcount": "{{ 'a b  c'|wordcount }}",
    "filter truncate": "{{ 'hello big world of words'|truncate(12) }}|{{ 'hello big world'|truncate(9, true) }}|{{ 'hello'|truncate(9) }}|{{ 'hello big world'|truncate(9, true, '') }}",
    "filter forceescape": "{{ '<'|forceescape }}",
    "filter count": "{{ [1]|count }}{{ 'abc'|count }}",
    "filter default": "{{ ''|default('x') }}{{ ''|default('x', true) }}{{ none|d('y', boolean=true) }}{{ nothing|d }}",
    "filter precedence": "{{ 'a' ~ 'b'|upper }}{{ ('a' ~ 'b')|upper }}{{ -1|abs }}{{ 1 + 2|string|length }}{{ not ''|trim }}",
    "filter unknown": "{{ 'a'|nonsense }}",
    "test unknown": "{{ 'a' is nonsense }}",
    "function unknown": "{{ nonsense() }}",
    "method unknown": "{{ 'a'.nonsense() }}",
    # methods of text
    "strip": "[{{ '  a '.strip() }}][{{ '  a '.lstrip() }}][{{ '  a '.rstrip() }}][{{ 'xyaxy'.strip('xy') }}][{{ 'aab'.lstrip('a') }}][{{ 'baa\\n'.rstrip('\\n') }}][{{ '\\x1ca\\x1f'.strip()|length }}][{{ '\\u00a0a\\u2003'.strip() }}][{{ '\\u200ba'.strip()|length }}]",
    "split": "{{ 'a,b,,c'.split(',') }}{{ ' a  b '.split() }}{{ 'a,b,c'.split(',', 1) }}{{ 'a b c'.split(none, 1) }}{{ 'a b  c '.split(maxsplit=1) }}{{ ''.split() }}{{ ''.split(',') }}{{ 'abc'.split('x') }}{{ 'a--b'.split('--')[-1] }}{{ 'a,b'.split(sep=',') }}",
    "split think": "{{ 'x<think>y</think>z'.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') }}{{ 'x</think>\\n\\nz'.split('</think>')[-1].lstrip('\\n') }}",
    "rsplit": "{{ 'a,b,c'.rsplit(',', 1) }}{{ ' a b  c '.rsplit(none, 1) }}{{ 'a,b'.rsplit(',') }}",
    "partition": "{{ 'a=b=c'.partition('=') }}{{ 'a=b=c'.rpartition('=') }}{{ 'abc'.partition('=') }}{{ 'abc'.rpartition('=') }}",
    "splitlines": "{{ 'a\\nb\\r\\nc\\rd\\n'.splitlines() }}{{ 'a\\nb'.splitlines(true) }}{{ ''.splitlines() }}{{ 'a\\x0bb\\u2028c'.splitlines() }}{{ 'a\\n'.splitlines(keepends=true) }}",
    "starts and ends": "{{ 'abc'.startswith('ab') }}{{ 'abc'.endswith('bc') }}{{ 'abc'.startswith(('x', 'a')) }}{{ 'abc'.endswith(('x',)) }}{{ 'abc'.startswith('b', 1) }}{{ 'abc'.endswith('b', 0, 2) }}",
    "case": "{{ 'aBc dEF'.title() }}|{{ 'aBc dEF'.capitalize() }}|{{ 'aBc'.upper() }}|{{ 'aBc'.lower() }}|{{ 'aBc'.swapcase() }}|{{ 'it\\'s a1b'.title() }}|{{ 'ß'.upper() }}",
    "find": "{{ 'abcb'.find('b') }}{{ 'abcb'.rfind('b') }}{{ 'abc'.find('x') }}{{ 'éb'.find('b') }}{{ 'abcb'.find('b', 2) }}{{ 'abcb'.index('c') }}{{ 'abcb'.rindex('b') }}{{ 'abcb'.count('b') }}{{ 'aaa'.count('aa') }}{{ 'abc'.count('') }}",
    "index not found": "{{ 'abc'.index('x') }}",
    "replace": "{{ 'aXbX'.replace('X', '') }}{{ 'aXbX'.replace('X', '-', 1) }}{{ 'ab'.replace('', '.') }}{{ 'ab'.replace('', '.', 2) }}",
    "prefix": "{{ 'abcab'.removeprefix('ab') }}|{{ 'abcab'.removesuffix('ab') }}|{{ 'abc'.removeprefix('x') }}|{{ 'abc'.removesuffix('') }}",
    "join": "{{ ','.join(['a', 'b']) }}{{ ''.join([]) }}{{ ' '.join(messages|map(attribute='role')) }}{{ '-'.join('abc') }}",
    "join numbers": "{{ ','.join([1, 2]) }}",
    "pad": "[{{ 'a'.ljust(3) }}][{{ 'a'.rjust(3, '.') }}][{{ 'a'.center(4, '*') }}][{{ '7'.zfill(3) }}][{{ '-7'.zfill(4) }}][{{ 'ab'.center(5) }}]",
    "is methods": "{{ 'abc'.isalpha() }}{{ '12'.isdigit() }}{{ 'a1'.isalnum() }}{{ ' '.isspace() }}{{ 'Ab'.istitle() }}{{ 'ab'.islower() }}{{ 'AB'.isupper() }}{{ '½'.isdigit() }}{{ '½'.isnumeric() }}{{ '²'.isdigit() }}{{ '²'.isdecimal() }}{{ 'ab_1'.isidentifier() }}{{ 'a'.isascii() }}{{ ''.isalpha() }}{{ '٣'.isdecimal() }}",
    "format method": "{{ '{} {}'.format('a', 1) }}{{ '{0}{1}{0}'.format('a', 'b') }}{{ '{x:>4}|{y:.2f}'.format(x='a', y=1.5) }}{{ '{{}}'.format() }}",
    "translate chain": "{{ (' ' + messages[1].content).strip().upper()[:4] }}",
    # methods of lists and maps
    "map methods": "{{ {'a': 1}.get('a') }}{{ {'a': 1}.get('b') }}{{ {'a': 1}.get('b', 2) }}{{ {'a': 1}.keys()|list }}{{ {'a': 1}.values()|list }}{{ {'a': 1}.items()|list }}{{ {'a': 1}.copy() }}",
    "list methods": "{{ [1, 2, 1].count(1) }}{{ [1, 2, 1].index(2) }}{{ [1].copy() }}{{ (1, 2, 1).count(1) }}{{ (1, 2).index(2) }}",
    "list index missing": "{{ [1].index(2) }}",
    "int methods": "{{ (5).bit_length() }}{{ 1.5.is_integer() }}",
    "dict call": "{{ dict(a=1) }}{{ dict({'b': 2}, c=3) }}{{ dict([['k', 'v']]) }}{{ dict() }}",
    "cycler and joiner": "{% set j = joiner(', ') %}{% for x in [1, 2, 3] %}{{ j() }}{{ x }}{% endfor %}{% set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.next() }}",
    "messages are maps": "{{ messages[0].get('role') }}{{ messages[0].get('x', 'none') }}{{ messages[0].items()|list }}{{ messages[0] is mapping }}{{ messages is sequence }}{{ messages[0].keys()|list }}{{ messages|length }}",
    "content is text": "{% if messages[0].content is string %}{{ messages[0].content|trim }}{% elif messages[0].content is iterable %}list{% endif %}",
    "tokens": "{{ bos_token }}{{ eos_token }}[{{ unk_token }}]{{ pad_token is defined }}",
    "add_generation_prompt": "{% if add_generation_prompt %}go{% endif %}{{ add_generation_prompt }}",
    "number forms": "{{ 1_000 }} {{ 0x1f }} {{ 0b11 }} {{ 0o17 }} {{ 1.5e3 }} {{ 1E2 }}",
    "power of minus": "{{ -2 ** 2 }} {{ (-2) ** 2 }} {{ 2 ** 3 ** 2 }} {{ 2 ** 0.5 }}",
    "concat before compare": "{{ 'a' ~ 'b' == 'ab' }} {{ 1 + 2 == 3 and 'x' }} {{ 1 if 'a' in 'abc' and not false else 2 }}",
    "divide by zero": "{{ 1 / 0 }}",
    "unclosed": "a{% if true %}b",
    "unclosed variable": "a\n{{ b",
    "unclosed comment": "a{# b",
    "unknown tag": "a\n{% nonsense %}",
    "a lone brace is text": "a } b { c % d # e",
    "not a tag": "{%- set x = 1 -%} {{ x }} {%- set x = x + 1 -%} {{ x }}",
    "keyword names": "{{ {'if': 1, 'for': 2}['if'] }} {{ {'in': 1}.in }}",
    "deep dots": "{{ {'a': {'b': [{'c': 5}]}}.a.b[0].c }}",
    "trailing comma": "{{ [1, 2,] }} {{ {'a': 1,} }} {{ (1,) }}",
    "star arguments": "{% macro m(a, b) %}{{ a }}{{ b }}{% endmacro %}{{ m(*[1, 2]) }}{{ m(**{'a': 1, 'b': 2}) }}",
    "lipsum free": "{{ [1, 2, 3]|map('string')|join('+') }}",
    "set in a condition": "{%- if messages[0]['role'] == 'system' -%}{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set loop_messages = messages -%}{%- endif -%}{{ loop_messages|length }}",
    "unicode names": "{% set é = 1 %}{{ é }}",
    "min of none": "[{{ []|min }}][{{ []|first }}][{{ []|last }}]",
    "sum attribute": "{{ [{'n': 1}, {'n': 2}]|sum(attribute='n') }}{{ [1, 2]|sum(start=10) }}{{ ['a', 'b']|sum('x') if false else '' }}",
    "join attribute": "{{ messages|join(', ', attribute='role') }}",
    "sort attribute": "{{ messages|sort(attribute='content')|map(attribute='role')|list }}",
    "unique attribute": "{{ messages|unique(attribute='role')|list|length }}",
    "int of a text with spaces": "{{ ' 5 '|int }}{{ '0x1f'|int(0, 16) }}",
    "default of false": "{{ false|default('x') }}{{ false|default('x', true) }}",
    "newline in a tag": "{%\nif true\n%}\na{%\nendif\n%}",
    "string with a tag": "{{ '{{ x }}' }}{{ \"{% y %}\" }}{{ '{# z #}' }}",
    "comment with quotes": "a{# it's \"x #}b",
    "control in a loop head": "{%- for m in messages -%}\n  {{- m.role -}}\n{%- endfor -%}\n",
}

PUBLISHED = {
    "thoughts, parts and calls": (
        """{%- set seen = namespace(pictures=0, asked=-1) -%}
{%- macro body(parts, counts=true) -%}
  {%- if parts is string -%}{{ parts }}
  {%- elif parts is undefined or parts is none -%}
  {%- else -%}
    {%- for part in parts if part is mapping -%}
      {%- if counts and part.type == 'image' -%}{%- set seen.pictures = seen.pictures + 1 -%}[{{ seen.pictures }}]{%- endif -%}
      {{- part.text if 'text' in part -}}
    {%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- macro call(function) -%}
  {%- set said = namespace(values=[]) -%}
  {%- for name, value in function.arguments|items -%}
    {%- set value = value|tojson|safe if value is mapping or (value is sequence and value is not string) else value|string -%}
    {%- set said.values = said.values + [name ~ '=' ~ value] -%}
  {%- endfor -%}
  {{- function.name + '(' + said.values|join('; ') + ')' -}}
{%- endmacro -%}
{%- for m in messages[::-1] -%}
  {%- if m.role == 'user' and seen.asked < 0 -%}{%- set seen.asked = messages|length - loop.index -%}{%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role == 'tool' %}
    {{- '' if loop.previtem is defined and loop.previtem.role == 'tool' else '(' -}}
    {{ ' ' + body(m.get('content'))|trim }}
    {{- '' if loop.nextitem and loop.nextitem.role == 'tool' else ')\\n' -}}
  {%- elif m.role == 'assistant' -%}
    {%- generation -%}
    {%- set text = body(m.content, counts=false) -%}
    {%- if '</think>' in text and m.reasoning_content is not string -%}
      {%- set text = text.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- 'A' ~ (seen.asked - loop.index0) ~ ('<' ~ m.reasoning_content.strip('\\n') ~ '>' if m.reasoning_content and loop.index0 > seen.asked else '') ~ text -}}
    {%- for c in m.tool_calls or [] -%}
      {%- if c.function is defined -%}{%- set c = c.function -%}{%- endif -%}
      {{- ('; ' if not loop.first else ': ' if text|trim else ' ') + call(c) -}}
    {%- endfor -%}
    {{- '\\n' -}}
    {%- endgeneration -%}
  {%- else -%}
    {%- set text = body(m.content)|trim -%}
    {{- m.role[0]|upper ~ text[:(text|length) - ('e'|length)] ~ (text[-1:] if not text.endswith('e')) ~ '\\n' -}}
  {%- endif -%}
{%- endfor -%}
{{- 'A<' if add_generation_prompt and not (quiet is defined and quiet is true) -}}
"""
    ),
    "marks with thinking": (
        """{%- if tools %}
    {{- '<|turn|>system\\n' }}
    {%- if messages[0].role == 'system' %}
        {{- messages[0].content + '\\n\\n' }}
    {%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|done|>\\n" }}
{%- else %}
    {%- if messages[0].role == 'system' %}
        {{- '<|turn|>system\\n' + messages[0].content + '<|done|>\\n' }}
    {%- endif %}
{%- endif %}
{%- set ns = namespace(searching=true, last=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.searching and message.role == "user" and message.content is string and not(message.content.startswith('<reply>') and message.content.endswith('</reply>')) %}
        {%- set ns.searching = false %}
        {%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.content is string %}
        {%- set content = message.content %}
    {%- else %}
        {%- set content = '' %}
    {%- endif %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|turn|>' + message.role + '\\n' + content + '<|done|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set thought = '' %}
        {%- if message.thought is string %}
            {%- set thought = message.thought %}
        {%- else %}
            {%- if '</think>' in content %}
                {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
                {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
            {%- endif %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or (not loop.last and thought)) %}
            {{- '<|turn|>' + message.role + '\\n<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}
        {%- else %}
            {{- '<|turn|>' + message.role + '\\n' + content }}
        {%- endif %}
        {{- '<|done|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn|>assistant\\n' }}
    {%- if think is defined and think is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
    ),
    "namespace of flags": (
        """{% if not add_generation_prompt is defined %}{% set add_generation_prompt = false %}{% endif %}{% set ns = namespace(is_first=false, is_tool=false, prompt='', first_prompt=true) %}{%- for message in messages %}{%- if message['role'] == 'system' %}{%- if ns.first_prompt %}{% set ns.prompt = ns.prompt + message['content'] %}{% set ns.first_prompt = false %}{%- else %}{% set ns.prompt = ns.prompt + '\\n\\n' + message['content'] %}{%- endif %}{%- endif %}{%- endfor %}{{ bos_token }}{{ ns.prompt }}{%- for message in messages %}{%- if message['role'] == 'user' %}{%- set ns.is_tool = false -%}{{'<User>' + message['content']}}{%- endif %}{%- if message['role'] == 'assistant' and message['content'] is not none %}{%- set content = message['content'] %}{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}{{'<Assistant>' + content + eos_token}}{%- endif %}{%- endfor -%}{% if add_generation_prompt and not ns.is_tool %}{{'<Assistant><think>\\n'}}{% endif %}"""
    ),
    "visible text": (
        """[HEAD]<start>
{%- if tools -%}
<|system|>
{%- for tool in tools %}
{{ tool | tojson(ensure_ascii=False) }}
{% endfor %}
{%- endif -%}
{%- macro visible_text(content) -%}
    {%- if content is string -%}
        {{- content }}
    {%- elif content is iterable and content is not mapping -%}
        {%- for item in content -%}
            {%- if item is mapping and item.type == 'text' -%}
                {{- item.text }}
            {%- elif item is string -%}
                {{- item }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{- content }}
    {%- endif -%}
{%- endmacro -%}
{%- set ns = namespace(last_user_index=-1) %}
{%- for m in messages %}
    {%- if m.role == 'user' %}
        {% set ns.last_user_index = loop.index0 -%}
    {%- endif %}
{%- endfor %}
{% for m in messages %}
{%- if m.role == 'user' -%}<|user|>
{{ visible_text(m.content) }}
{{- '/quiet' if (enable_thinking is defined and not enable_thinking and not visible_text(m.content).endswith("/quiet")) else '' -}}
{%- elif m.role == 'assistant' -%}
<|assistant|>
{%- set reasoning_content = '' %}
{%- set content = visible_text(m.content) %}
{%- if m.reasoning_content is string %}
    {%- set reasoning_content = m.reasoning_content %}
{%- else %}
    {%- if '</think>' in content %}
        {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
    {%- endif %}
{%- endif %}
{%- if loop.index0 > ns.last_user_index and reasoning_content -%}
{{ '\\n<think>' + reasoning_content.strip() +  '</think>'}}
{%- else -%}
{{ '\\n<think></think>' }}
{%- endif -%}
{%- if content.strip() -%}
{{ '\\n' + content.strip() }}
{%- endif -%}
{%- elif m.role == 'system' -%}
<|system|>
{{ visible_text(m.content) }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    <|assistant|>{{- '\\n<think></think>' if (enable_thinking is defined and not enable_thinking) else '' -}}
{%- endif -%}
"""
    ),
    "channels": (
        """{#-
  A template in several macros: the first writes types.
 #}
{%- macro write_type(spec, required, level=0) -%}
    {%- if spec.type == "array" -%}
        {%- if spec['items'] -%}
            {{- write_type(spec['items'], required) + "[]" }}
        {%- else -%}
            {{- "any[]" }}
        {%- endif -%}
    {%- elif spec.type is defined and spec.type is iterable and spec.type is not string and spec.type is not mapping and spec.type[0] is defined -%}
        {{- spec.type | join(" | ") }}
    {%- elif spec.type == "string" -%}
        {%- if spec.enum -%}
            {{- '"' + spec.enum|join('" | "') + '"' -}}
        {%- else -%}
            {{- "string" }}
            {%- if spec.nullable %}
                {{- " | null" }}
            {%- endif -%}
        {%- endif -%}
    {%- elif spec.type == "object" -%}
        {{- "{\\n" -}}
        {%- for name, prop in spec.properties.items() -%}
            {{- "    " * level + name -}}
            {%- if name not in (required or []) -%}
                {{- "?" }}
            {%- endif -%}
            {{- ": " }}
            {{- write_type(prop, spec.required or [], level + 1) }}
            {%- if not loop.last -%}
                {{-", " }}
            {%- endif -%}
        {%- endfor -%}
        {{- "\\n}" }}
    {%- else -%}
        {{- "any" }}
    {%- endif -%}
{%- endmacro -%}
{%- macro head() -%}
    {%- if identity is not defined -%}
        {{- "You are a model.\\n" -}}
    {%- else -%}
        {{- identity }}
    {%- endif -%}
    {{- "Current date: " + strftime_now("%Y-%m-%d") + "\\n\\n" }}
    {%- if effort is not defined %}
        {%- set effort = "medium" %}
    {%- endif %}
    {{- "Reasoning: " + effort + "\\n\\n" }}
    {{- "# Valid channels: one, two. Channel must be included for every message." }}
    {%- for tool in (tools or []) %}{{ write_type(tool.function.parameters, tool.function.parameters.required) }}{% endfor %}
{%- endmacro -%}
{{- "<|start|>system<|message|>" }}
{{- head() }}
{{- "<|end|>" }}
{%- if messages[0].role == "developer" or messages[0].role == "system" %}
    {%- set developer_message = messages[0].content %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set developer_message = "" %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- if developer_message or tools %}
    {{- "<|start|>developer<|message|>" }}
    {%- if developer_message %}
        {{- "# Instructions\\n\\n" }}
        {{- developer_message }}
    {%- endif -%}
    {{- "<|end|>" }}
{%- endif %}
{%- set last_tool_call = namespace(name=none) %}
{%- for message in loop_messages -%}
    {%- if message.role == 'assistant' -%}
        {%- if "content" in message %}
            {%- if "<|channel|>one<|message|>" in message.content %}
                {{- raise_exception("You have passed a message containing <|channel|> tags.") }}
            {%- endif %}
        {%- endif %}
        {{- "<|start|>assistant<|channel|>two<|message|>" + message.content + "<|end|>" }}
        {%- set last_tool_call.name = none %}
    {%- elif message.role == 'user' -%}
        {{- "<|start|>user<|message|>" + message.content + "<|end|>" }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|start|>assistant
{%- endif -%}
"""
    ),
    "roles with a date": (
        """{%- if messages[0]['role'] == 'system' %}
     {%- set system_message = messages[0]['content'] %}
     {%- set loop_messages = messages[1:] %}
 {%- else %}
     {%- set system_message = "Knowledge cutoff: April.\\nToday's Date: " + strftime_now('%B %d, %Y') + ".\\nYou are a model." %}
     {%- if tools and documents %}
     {%- set system_message = system_message + " Tools and documents." %}
 {%- elif tools %}
     {%- set system_message = system_message + " Tools." %}
 {%- endif %}
     {%- set loop_messages = messages %}
 {%- endif %}
 {{- '<|role|>system<|endrole|>' + system_message + '<|end|>
' }}
 {%- if tools %}
     {{- '<|role|>tools<|endrole|>' }}
     {{- tools | tojson(indent=4) }}
     {{- '<|end|>
' }}
 {%- endif %}
 {%- for message in loop_messages %}
     {{- '<|role|>' + message['role'] + '<|endrole|>' + message['content'] + '<|end|>
' }}
     {%- if loop.last and add_generation_prompt %}
     {{- '<|role|>assistant' }}
             {%- if controls %}
                 {{- ' ' + controls | tojson()}}
             {%- endif %}
     {{- '<|endrole|>' }}
     {%- endif %}
 {%- endfor %}"""
    ),
    "turns that alternate": (
        """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}

{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if loop.first and system_message is defined %}
            {{- " [ASK] " + system_message + "\\n\\n" + message["content"] + " [/ASK]" }}
        {%- else %}
            {{- " [ASK] " + message["content"] + " [/ASK]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] + eos_token}}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported, with the exception of an initial optional system message!") }}
    {%- endif %}
{%- endfor %}
"""
    ),
    "lines of roles": (
        """{{ bos_token }}{% for message in messages %}
{% if message['role'] == 'system' %}
{{ '<|system|>
' + message['content'] + '
' }}
{% elif message['role'] == 'user' %}
{{ '<|user|>
' + message['content'] + '
' }}
{% elif message['role'] == 'assistant' %}
{{ '<|assistant|>
'  + message['content'] + eos_token + '
' }}
{% endif %}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>
' }}
{% endif %}
{% endfor %}
"""
    ),
    "short roles": (
        """{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}{{'<|system|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'user' %}{{'<|user|>\\n' + message['content'] + '<|end|>\\n'}}{% elif message['role'] == 'assistant' %}{% generation %}{{'<|assistant|>\\n' + message['content'] + '<|end|>\\n'}}{% endgeneration %}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"""
    ),
    "headers with a date": (
        """{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not date_string is defined %}
    {%- if strftime_now is defined %}
        {%- set date_string = strftime_now("%d %b %Y") %}
    {%- else %}
        {%- set date_string = "26 Jul 2024" %}
    {%- endif %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|head|>system<|endhead|>\\n\\n" }}
{%- if tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none and not tools_in_user_message %}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) %}
        {{- '<|head|>' + message['role'] + '<|endhead|>\\n\\n'+ message['content'] | trim + '<|eot|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|head|>assistant<|endhead|>\\n\\n' }}
{%- endif %}
"""
    ),
    "first user gets the system text": (
        """{{ bos_token }}{%- set ns = namespace(system='') -%}{%- if messages[0]['role'] == 'system' -%}{%- if messages[0]['content'] is string -%}{%- set ns.system = messages[0]['content'] + '\\n\\n' -%}{%- else -%}{%- set ns.system = messages[0]['content'][0]['text'] + '\\n\\n' -%}{%- endif -%}{%- set loop_messages = messages[1:] -%}{%- else -%}{%- set loop_messages = messages -%}{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}{%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<turn>' + role + '\\n' + (ns.system if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'text' -%}{{ item['text'] | trim }}{%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '</turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<turn>model\\n'}}{%- endif -%}
"""
    ),
}


def rendered(template, messages, **more):
    try:
        texts, _ = chat_template_utils.render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, bos_token="<s>", eos_token="</s>", **more
        )
        return {"expected": texts[0]}
    except Exception as error:  # what a template does wrong, in any of the ways that Python has
        return {"error": (str(error).splitlines() or [type(error).__name__])[0]}


ROOT = Path(__file__).resolve().parents[4]

# What the command is asked, by the name of a template: prompt, system message, further files.
COMMANDS = {
    "tojson of text": ("it's <b>", "s", {}),
    "tojson all": ("a", "", {}),
    "tojson indent": ("a & b", "", {}),
    "generation on lines of its own": ("a", "b", {}),
    "generation with white space control": ("a", "", {}),
    "crlf with control": ("a", "", {}),
    "crlf": ("a", "", {}),
    "strip": ("a", "", {}),
    "select": ("a", "b", {}),
    "tokens": ("a", "", {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}),
    "marks with thinking": ("Who?", "Be kind.", {}),
    "turns that alternate": ("Who?", "Be kind.", {"tokenizer_config.json": {"bos_token": "<s>", "eos_token": "</s>"}}),
    "visible text": ("Who?", "", {}),
    "short roles": ("Who?", "Be <kind>.", {}),
}


def situations():
    tokenizer = Tokenizer.from_file(str(ROOT / "models/tiny-moe/tokenizer.json"))
    rows = []
    for name, (prompt, system, files) in COMMANDS.items():
        template = (ONE | PUBLISHED)[name]
        messages = [{"role": "system", "content": system}] if system else []
        messages.append({"role": "user", "content": prompt})
        config = files.get("tokenizer_config.json", {})
        content = lambda token: token["content"] if isinstance(token, dict) else token
        tokens = {key: content(value) for key, value in config.items()}
        texts, _ = chat_template_utils.render_jinja_template(
            [messages], chat_template=template, add_generation_prompt=True, **tokens
        )
        run = ["generate", "--model", "{dir}", "--chat", "--prompt", prompt, "--new-tokens", "1", "--json"]
        rows.append({
            "name": f"chat template: {name}",
            "line": 4,
            "source": "transformers 5.23, tokenizers 0.23, cli/tests/situations/chat/make_templates.py",
            "model": "models/tiny-moe",
            "files": {"chat_template.jinja": {"text": template}} | {file: {"json": value} for file, value in files.items()},
            "run": run + (["--system", system] if system else []),
            "code": 0,
            "json": {"/prompt_tokens": len(tokenizer.encode(texts[0], add_special_tokens=False).ids)},
        })
    refused = [
        ("a loop without end in sight", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within"),
        ("a macro that calls itself", "a\n{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion limit"),
        ("a text that doubles", "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}", "does not end within"),
        ("what the template itself refuses", "\n\n{{ raise_exception('no such\nrole') }}", "chat_template.jinja: line 3: no such role"),
        ("an unknown filter", "\r\n{{ 1|nonsense }}", "chat_template.jinja: line 2: "),
        ("a block that is not closed", "{% generation %}", "chat_template.jinja: line 1: "),
    ]
    for name, template, message in refused:
        rows.append({
            "name": f"chat template: {name}",
            "line": 4,
            "source": "the command's own limits" if "limit" in message or "end" in message else "jinja2 3.1.6 refuses it too",
            "model": "models/tiny-moe",
            "files": {"chat_template.jinja": {"text": template}},
            "run": ["generate", "--model", "{dir}", "--chat", "--prompt", "a", "--new-tokens", "1"],
            "code": 2,
            "stderr_has": [message],
            "stderr_lines": 1,
        })
    with open(ROOT / "cli/tests/situations/chat.json", "w", encoding="utf-8") as file:
        json.dump(rows, file, indent=1, ensure_ascii=False)
        file.write("\n")


def main():
    situations()
    cases = []
    for name, template in ONE.items():
        messages = [SYSTEM, USER]
        cases.append({"name": name, "template": template, "messages": messages} | rendered(template, messages))
    for name, template in PUBLISHED.items():
        for kind, messages in [("asked", [SYSTEM, USER]), ("asked alone", [USER]), ("talk", TALK)]:
            case = {"name": f"published: {name}, {kind}", "template": template, "messages": messages}
            cases.append(case | rendered(template, messages))
        if name in ("thoughts, parts and calls", "visible text"):
            for messages, said in [(APART, "thoughts apart"), (APART[:-1], "tools answer")]:
                case = {"name": f"published: {name}, {said}", "template": template, "messages": messages}
                cases.append(case | rendered(template, messages))
        case = {"name": f"published: {name}, tools", "template": template, "messages": [USER], "tools": TOOLS}
        cases.append(case | rendered(template, [USER], tools=TOOLS))
    with open(os.path.join(os.path.dirname(__file__), "templates.json"), "w", encoding="utf-8") as file:
        json.dump({"now": NOW.isoformat(), "cases": cases}, file, indent=1, ensure_ascii=False)
        file.write("\n")
    print(len(cases), "cases", sum("error" in case for case in cases), "errors")


main()
