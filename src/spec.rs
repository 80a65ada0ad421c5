//! What a model is, as plain data: [`MoeSpec`] describes one MoE layer, [`ModelSpec`] the transformer around it.
//!
//! The zoo writes these from a `config.json`, the layer and the decoder read them. Knows nothing of tensors.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::expert::check_expert_count;
use crate::experts::activation::Activation;
use crate::routing::assignment::check_top_k;
use crate::routing::scores::Scoring;

pub(crate) use self::names::BlockNames;
pub use self::names::ExpertNames;
pub(crate) use self::positions::{EachRate, Llama3, RopeScaling, Yarn};
pub(crate) use self::recurrent::{DeltaNet, RecurrentBlocks, RecurrentMixer, ShortConv, WIDEST_CONV};

mod names;
mod positions;
mod recurrent;

/// FFNs that every token meets beside its own experts, as one of their width together. Without biases.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedExperts {
    /// Width between up and down projection; several shared experts are one as wide as all of them.
    pub width: usize,
    /// The output is weighed by `σ(shared_gate(x))`, a number per token (Qwen2-MoE); else it counts in full (DeepSeek).
    pub gated: bool,
}

/// One MoE layer: sizes, what its experts are, scoring, tensor names.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoeSpec {
    /// Width of the hidden state.
    pub hidden: usize,
    /// Experts in the layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Width between an expert's up and down projection.
    pub expert_width: usize,
    /// What stands between an expert's projections, shared ones included.
    pub activation: Activation,
    /// Every projection of an expert has a bias.
    pub expert_bias: bool,
    /// The gate has a bias, which is part of the logits.
    pub gate_bias: bool,
    /// The gate has a bias that counts for selection only.
    pub selection_bias: bool,
    /// What every token meets beside its experts.
    pub shared: Option<SharedExperts>,
    /// How logits become scores and combine weights.
    pub scoring: Scoring,
    /// Where the tensors are.
    pub names: ExpertNames,
}

impl MoeSpec {
    /// A layer of SwiGLU experts without biases, none of them shared, with softmax scores, weights as they are, and the
    /// default names.
    ///
    /// # Errors
    /// [`Error::ExpertCount`], [`Error::TopKZero`], [`Error::TopKExceedsExperts`], [`Error::Parameter`] for a width of 0.
    pub fn new(hidden: usize, experts: usize, top_k: usize, expert_width: usize) -> Result<Self> {
        let spec = Self {
            hidden,
            experts,
            top_k,
            expert_width,
            activation: Activation::swiglu(),
            expert_bias: false,
            gate_bias: false,
            selection_bias: false,
            shared: None,
            scoring: Scoring::softmax(),
            names: ExpertNames::default(),
        };
        spec.check()?;
        Ok(spec)
    }

    /// Checks the sizes against each other, and the activation.
    ///
    /// # Errors
    /// As [`MoeSpec::new`] and [`Activation::check`].
    pub(crate) fn check(&self) -> Result<()> {
        check_expert_count(self.experts)?;
        check_top_k(self.top_k, self.experts)?;
        let shared = self.shared.map_or(1, |shared| shared.width);
        for (name, width) in
            [("hidden", self.hidden), ("expert_width", self.expert_width), ("shared expert width", shared)]
        {
            if width == 0 {
                return Err(Error::parameter(name, width, "at least 1"));
            }
        }
        self.activation.check()
    }

    /// Weights of one expert: its projections, and their biases where it has them.
    pub(crate) fn parameters_per_expert(&self) -> usize {
        let biases = if self.expert_bias { self.inner_projections() * self.expert_width + self.hidden } else { 0 };
        self.projections(self.expert_width) + biases
    }

    /// Weights of the layer that every token meets: the gate, the shared expert and its gate.
    pub(crate) fn shared_parameters(&self) -> usize {
        let gate = self.experts * (self.hidden + usize::from(self.gate_bias) + usize::from(self.selection_bias));
        let weigh = |shared: SharedExperts| if shared.gated { self.hidden } else { 0 };
        gate + self.shared.map_or(0, |shared| self.projections(shared.width) + weigh(shared))
    }

