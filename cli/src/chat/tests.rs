//! The environment of chat templates against what transformers wrote with the same templates.

use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use minijinja::context;
use minijinja::value::Value;
use serde::Deserialize;

use super::{environment, limits, reason, source};

/// `tests/situations/chat/templates.json`; `make_templates.py` beside it says what is in it.
#[derive(Deserialize)]
struct Table {
    now: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    template: String,
    messages: Value,
    #[serde(default)]
    tools: Option<Value>,
    /// None where transformers refuses it.
    expected: Option<String>,
}

fn render(template: &str, context: Value) -> Result<String, String> {
    let now: DateTime = "2026-03-05T07:08:09".parse().unwrap();
    let now = now.to_zoned(TimeZone::UTC).unwrap();
    let template = template.to_owned();
    let rendered = limits::bounded(move || environment::render(&template, "template", context, now))?;
    rendered.map_err(|error| reason(&error))
}

#[test]
fn templates_write_what_transformers_writes() {
    let table = include_str!(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/situations/chat/templates.json"));
    let table: Table = serde_json::from_str(table).unwrap();
    let now = table.now.parse::<DateTime>().unwrap().to_zoned(TimeZone::UTC).unwrap();
    assert!(table.cases.len() > 300);
    let mut wrong = Vec::new();
    for case in table.cases {
        let context = context! {
            messages => case.messages,
            tools => case.tools.unwrap_or(Value::from(())),
            documents => Value::from(()),
            add_generation_prompt => true,
            bos_token => "<s>",
            eos_token => "</s>",
        };
        let written = environment::render(&case.template, "template", context, now.clone());
        if written.as_ref().ok() != case.expected.as_ref() {
            let written = written.map_err(|error| error.to_string());
            wrong.push(format!("{}: expected {:?}, got {written:?}", case.name, case.expected));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn work_has_a_limit() {
    for (template, expected) in [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "does not end within"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion limit"),
        ("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}", "recursion limit"),
        ("{% for i in range(99999) %}{{ 'x' * 9999999 }}{% endfor %}", "does not end within"),
        ("{{ 'x' * 999999999 }}", "does not end within"),
        (
            "{% set ns = namespace(x='aa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
            "does not end within",
        ),
    ] {
        let message = render(template, context! {}).unwrap_err();
        assert!(message.contains(expected), "{template}: {message}");
    }
    // Deep in each other: nothing to stumble over when it is written or forgotten.
    let nested = "{% set ns = namespace(x=[]) %}{% for i in range(90000) %}{% set ns.x = [ns.x] %}{% endfor %}";
    let printed = render(&format!("{nested}{{{{ ns.x }}}}"), context! {}).unwrap();
    assert_eq!(printed.len(), 2 * 90_001);
    let brackets = format!("{{{{ {}1{} }}}}", "(".repeat(100_000), ")".repeat(100_000));
    assert!(render(&brackets, context! {}).is_err());
}

#[test]
fn errors_name_their_line() {
    for (template, expected) in [
        ("a\nb\n{{ raise_exception('no\nsuch role') }}", "line 3: no such role"),
        ("a\r\n{% generation %}\r\n{{ nothing.x }}{% endgeneration %}", "line 3: "),
        ("\n\n{% if true %}", "line 3: "),
        ("\n{{ 1|tojson(indent={}) }}", "line 2: "),
    ] {
        let message = render(template, context! {}).unwrap_err();
        assert!(message.contains(expected), "{template}: {message}");
    }
}

#[test]
fn a_template_without_tags_of_its_own_stays() {
    for text in [
        "",
        "{",
        "{{",
        "{%",
        "{#",
        "{{ '",
        "{{ '\\",
        "{% raw %}",
        "{%raw%}{{",
        "{{ {{ }} }}",
        "a{% x",
        "{% é %}{{ 'é\\é' }}",
    ] {
        assert_eq!(source::prepared(text), text);
    }
}
