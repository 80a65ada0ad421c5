//! The decoder's blocks on the expert engine, for inference on the CPU: rows of `f32` that stages work on in place, weights as they are stored,
//! keys and values kept where they are written.
//!
//! A stage wakes the threads once: queries, keys and values together, attention, its output, the two passes of the experts. What a pass works
//! in is kept for the next one. The definition of every part, and the way for training and other devices, is
//! [`by_candle`](super::by_candle).

mod attention;
mod delta_net;
pub(super) mod kept;
mod latent;
mod load;
mod parts;
mod recurrent;
mod short_conv;
mod stored;

use std::sync::Arc;

use candle_core::{Device, Tensor};

use self::attention::{Attention, Rows};
use self::delta_net::DeltaNet;
use self::kept::{KeptBlocks, KeptSizes, Scratch};
use self::latent::LatentAttention;
use self::parts::{Linear, Norm, Rates};
use self::short_conv::ShortConv;
use super::batch::Batch;
use super::checked::Checks;
use super::finite::Place;
use super::lookahead::Pass;
use super::moe_step::{Ffn, guess_ahead, moe_step};
use super::state::{DecoderState, Kept};
use crate::error::Result;
use crate::experts::engine::Engine;
use crate::experts::matrix::Matrix;
use crate::experts::work as engine_work;
use crate::layer::by_engine::BorrowedExpert;
use crate::layer::{MoeLayer, Packed};
use crate::parallel::share::Share;
use crate::spec::Multipliers;

/// All blocks and what stands around them; clones share weights.
#[derive(Clone)]
pub(super) struct ByEngine {
    embedding: Packed,
    pub(super) blocks: Vec<Block>,
    norm: Norm,
    output: Linear,
    engine: Arc<Engine>,
    rates: Rates,
    sizes: KeptSizes,
}

/// The parts of a block; clones share weights.
#[derive(Clone)]
pub(super) struct Block {
    mixer_norm: Norm,
    mixer: Mixer,
    ffn_norm: Norm,
    ffn: Ffn,
    /// Positions look back only as far as the model's window.
    windowed: bool,
}

/// What a process runs of a batch.
#[derive(Clone, Copy)]
pub(super) struct Part<'a> {
    /// Its own sequences.
    pub(super) batch: &'a Batch,
    /// All of them, which routers are told of.
    pub(super) whole: &'a Batch,
    /// How they are shared out over ranks, if they are.
    pub(super) share: Option<&'a Share>,
    /// The position of each own sequence's first token.
    pub(super) starts: &'a [usize],
}

/// How positions learn of each other.
#[derive(Clone)]
enum Mixer {
    Grouped(Attention),
    Latent(LatentAttention),
    ShortConv(ShortConv),
    DeltaNet(Box<DeltaNet>),
}

impl Block {
    fn is_recurrent(&self) -> bool {
        matches!(self.mixer, Mixer::ShortConv(_) | Mixer::DeltaNet(_))
    }

    pub(super) fn moe(&self) -> Option<&MoeLayer> {
        self.ffn.moe()
    }

    pub(super) fn moe_mut(&mut self) -> Option<&mut MoeLayer> {
        self.ffn.moe_mut()
    }
}

impl ByEngine {
    /// What blocks keep of no text yet.
    pub(super) fn kept(&self) -> KeptBlocks {
        KeptBlocks::new(self.sizes, self.blocks.iter().map(Block::is_recurrent))
    }

    /// Whether blocks keep what these do.
    pub(super) fn is_of(&self, kept: &KeptBlocks) -> bool {
        kept.is_of(self.sizes, self.blocks.iter().map(Block::is_recurrent))
    }

    /// Logits `[rows, vocab]` of hidden states.
    pub(super) fn logits(&self, hidden: &[f32], scale: f64, vocab: usize) -> Result<Vec<f32>> {
        let rows = hidden.len() / self.embedding.shape()[1];
        let mut logits = vec![0.0; rows * vocab];
        let matrix = Matrix::from_f32(rows, self.embedding.shape()[1], hidden)?;
        self.engine.products(&mut [self.output.of(matrix, &mut logits)?])?;
        if scale != 1.0 {
            logits.iter_mut().for_each(|logit| *logit *= scale as f32);
        }
        Ok(logits)
    }

