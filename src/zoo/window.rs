//! Sliding windows: which blocks have one and how far it reaches, as transformers 5 reads it. A window counts the position that looks; one as
//! long as the longest sequence is none.

use super::config::Config;
use crate::error::Result;
use crate::spec::SlidingWindow;

/// What families that have windows say how far by.
pub(super) const KEY: &str = "sliding_window";

/// What each block does, where that is said block by block.
const KINDS: &str = "layer_types";

/// Refuses one that a family would not read.
pub(super) fn refuse(config: &Config, longest: usize) -> Result<()> {
    match config.optional_size(KEY)? {
        Some(window) if window < longest => {
            let expected = format!("null or at least max_position_embeddings {longest}");
            Err(config.error(KEY, &expected, &window.to_string()))
        }
        _ => Ok(()),
    }
}

/// In all of `layers` blocks, where there is one at all; `otherwise` is how far where the key is absent, null being none.
pub(super) fn everywhere(
    config: &Config,
    layers: usize,
    longest: usize,
    otherwise: Option<usize>,
) -> Result<SlidingWindow> {
    let unsaid = otherwise.filter(|_| config.is_absent(KEY));
    let positions = config.optional_size(KEY)?.or(unsaid);
    Ok(positions.map_or(SlidingWindow::default(), |positions| within((0..layers).collect(), positions, longest)))
}

/// In no block, which `layer_types` must not contradict.
pub(super) fn nowhere(config: &Config) -> Result<SlidingWindow> {
    let kinds = config.optional_strings(KINDS)?.unwrap_or_default();
    match kinds.into_iter().find(|&kind| kind != "full_attention") {
        Some(other) => Err(config.error(KINDS, "full_attention in all blocks", other)),
        None => Ok(SlidingWindow::default()),
    }
}

/// In the blocks that `layer_types` names, or those that are `unsaid` where it does not; `otherwise` is how far where nothing is said.
pub(super) fn by_block(
    config: &Config,
    layers: usize,
    longest: usize,
    unsaid: impl Fn(usize) -> bool,
    otherwise: usize,
) -> Result<SlidingWindow> {
    let kinds = config.optional_strings(KINDS)?;
    if let Some(kinds) = kinds.as_ref().filter(|kinds| kinds.len() != layers) {
        let expected = format!("one for each of num_hidden_layers {layers}");
        return Err(config.error(KINDS, &expected, &kinds.len().to_string()));
    }
    let mut blocks = Vec::new();
    for block in 0..layers {
        match kinds.as_ref().map(|kinds| kinds[block]) {
            Some("sliding_attention") => blocks.push(block),
            None if unsaid(block) => blocks.push(block),
            None | Some("full_attention") => {}
            Some(other) => return Err(config.error(KINDS, "sliding_attention or full_attention", other)),
        }
    }
    Ok(match blocks.is_empty() {
        true => SlidingWindow::default(),
        false => within(blocks, config.optional_size(KEY)?.unwrap_or(otherwise), longest),
    })
}

/// A window that something is outside of.
fn within(blocks: Vec<usize>, positions: usize, longest: usize) -> SlidingWindow {
    if positions < longest { SlidingWindow { blocks, positions } } else { SlidingWindow::default() }
}
