//! Model families: from a checkpoint's `config.json` to a [`ModelSpec`], one small file per family. Data, no forward pass.

mod config;
mod olmoe;

use crate::error::{Error, Result};
use crate::spec::ModelSpec;
use config::Config;

/// Families there is a file for, as `model_type` names them.
pub const FAMILIES: [&str; 1] = ["olmoe"];

/// Reads a `config.json`; `file` is its name in error messages.
///
/// # Errors
/// [`Error::Config`] for text that is no JSON object, a missing, null, mistyped or contradictory key;
/// [`Error::UnknownName`] for a family that is not in [`FAMILIES`].
pub fn parse_config(json: &str, file: &str) -> Result<ModelSpec> {
    let config = Config::parse(json, file)?;
    match config.string("model_type")? {
        "olmoe" => olmoe::model_spec(&config),
        other => Err(Error::UnknownName { kind: "model family", got: other.into(), expected: FAMILIES.join(", ") }),
    }
}
