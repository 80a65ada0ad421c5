//! That a checkpoint has what its configuration says, and no experts beyond that: one that has contradicts it, and would load as
//! another model than the one that was trained.

use super::{TensorSource, Weights};
use crate::error::{Error, Result};
use crate::spec::ModelSpec;
use crate::weights::experts::{MXFP4, stack_order};

impl Weights {
    /// Checks that all blocks are there, by the norm that each begins with: before anything else counts them, and before those that are
    /// there are read.
    pub(super) fn check_blocks(&self, spec: &ModelSpec) -> Result<()> {
        let norm =
            |block: usize| self.source(&format!("{}.{}.weight", spec.block_prefix(block), spec.names.mixer_norm));
        (0..spec.layers).try_for_each(|block| match norm(block)? {
            TensorSource::Same(name) => self.checkpoint.entry(&name).map(drop),
            _ => Ok(()),
        })
    }

    /// Checks that there is no expert, and no block with experts, beyond those of `spec`; none both one by one and stacked; and that stacks
    /// have their shapes. (Missing ones are found when they are asked for.)
    pub(super) fn check_experts(&self, spec: &ModelSpec) -> Result<()> {
        if self.checkpoint.gguf().is_some() {
            return super::gguf::names::check_experts(&self.checkpoint, spec);
        }
        let names = &spec.moe.names;
        let [experts, stacked] = [&names.experts, &names.stacked_gate_up].map(|name| format!("{}.{name}", spec.ffn));
        let packed = format!("{stacked}{}", MXFP4[0]);
        let layers = format!("{}.layers.", spec.names.root);
        let ids = |name: &str| -> Option<(usize, Option<usize>)> {
            let (block, rest) = name.strip_prefix(&layers)?.split_once('.')?;
            let block = block.parse().ok()?;
            if rest == stacked || rest == packed {
                return Some((block, None));
            }
            let (expert, _) = rest.strip_prefix(&experts)?.strip_prefix('.')?.split_once('.')?;
            Some((block, Some(expert.parse().ok()?)))
        };
        for (name, entry) in self.checkpoint.tensors() {
            let Some((block, expert)) = ids(name) else { continue };
            let wrong = |expected: String| self.checkpoint.wrong(entry, name, format!("expected {expected}"));
            // Nothing runs them.
            if (spec.layers..spec.layers.saturating_add(spec.extra_blocks)).contains(&block) {
                continue;
            }
            let parts = [("blocks", Some(block), spec.layers), ("experts", expert, spec.moe.experts)];
            for (what, id, count) in parts {
                if let Some(id) = id.filter(|&id| id >= count) {
                    return Err(wrong(format!("{what} 0 to {} as the configuration says, got {id}", count - 1)));
                }
            }
            if spec.dense.blocks.binary_search(&block).is_ok() {
                return Err(wrong(format!("no experts in block {block} as the configuration says, got one")));
            }
            let stack = format!("{}.{stacked}", spec.block_prefix(block));
            if expert.is_some() && self.checkpoint.tensors().contains_key(&stack) {
                return Err(wrong(format!("experts one by one or stacked, got it beside `{stack}`")));
            }
        }
        spec.moe_blocks().try_for_each(|block| self.check_stack(spec, block))
    }

    /// Checks the shapes of stacked experts, if there are any, where file and tensors can be named.
    fn check_stack(&self, spec: &ModelSpec, block: usize) -> Result<()> {
        let names = &spec.moe.names;
        let [gate_up, down] = [&names.stacked_gate_up, &names.stacked_down]
            .map(|name| format!("{}.{}.{name}", spec.block_prefix(block), spec.ffn));
        let Some(entry) = self.checkpoint.tensors().get(&gate_up) else { return Ok(()) };
        let order = stack_order(&spec.moe, &entry.shape, &self.checkpoint.entry(&down)?.shape);
        order.map(drop).map_err(|error| {
            let detail = format!("tensors `{gate_up}` and `{down}`: {error}");
            Error::Checkpoint { file: self.checkpoint.file_of(entry).into(), detail }
        })
    }
}