    /// Projections from the hidden state inwards: gate and up, or up alone.
    pub(crate) fn inner_projections(&self) -> usize {
        if self.activation.gated { 2 } else { 1 }
    }

    fn projections(&self, width: usize) -> usize {
        (self.inner_projections() + 1) * self.hidden * width
    }
}

/// The norms around attention and FFN, and the last one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Norm {
    /// `x / √mean(x²) · weight` (arXiv 1910.07467).
    #[default]
    Rms,
    /// The same times `1 + weight` (Qwen3-Next).
    RmsFromOne,
    /// `(x − mean(x)) / √var(x) · weight + bias` (arXiv 1607.06450).
    Layer,
}

/// RMS norm on queries and keys.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QkNorm {
    /// Over the whole projection, before it is cut into heads (OLMoE).
    Whole,
    /// Over each head (Qwen3).
    PerHead,
}

/// Which of attention's projections have a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AttentionBias {
    /// None of them.
    None,
    /// Those of queries, keys and values (Qwen2).
    Inputs,
    /// All of them.
    All,
}

/// Sizes of latent attention (DeepSeek-V2, arXiv 2405.04434), beside [`ModelSpec::rotary_dim`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct LatentSpec {
    /// Width of the vector that queries are made of; `None` where they are made of the hidden state.
    pub(crate) query_rank: Option<usize>,
    /// Width of the vector that keys and values are made of.
    pub(crate) kv_rank: usize,
    /// Width of a head's key that is not rotated.
    pub(crate) key_width: usize,
    /// Width of a head's value.
    pub(crate) value_width: usize,
    /// Neighbours are rotated against each other, not the two halves.
    pub(crate) pairs: bool,
}

/// Constants that Granite multiplies with.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Multipliers {
    /// Of the embeddings.
    pub(crate) embedding: f64,
    /// Of what each attention and each FFN adds.
    pub(crate) residual: f64,
    /// Of queries times keys; `None` for `1 / √head_dim`.
    pub(crate) attention: Option<f64>,
    /// Of the logits.
    pub(crate) logits: f64,
}

impl Default for Multipliers {
    /// None.
    fn default() -> Self {
        Self { embedding: 1.0, residual: 1.0, attention: None, logits: 1.0 }
    }
}

/// Blocks whose FFN is one for all tokens, without experts.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct DenseBlocks {
    /// Which blocks, ascending.
    pub(crate) blocks: Vec<usize>,
    /// Width between their up and down projection; their activation and names are those of the experts.
    pub(crate) width: usize,
}

/// Blocks in which a position looks back only so far.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct SlidingWindow {
    /// Which blocks, ascending.
    pub(crate) blocks: Vec<usize>,
    /// Positions that one sees there, itself among them.
    pub(crate) positions: usize,
}

