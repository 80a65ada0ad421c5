//! One MoE block with random weights, run by this crate's layer and by the loop over experts that candle-transformers 0.11.1
//! writes in `qwen3_moe.rs`, both over the same weights.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{D, DType, Module, Result, Tensor};
use candle_nn::Linear;
use candle_nn::ops::softmax_last_dim;
use phase_moe::{Expert, Gate, MoeLayer, MoeSpec};

use super::fill::{Blocks, mxfp4, uniform};
use super::shape::{Format, Shape};

/// An expert as Candle's models have it.
struct CandleExpert {
    gate: Box<dyn Module>,
    up: Box<dyn Module>,
    down: Box<dyn Module>,
}

impl CandleExpert {
    fn forward(&self, rows: &Tensor) -> Result<Tensor> {
        self.down.forward(&(self.gate.forward(rows)?.silu()? * self.up.forward(rows)?)?)
    }
}

/// What Candle has for a format that it does not have.
struct Nothing;

impl Module for Nothing {
    fn forward(&self, _: &Tensor) -> Result<Tensor> {
        candle_core::bail!("no such format")
    }
}

/// Weights that both sides share.
pub struct Block {
    shape: Shape,
    format: Format,
    seed: u64,
    gate: Tensor,
    experts: Vec<CandleExpert>,
    layer: MoeLayer,
}

impl Block {
    pub fn random(shape: Shape, format: Format, seed: u64) -> Result<Self> {
        let Shape { hidden, width, experts, top_k, .. } = shape;
        if !format.fits(shape) {
            candle_core::bail!("rows of {hidden} and {width} are no whole blocks of {}", format.name);
        }
        let gate = uniform(format.activations(), experts, hidden, 1.0 / hidden as f32, seed << 32)?;
        let weights = Weights::new(shape, format)?;
        let seeds = (0..experts as u64).map(|expert| seed << 32 | (expert + 1) << 8);
        let (ours, theirs): (Vec<_>, Vec<_>) =
            seeds.map(|seed| weights.expert(seed)).collect::<Result<Vec<_>>>()?.into_iter().unzip();
        let layer = MoeLayer::new(MoeSpec::new(hidden, experts, top_k, width)?, Gate::new(gate.clone()), ours, None)?;
        Ok(Self { shape, format, seed, gate, experts: theirs, layer })
    }

    /// This crate's layer.
    pub fn layer(&self) -> &MoeLayer {
        &self.layer
    }

    /// The loop of candle-transformers, `norm_topk_prob` off; the gate's softmax in f32 as in this crate.
    pub fn candle_loop(&self, tokens: &Tensor) -> Result<Tensor> {
        let scores = softmax_last_dim(&tokens.matmul(&self.gate.t()?)?.to_dtype(DType::F32)?)?;
        let experts = scores.arg_sort_last_dim(false)?.narrow(D::Minus1, 0, self.shape.top_k)?.contiguous()?;
        let weights = scores.gather(&experts, D::Minus1)?.to_vec2::<f32>()?;
        let (mut rows_of, mut weights_of) = (vec![vec![]; self.shape.experts], vec![vec![]; self.shape.experts]);
        for (row, (weights, experts)) in weights.iter().zip(experts.to_vec2::<u32>()?).enumerate() {
            for (&weight, expert) in weights.iter().zip(experts) {
                rows_of[expert as usize].push(row as u32);
                weights_of[expert as usize].push(weight);
            }
        }
        let mut output = tokens.zeros_like()?;
        for (expert, (rows, weights)) in self.experts.iter().zip(rows_of.iter().zip(&weights_of)) {
            if rows.is_empty() {
                continue;
            }
            let rows = Tensor::new(rows.as_slice(), tokens.device())?;
            let weights = Tensor::new(weights.as_slice(), tokens.device())?.reshape(((), 1))?;
            let result = expert.forward(&tokens.index_select(&rows, 0)?)?;
            let result = result.broadcast_mul(&weights.to_dtype(tokens.dtype())?)?;
            output = output.index_add(&rows, &result, 0)?;
        }
        Ok(output)
    }

    /// Inputs `[tokens, hidden]` to take turns with. Single tokens are dealt their experts like cards, so that every expert
    /// had its turn before one is touched again; more tokens choose as noise does.
    pub fn inputs(&self, tokens: usize) -> Result<Vec<Tensor>> {
        let Shape { hidden, experts, top_k, .. } = self.shape;
        let noise = |variance, turn: usize| {
            uniform(DType::F32, tokens, hidden, variance, self.seed << 32 | (turn as u64 + 1) << 20)
        };
        let dealt = |turn: usize| {
            let cards = self.gate.narrow(0, turn * top_k, top_k)?.to_dtype(DType::F32)?;
            noise(0.1, turn)?.broadcast_add(&(cards.sum_keepdim(0)? * 4.0)?)
        };
        let inputs: Result<Vec<_>> = match tokens {
            1 => (0..experts / top_k).map(dealt).collect(),
            _ => (0..2).map(|turn| noise(1.0, turn)).collect(),
        };
        inputs?.iter().map(|input| input.to_dtype(self.format.activations())).collect()
    }

