//! The decoder's blocks as Candle's operations: for training, for other devices than the CPU, and the definition of what
//! [`by_engine`](super::by_engine) does.
//!
//! Hidden states are `[sequences, positions, hidden]` in the dtype of the weights. Everything has its backward pass.

mod attention;
pub(in crate::decoder) mod delta_net;
pub(in crate::decoder) mod kept;
mod latent;
mod linear;
mod load;
mod norm;
mod recurrent;
mod rotary;
mod short_conv;

use candle_core::{DType, Device, Module, Tensor};
use candle_nn::Embedding;

use self::attention::Attention;
use self::delta_net::DeltaNet;
use self::kept::KeptTensors;
use self::latent::LatentAttention;
use self::linear::Linear;
use self::norm::Norm;
use self::rotary::Rotary;
use self::short_conv::ShortConv;
use super::batch::Batch;
use super::checked::Checks;
use super::finite::Place;
use super::lookahead::Pass;
use super::moe_step::{Ffn, guess_ahead, moe_step};
use super::state::{DecoderState, Kept};
use crate::error::Result;
use crate::layer::MoeLayer;
use crate::spec::Multipliers;

/// The parts of a block; clones share weights.
#[derive(Clone)]
struct Block {
    mixer_norm: Norm,
    mixer: Mixer,
    ffn_norm: Norm,
    ffn: Ffn,
    /// Positions look back only as far as the model's window.
    windowed: bool,
}

/// How positions learn of each other.
#[derive(Clone)]
enum Mixer {
    Grouped(Attention),
    Latent(LatentAttention),
    ShortConv(ShortConv),
    DeltaNet(Box<DeltaNet>),
}

impl Mixer {
    fn is_recurrent(&self) -> bool {
        matches!(self, Self::ShortConv(_) | Self::DeltaNet(_))
    }

    fn forward(
        &self,
        hidden: &Tensor,
        batch: &Batch,
        rotary: &Rotary,
        mask: Option<&Tensor>,
        kept: Option<&mut KeptTensors>,
    ) -> Result<Tensor> {
        let (cache, memory) = match kept {
            Some(KeptTensors::Attention(cache)) => (Some(cache), None),
            Some(KeptTensors::Recurrent { now, .. }) => (None, Some(now)),
            None => (None, None),
        };
        match self {
            Self::Grouped(attention) => attention.forward(hidden, rotary, mask, cache),
            Self::Latent(attention) => attention.forward(hidden, rotary, mask, cache),
            Self::ShortConv(conv) => conv.forward(hidden, batch.lengths(), memory),
            Self::DeltaNet(net) => net.forward(hidden, batch.lengths(), memory),
        }
    }
}

impl Block {
    fn moe(&self) -> Option<&MoeLayer> {
        self.ffn.moe()
    }

    fn moe_mut(&mut self) -> Option<&mut MoeLayer> {
        self.ffn.moe_mut()
    }
}

/// All blocks and what stands around them; clones share weights.
#[derive(Clone)]
pub(super) struct ByCandle {
    embedding: Embedding,
    blocks: Vec<Block>,
    norm: Norm,
    output: Linear,
}

impl ByCandle {
    /// What blocks keep of no text yet.
    pub(super) fn kept(&self) -> Vec<KeptTensors> {
        self.blocks.iter().map(|block| KeptTensors::new(block.mixer.is_recurrent())).collect()
    }

    /// Whether blocks keep what these do.
    pub(super) fn is_of(&self, kept: &[KeptTensors]) -> bool {
        self.blocks.iter().zip(kept).all(|(block, kept)| block.mixer.is_recurrent() == kept.is_recurrent())
    }

    /// The MoE layers, of all blocks that have one.
    pub(super) fn moe_layers(&self) -> impl Iterator<Item = &MoeLayer> {
        self.blocks.iter().filter_map(Block::moe)
    }

    /// The MoE layers, to be changed.
    pub(super) fn moe_layers_mut(&mut self) -> impl Iterator<Item = &mut MoeLayer> {
        self.blocks.iter_mut().filter_map(Block::moe_mut)
    }

    pub(super) fn device(&self) -> &Device {
        self.embedding.embeddings().device()
    }