    /// The hidden states that the output weights see, into `scratch`.
    pub(super) fn hidden_states(
        &self,
        checks: Checks<'_>,
        Part { batch, whole, share, starts }: Part<'_>,
        pass: Pass,
        state: &mut DecoderState,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let (width, isa) = (checks.spec.moe.hidden, self.engine.isa());
        let Multipliers { embedding, residual, .. } = checks.spec.multipliers;
        let Scratch { hidden, normed, added, rotation, work, everyone, ones, kv: unkept } = scratch;
        let count = batch.ids().len();
        // One layer of each kind.
        let kinds = || [false, true].into_iter();
        if unkept.as_ref().is_some_and(|kept| !kept.is_of(self.sizes, kinds())) {
            *unkept = None;
        }
        hidden.resize(count * width, 0.0);
        added.resize(count * width, 0.0);
        let table = self.embedding.matrix()?;
        for (&id, hidden) in batch.ids().iter().zip(hidden.chunks_exact_mut(width)) {
            table.widen(isa, id as usize, hidden);
        }
        if embedding != 1.0 {
            hidden.iter_mut().for_each(|number| *number *= embedding as f32);
        }
        checks.check_rows(Place::Embedding, hidden)?;
        let positions = starts.iter().flat_map(|&start| start..start + batch.positions());
        self.rates.turn(positions, rotation);
        let rows = Rows { batch, starts, rotation, engine: &self.engine };
        let window = Some(checks.spec.window.positions);
        // MoE layers are counted by themselves: blocks without experts have no router.
        let mut moe_layer = 0;
        for (index, block) in self.blocks.iter().enumerate() {
            let ends = starts.iter().zip(batch.lengths()).map(|(start, length)| start + length);
            // Of passes that keep nothing what a layer keeps is gone when the next one comes.
            let (kept, at) = match &mut state.kv {
                Some(Kept::Blocks(kept)) => (kept, index),
                _ => {
                    let unkept = unkept.get_or_insert_with(|| KeptBlocks::new(self.sizes, kinds()));
                    (unkept, usize::from(block.is_recurrent()))
                }
            };
            normed.clone_from(hidden);
            block.mixer_norm.apply(isa, normed);
            match &block.mixer {
                Mixer::Grouped(attention) => {
                    let window = window.filter(|_| block.windowed);
                    attention.forward(normed, &rows, window, kept.blocks(at, ends), work, added)?;
                }
                Mixer::Latent(attention) => {
                    attention.forward(normed, &rows, kept.blocks(at, ends), work, added)?;
                }
                Mixer::ShortConv(conv) => conv.forward(normed, &rows, kept.memories(at, starts), work, added)?,
                Mixer::DeltaNet(net) => net.forward(normed, &rows, kept.memories(at, starts), work, added)?,
            }
            add(hidden, added, residual);
            checks.check_rows(Place::Attention(index), hidden)?;
            normed.clone_from(hidden);
            block.ffn_norm.apply(isa, normed);
            match &block.ffn {
                Ffn::Dense(ffn) => {
                    everyone.clear();
                    everyone.extend(0..count as u32);
                    ones.resize(count, 1.0);
                    let (input, borrowed) = (Matrix::from_f32(count, width, normed)?, BorrowedExpert::new(ffn)?);
                    let work = engine_work::Work { expert: borrowed.view()?, tokens: everyone, weights: ones };
                    self.engine.forward(input, &[work], added)?;
                }
                Ffn::Moe(moe) => {
                    let layer = moe_layer;
                    moe_layer += 1;
                    if pass.ahead {
                        self.read_ahead(layer + 1, batch, hidden, state);
                    }
                    moe_step(
                        checks,
                        [index, layer],
                        moe,
                        whole,
                        pass,
                        state,
                        |context, top_k, route, buffers, keep| {
                            let seen = moe.pass_rows((normed, share), context, top_k, route, buffers, added)?;
                            let experts = checks.spec.moe.experts;
                            checks.check_gate_rows(index, moe, buffers.logits())?;
                            let tensor = |rows: &[f32], width: usize| {
                                Tensor::from_slice(rows, (rows.len() / width, width), &Device::Cpu)
                            };
                            Ok((
                                (),
                                match keep {
                                    true => Some(seen.pass(tensor(normed, width)?, tensor(buffers.logits(), experts)?)),
                                    false => None,
                                },
                            ))
                        },
                    )?;
                }
            }
            add(hidden, added, residual);
            checks.check_rows(Place::Ffn(index), hidden)?;
        }
        self.norm.apply(isa, hidden);
        checks.check_rows(Place::Norm, hidden)
    }

    /// Has what `layer` will use of its cache read, as far as its gate can tell from the hidden state before the layer before it.
    fn read_ahead(&self, layer: usize, batch: &Batch, hidden: &[f32], state: &DecoderState) {
        let mut with_experts = self.blocks.iter().filter_map(|block| Some((block, block.moe()?)));
        let Some((block, moe)) = with_experts.nth(layer) else { return };
        guess_ahead(moe, batch, state, || {
            let mut normed = hidden.to_vec();
            block.ffn_norm.apply(self.engine.isa(), &mut normed);
            let rows = batch.ids().len();
            Ok(Tensor::from_slice(&normed, (rows, hidden.len() / rows.max(1)), &Device::Cpu)?)
        });
    }
}

/// `hidden + by · added`, in place.
fn add(hidden: &mut [f32], added: &[f32], by: f64) {
    let by = by as f32;
    hidden.iter_mut().zip(added).for_each(|(hidden, added)| *hidden += by * added);
}