    /// Gate logits of every token with their experts, highest first, in f32.
    pub fn ranked(&self, input: &Tensor) -> Result<Vec<Vec<(f32, usize)>>> {
        let logits = input.to_dtype(DType::F32)?.matmul(&self.gate.to_dtype(DType::F32)?.t()?)?;
        let ranked = logits.to_vec2::<f32>()?.into_iter().map(|row| {
            let mut row: Vec<_> = row.into_iter().zip(0..).collect();
            row.sort_by(|a, b| b.0.total_cmp(&a.0));
            row
        });
        Ok(ranked.collect())
    }

    /// A comparison of times means nothing unless both sides compute the same. Tokens whose choice of experts hangs on
    /// rounding are left out.
    ///
    /// # Panics
    /// When the outputs differ.
    pub fn check_equal(&self, input: &Tensor, ours: &Tensor, theirs: &Tensor) -> Result<()> {
        let values = |tensor: &Tensor| tensor.to_dtype(DType::F32)?.to_vec2::<f32>();
        let (Shape { name, top_k, .. }, Format { name: dtype, .. }) = (self.shape, self.format);
        let (mut compared, mut worst, mut largest) = (0, 0f32, 0f32);
        for ((ours, theirs), ranked) in values(ours)?.iter().zip(values(theirs)?).zip(self.ranked(input)?) {
            if ranked[top_k - 1].0 - ranked[top_k].0 > self.format.rounding() {
                compared += 1;
                for (a, b) in ours.iter().zip(theirs) {
                    // A NaN must not get lost in a maximum.
                    assert!(a.is_finite() && b.is_finite(), "{name}, {dtype}: an output is not finite");
                    worst = worst.max((a - b).abs());
                    largest = largest.max(b.abs());
                }
            }
        }
        assert!(compared > 0, "{name}, {dtype}: no token to compare");
        let tolerance = self.format.tolerance() * largest;
        assert!(worst <= tolerance, "{name}, {dtype}: the two sides differ by {worst}, largest value {largest}");
        Ok(())
    }
}

/// Where a block's experts come from.
struct Weights {
    shape: Shape,
    format: Format,
    /// For matrices of `hidden` and of `width` columns.
    blocks: Option<[Blocks; 2]>,
}

impl Weights {
    fn new(shape: Shape, format: Format) -> Result<Self> {
        let blocks = match format.dtype.filter(|_| format.is_quantised()) {
            Some(dtype) => Some([Blocks::new(dtype, shape.hidden)?, Blocks::new(dtype, shape.width)?]),
            None => None,
        };
        Ok(Self { shape, format, blocks })
    }

    /// One expert for either side.
    fn expert(&self, seed: u64) -> Result<(Expert, CandleExpert)> {
        let Shape { hidden, width, .. } = self.shape;
        if self.format.dtype.is_none() {
            let (gate, up) = (mxfp4(width, hidden, seed)?, mxfp4(width, hidden, seed + 1)?);
            let ours = Expert::new(gate, up, mxfp4(hidden, width, seed + 2)?);
            let [gate, up, down] = [(); 3].map(|()| Box::new(Nothing) as Box<dyn Module>);
            return Ok((ours, CandleExpert { gate, up, down }));
        }
        if let Some([wide, narrow]) = &self.blocks {
            let [gate, up, down] =
                [wide.matrix(width, seed)?, wide.matrix(width, seed + 1)?, narrow.matrix(hidden, seed + 2)?];
            let product =
                |weight: &Arc<QTensor>| Ok::<_, candle_core::Error>(Box::new(QMatMul::from_arc(weight.clone())?));
            let theirs = CandleExpert { gate: product(&gate)?, up: product(&up)?, down: product(&down)? };
            return Ok((Expert::new(gate, up, down), theirs));
        }
        let random =
            |rows, columns, seed| uniform(self.format.activations(), rows, columns, 1.0 / columns as f32, seed);
        let [gate, up, down] =
            [random(width, hidden, seed)?, random(width, hidden, seed + 1)?, random(hidden, width, seed + 2)?];
        let product = |weight: &Tensor| Box::new(Linear::new(weight.clone(), None));
        let theirs = CandleExpert { gate: product(&gate), up: product(&up), down: product(&down) };
        Ok((Expert::new(gate, up, down), theirs))
    }
}