    /// Of weights and activations.
    pub(super) fn dtype(&self) -> DType {
        self.embedding.embeddings().dtype()
    }

    /// What the output weights make of hidden states, times `scale`.
    pub(super) fn logits(&self, hidden: &Tensor, scale: f64) -> Result<Tensor> {
        scaled(self.output.forward(hidden)?, scale)
    }

    /// The hidden states that the output weights see, `[sequences, positions, hidden]`.
    pub(super) fn hidden_states(
        &self,
        checks: Checks<'_>,
        batch: &Batch,
        starts: &[usize],
        pass: Pass,
        state: &mut DecoderState,
    ) -> Result<Tensor> {
        let device = self.device();
        let ids = Tensor::from_slice(batch.ids(), (batch.sequences(), batch.positions()), device)?;
        let Multipliers { embedding, residual, .. } = checks.spec.multipliers;
        let mut hidden = scaled(self.embedding.forward(&ids)?, embedding)?;
        checks.check_finite(Place::Embedding, &hidden)?;
        let rotary = Rotary::new(checks.spec, starts, batch.positions(), hidden.dtype(), device)?;
        let mask = |window: Option<usize>| state.seen.mask(batch, window, hidden.dtype(), device);
        let window = Some(checks.spec.window.positions).filter(|_| !checks.spec.window.blocks.is_empty());
        let (whole_mask, window_mask) = (mask(None)?, window.map(|_| mask(window)).transpose()?.flatten());
        // MoE layers are counted by themselves: blocks without experts have no router.
        let mut moe_layer = 0;
        for (index, block) in self.blocks.iter().enumerate() {
            let kept = match &mut state.kv {
                Some(Kept::Tensors(kept)) => Some(&mut kept[index]),
                _ => None,
            };
            let mask = if block.windowed { &window_mask } else { &whole_mask };
            let normed = block.mixer_norm.forward(&hidden)?;
            let mixed = block.mixer.forward(&normed, batch, &rotary, mask.as_ref(), kept)?;
            hidden = (hidden + scaled(mixed, residual)?)?;
            checks.check_finite(Place::Attention(index), &hidden)?;
            let normed = block.ffn_norm.forward(&hidden)?;
            let output = match &block.ffn {
                Ffn::Dense(ffn) => ffn.forward(&normed)?,
                Ffn::Moe(moe) => {
                    let layer = moe_layer;
                    moe_layer += 1;
                    if pass.ahead {
                        self.read_ahead(layer + 1, batch, &hidden, state);
                    }
                    moe_step(checks, [index, layer], moe, batch, pass, state, |context, top_k, route, buffers, _| {
                        let (output, seen) = moe.pass(&normed, context, top_k, route, buffers)?;
                        checks.check_gate(index, moe, &seen.logits)?;
                        Ok((output, Some(seen)))
                    })?
                }
            };
            hidden = (hidden + scaled(output, residual)?)?;
            checks.check_finite(Place::Ffn(index), &hidden)?;
        }
        let hidden = self.norm.forward(&hidden)?;
        checks.check_finite(Place::Norm, &hidden)?;
        Ok(hidden)
    }

    /// Has what `layer` will use of its cache read, as far as its gate can tell from the hidden state before the layer before it.
    fn read_ahead(&self, layer: usize, batch: &Batch, hidden: &Tensor, state: &DecoderState) {
        let mut with_experts = self.blocks.iter().filter_map(|block| Some((block, block.moe()?)));
        let Some((block, moe)) = with_experts.nth(layer) else { return };
        guess_ahead(moe, batch, state, || Ok(block.ffn_norm.forward(hidden)?));
    }
}

/// `tensor` times a constant that most models do not have.
fn scaled(tensor: Tensor, by: f64) -> Result<Tensor> {
    if by == 1.0 { Ok(tensor) } else { Ok((tensor * by)?) }
}

/// Some rows of hidden states, `[rows, hidden]`.
pub(super) fn last_states(hidden: &Tensor, rows: impl Iterator<Item = usize>) -> Result<Tensor> {
    let at = Tensor::new(rows.map(|row| row as u32).collect::<Vec<_>>(), hidden.device())?;
    Ok(hidden.flatten_to(1)?.index_select(&at, 0)?)
}
