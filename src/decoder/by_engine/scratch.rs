//! What forward passes on the engine work in, kept for the next one: it decides nothing.

use super::attention::Work;
use super::kv::KeptBlocks;
use super::parts::Rotation;

/// What forward passes work in, `[rows, hidden]` each.
#[derive(Debug, Default)]
pub(in crate::decoder) struct Scratch {
    /// The hidden states; after a pass, normed.
    pub(super) hidden: Vec<f32>,
    pub(super) normed: Vec<f32>,
    pub(super) added: Vec<f32>,
    pub(super) rotation: Rotation,
    pub(super) work: Work,
    pub(super) everyone: Vec<u32>,
    pub(super) ones: Vec<f32>,
    /// Keys and values of passes that keep none.
    pub(super) kv: Option<KeptBlocks>,
}

impl Scratch {
    /// The hidden states that the output weights see, of the last pass.
    pub(in crate::decoder) fn hidden(&self) -> &[f32] {
        &self.hidden
    }
}
