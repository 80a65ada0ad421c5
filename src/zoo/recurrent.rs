//! Blocks without attention, as configurations name them.

use super::config::Config;
use crate::error::Result;
use crate::spec::{RecurrentBlocks, RecurrentMixer, WIDEST_CONV};

/// What each block does.
const KINDS: &str = "layer_types";

/// The blocks that `layer_types`, which has to be there, calls `kind`; the others have attention.
pub(super) fn named(
    config: &Config,
    kind: &str,
    mixer: RecurrentMixer,
    layers: usize,
) -> Result<Option<RecurrentBlocks>> {
    let Some(kinds) = config.optional_strings(KINDS)? else {
        return Err(config.wrong(KINDS, "a list of strings"));
    };
    if kinds.len() != layers {
        let expected = format!("one for each of num_hidden_layers {layers}");
        return Err(config.error(KINDS, &expected, &kinds.len().to_string()));
    }
    if let Some(other) = kinds.iter().find(|&&other| other != kind && other != "full_attention") {
        return Err(config.error(KINDS, &format!("{kind} or full_attention"), other));
    }
    let blocks = (0..layers).filter(|&block| kinds[block] == kind).collect();
    Ok(some(blocks, mixer))
}

/// The same where the configuration may say instead that each so many-th block has attention.
pub(super) fn named_or_each(
    config: &Config,
    kind: &str,
    mixer: RecurrentMixer,
    layers: usize,
) -> Result<Option<RecurrentBlocks>> {
    if config.has(KINDS) {
        return named(config, kind, mixer, layers);
    }
    let interval = config.optional_size("full_attention_interval")?.unwrap_or(4);
    Ok(some((0..layers).filter(|block| !(block + 1).is_multiple_of(interval)).collect(), mixer))
}

/// How many positions a convolution sees.
pub(super) fn conv_width(config: &Config, key: &str, otherwise: usize) -> Result<usize> {
    let width = config.optional_size(key)?.unwrap_or(otherwise);
    match width <= WIDEST_CONV {
        true => Ok(width),
        false => Err(config.error(key, &format!("at most {WIDEST_CONV} positions"), &width.to_string())),
    }
}

fn some(blocks: Vec<usize>, mixer: RecurrentMixer) -> Option<RecurrentBlocks> {
    (!blocks.is_empty()).then_some(RecurrentBlocks { blocks, mixer })
}
