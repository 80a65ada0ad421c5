//! Jinja as transformers sets it up for chat templates (`utils/chat_template_utils.py`), with bounded work.

use jiff::Zoned;
use minijinja::syntax::SyntaxConfig;
use minijinja::value::Value;
use minijinja::{Environment, Error, ErrorKind};

use super::{filters, json, methods, source, time};

/// Steps of the engine, or 64 bytes each that it makes: a chat of a hundred messages takes some thousand.
const FUEL: u64 = 1_000_000;

/// What a template writes at a time.
pub fn render(template: &str, name: &str, context: Value, now: Zoned) -> Result<String, Error> {
    let environment = environment(now)?;
    let source = source::prepared(template);
    let rendered = environment.template_from_named_str(name, &source)?.render(context);
    rendered.map_err(|error| match error.kind() {
        ErrorKind::OutOfFuel => Error::new(ErrorKind::OutOfFuel, format!("does not end within {FUEL} steps")),
        _ => error,
    })
}

fn environment(now: Zoned) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    // Blocks leave neither their line nor what is before them on it.
    environment.set_syntax(SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build()?);
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    // Errors without the values that were there.
    environment.set_debug(false);
    environment.set_fuel(Some(FUEL));
    environment.set_unknown_method_callback(methods::call);
    environment.add_function("raise_exception", |message: String| -> Result<Value, Error> {
        Err(Error::new(ErrorKind::InvalidOperation, message))
    });
    environment.add_function("strftime_now", move |format: String| time::written(&now, &format));
    environment.add_filter("tojson", json::filter);
    filters::add(&mut environment);
    Ok(environment)
}