/// A decoder-only transformer whose FFNs are MoE layers, but for some blocks.
#[derive(Clone, Debug, PartialEq)]
pub struct ModelSpec {
    /// Model family, as `model_type` names it.
    pub family: &'static str,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Transformer blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Longest sequence that it runs: what the model was made for, or less where nothing here rotates further positions.
    pub max_positions: usize,
    /// Which norms it has.
    pub(crate) norm: Norm,
    /// Their epsilon.
    pub(crate) norm_eps: f64,
    /// Base of the rotary embedding.
    pub(crate) rope_theta: f64,
    /// Stretched positions.
    pub(crate) rope_scaling: RopeScaling,
    /// How much of a head is rotated, from its front on; even.
    pub(crate) rotary_dim: usize,
    /// RMS norm on queries and keys.
    pub(crate) qk_norm: Option<QkNorm>,
    /// Biases of attention.
    pub(crate) attention_bias: AttentionBias,
    /// What heads mix is weighed by a sigmoid before it goes on; each head's query has as many numbers for that behind it (Qwen3-Next).
    pub(crate) output_gate: bool,
    /// Every head has a number that takes its share of attention beside the positions, and gives nothing for it (gpt-oss).
    pub(crate) sinks: bool,
    /// Blocks whose positions do not see all before them.
    pub(crate) window: SlidingWindow,
    /// Blocks without attention.
    pub(crate) recurrent: Option<RecurrentBlocks>,
    /// Keys and values come from a narrow vector; `head_dim`, norms, biases and clamps of queries and keys then mean nothing.
    pub(crate) latent: Option<LatentSpec>,
    /// Constants that it multiplies with.
    pub(crate) multipliers: Multipliers,
    /// Queries, keys and values are clamped to ± this.
    pub(crate) clip_qkv: Option<f64>,
    /// Output weights are the embedding's.
    pub(crate) tied_embeddings: bool,
    /// The output has a bias.
    pub(crate) output_bias: bool,
    /// Token ids that end a text.
    pub(crate) end_of_text: Vec<u32>,
    /// Blocks past the last one that a checkpoint may hold and no forward pass runs: they predict further tokens.
    pub(crate) extra_blocks: usize,
    /// What a block calls its FFN, with experts or without.
    pub ffn: String,
    /// What it calls everything else.
    pub(crate) names: BlockNames,
    /// Blocks that have no experts.
    pub(crate) dense: DenseBlocks,
    /// The MoE layer of every other block. Where layers have numbers of experts per token of their own, its `top_k` is the largest.
    pub moe: MoeSpec,
    /// Experts per token of each MoE layer where they are not all alike, else empty.
    pub layer_top_k: Vec<usize>,
}

impl LatentSpec {
    /// Epsilon of the norms in there, whatever the configuration says of the others.
    pub(crate) const NORM_EPS: f64 = 1e-6;
}

impl ModelSpec {
    /// Checks the sizes against each other.
    ///
    /// # Errors
    /// As [`MoeSpec::new`], and [`Error::Parameter`] for a size of 0, key–value heads that do not divide the query heads, an
    /// odd rotary width or one above the head width, as many divisors of rotations as there are no pairs, dense blocks, blocks with a window or without attention that are not there or out of
    /// order, dense ones that are all there are, a recurrence of sizes that no model has, sinks, windows or recurrences beside latent attention, or more weights than can be counted.
    pub(crate) fn check(&self) -> Result<()> {
        self.moe.check()?;
        let sizes = [
            ("vocabulary", self.vocab),
            ("layers", self.layers),
            ("heads", self.heads),
            ("key-value heads", self.kv_heads),
            ("head width", self.head_dim),
            ("rotary width", self.rotary_dim),
            ("positions", self.max_positions),
        ];
        if let Some((name, size)) = sizes.into_iter().find(|&(_, size)| size == 0) {
            return Err(Error::parameter(name, size, "at least 1"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            let expected = format!("a divisor of the {} query heads", self.heads);
            return Err(Error::parameter("key-value heads", self.kv_heads, expected));
        }
        if !self.rotary_dim.is_multiple_of(2) {
            return Err(Error::parameter("rotary width", self.rotary_dim, "an even number (rotary embedding)"));
        }
        if self.latent.is_none() && self.rotary_dim > self.head_dim {
            return Err(Error::parameter(
                "rotary width",
                self.rotary_dim,
                format!("at most head width {}", self.head_dim),
            ));
        }
        let dense = &self.dense.blocks;
        let blocks = [
            ("dense blocks", dense.as_slice()),
            ("blocks with a window", &self.window.blocks),
            ("blocks without attention", self.recurrent.as_ref().map_or(&[], |recurrent| &recurrent.blocks)),
        ];
        for (name, blocks) in blocks {
            if !blocks.is_sorted_by(|a, b| a < b) || blocks.last().is_some_and(|&last| last >= self.layers) {
                return Err(Error::parameter(name, format!("{blocks:?}"), format!("some of 0..{}", self.layers)));
            }
        }
        if let RopeScaling::Each(each) = &self.rope_scaling
            && each.divisors.len() != self.rotary_dim / 2
        {
            let expected = format!("one for each of {} pairs", self.rotary_dim / 2);
            return Err(Error::parameter("divisors of rotations", each.divisors.len(), expected));
        }
        if !self.window.blocks.is_empty() && self.window.positions == 0 {
            return Err(Error::parameter("positions of a window", 0, "at least 1"));
        }
        if self.latent.is_some() && (self.sinks || !self.window.blocks.is_empty()) {
            return Err(Error::parameter("latent attention", "with sinks or windows", "neither"));
        }
        if let Some(RecurrentBlocks { mixer, .. }) = &self.recurrent {
            mixer.check()?;
            if self.latent.is_some() {
                return Err(Error::parameter("latent attention", "beside blocks without attention", "none there"));
            }
        }
        if dense.len() == self.layers {
            return Err(Error::parameter("dense blocks", "all", "at least one block with experts"));
        }
        if !dense.is_empty() && self.dense.width == 0 {
            return Err(Error::parameter("width of dense blocks", 0, "at least 1"));
        }
        let shared = self.moe.shared.map_or(0, |shared| shared.width);
        let head = self.latent.map_or(self.head_dim, |latent| {
            let LatentSpec { query_rank, kv_rank, key_width, value_width, .. } = latent;
            [self.rotary_dim, kv_rank, key_width, value_width]
                .iter()
                .fold(query_rank.unwrap_or(0), |a, b| a.saturating_add(*b))
        });
        let queries = self.heads.saturating_mul(head);
        let ranks = self.latent.map_or(0, |latent| latent.kv_rank.max(latent.query_rank.unwrap_or(0)));
        let largest = [
            self.vocab,
            self.moe.expert_width,
            queries,
            queries.saturating_mul(ranks),
            self.moe.experts,
            shared,
            self.dense.width,
            self.recurrent.as_ref().map_or(0, |recurrent| recurrent.mixer.channels(self.moe.hidden)),
        ];
        let weights = |width: usize| width.checked_mul(self.moe.hidden)?.checked_mul(6)?.checked_mul(self.layers);
        let countable = |width: &usize| weights(*width).and_then(|count| count.checked_mul(self.moe.experts)).is_some();
        if !largest.iter().all(countable) {
            return Err(Error::parameter("number of weights", "more than can be counted", "sizes of a real model"));
        }
        Ok(())
    }

    /// Radians by which each of `rotary_dim / 2` pairs of a head's numbers turns from position to position (arXiv 2104.09864).
    #[cfg(feature = "model")]
    pub(crate) fn rotation_rates(&self) -> Vec<f32> {
        let slowing = self.rope_scaling.slowing(self.rope_theta, self.rotary_dim);
        let rate = |(pair, slowed): (usize, f64)| {
            slowed as f32 / (self.rope_theta as f32).powf((2 * pair) as f32 / self.rotary_dim as f32)
        };
        slowing.into_iter().enumerate().map(rate).collect()
    }

    /// What products of queries and keys of `width` are multiplied by.
    #[cfg(feature = "model")]
    pub(crate) fn score_scale(&self, width: usize) -> f64 {
        let usual = self.multipliers.attention.unwrap_or((width as f64).powf(-0.5));
        usual * self.rope_scaling.score_scale()
    }

    /// Blocks that have experts, ascending: the MoE layers, which are counted from 0.
    pub fn moe_blocks(&self) -> impl Iterator<Item = usize> {
        (0..self.layers).filter(|block| self.dense.blocks.binary_search(block).is_err())
    }

    /// What stands in the place of attention in a block; `None` where it has that.
    pub(crate) fn recurrent_mixer(&self, block: usize) -> Option<RecurrentMixer> {
        let recurrent = self.recurrent.as_ref()?;
        recurrent.blocks.binary_search(&block).is_ok().then_some(recurrent.mixer)
    }

    /// How many blocks have attention.
    pub(crate) fn attention_blocks(&self) -> usize {
        self.layers - self.recurrent.as_ref().map_or(0, |recurrent| recurrent.blocks.len())
    }

    /// Numbers that are kept of every token of a text: keys and values, or what they come from.
    pub fn kept_numbers_per_token(&self) -> usize {
        let each = match self.latent {
            Some(latent) => latent.kv_rank + self.rotary_dim,
            None => 2 * self.kv_heads * self.head_dim,
        };
        self.attention_blocks() * each
    }

    /// Numbers that are kept of a text however long it is: the states of blocks without attention.
    pub fn state_numbers(&self) -> usize {
        let of = |recurrent: &RecurrentBlocks| {
            recurrent.blocks.len().saturating_mul(recurrent.mixer.state_numbers(self.moe.hidden))
        };
        self.recurrent.as_ref().map_or(0, of)
    }

    /// What the tensors of a block begin with, before a dot.
    pub fn block_prefix(&self, block: usize) -> String {
        format!("{}.layers.{block}", self.names.root)
    }

    /// How many blocks have experts.
    pub(crate) fn moe_layers(&self) -> usize {
        self.layers - self.dense.blocks.len()
    }

    /// Weights of the whole model.
    pub fn parameters(&self) -> usize {
        self.shared_parameters() + self.moe_layers() * self.moe.experts * self.moe.parameters_per_expert()
    }

    /// Weights that one token meets.
    pub fn active_parameters(&self) -> usize {
        let slots = match self.layer_top_k.as_slice() {
            [] => self.moe_layers() * self.moe.top_k,
            each => each.iter().sum(),
        };
        self.shared_parameters() + slots * self.moe.parameters_per_expert()
    }

    /// Weights that every token meets: all but those of the experts it is routed to.
    pub(crate) fn shared_parameters(&self) -> usize {
        let hidden = self.moe.hidden;
        let recurrent =
            self.recurrent.as_ref().map_or(0, |recurrent| recurrent.blocks.len() * recurrent.mixer.parameters(hidden));
        let mixers = self.attention_blocks() * self.attention_parameters() + recurrent;
        let norm = if self.norm == Norm::Layer { 2 * hidden } else { hidden };
        let ffns = self.moe_layers() * self.moe.shared_parameters()
            + self.dense.blocks.len() * self.moe.projections(self.dense.width);
        let embeddings = self.vocab * hidden * if self.tied_embeddings { 1 } else { 2 };
        let output_bias = if self.output_bias { self.vocab } else { 0 };
        embeddings + output_bias + mixers + (2 * self.layers + 1) * norm + ffns
    }

    fn attention_parameters(&self) -> usize {
        let hidden = self.moe.hidden;
        if let Some(latent) = self.latent {
            let queries = self.heads * (latent.key_width + self.rotary_dim);
            let from = latent.query_rank.map_or(hidden * queries, |rank| rank * (hidden + 1 + queries));
            let down = hidden * (latent.kv_rank + self.rotary_dim) + latent.kv_rank;
            let up = latent.kv_rank * self.heads * (latent.key_width + latent.value_width);
            return from + down + up + self.heads * latent.value_width * hidden;
        }
        let (queries, keys) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        let norms = match self.qk_norm {
            Some(QkNorm::Whole) => queries + keys,
            Some(QkNorm::PerHead) => 2 * self.head_dim,
            None => 0,
        };
        let biases = match self.attention_bias {
            AttentionBias::None => 0,
            AttentionBias::Inputs => queries + 2 * keys,
            AttentionBias::All => queries + 2 * keys + hidden,
        };
        let sinks = if self.sinks { self.heads } else { 0 };
        let gates = if self.output_gate { queries } else { 0 };
        let gate_biases = if self.attention_bias == AttentionBias::None { 0 } else { gates };
        hidden * (2 * queries + gates + 2 * keys) + norms + biases + gate_biases + sinks
    }
}
