//! Rotary position embedding (arXiv 2104.09864), the two halves of a head rotated against each other, angles in `f32`.

use candle_core::{DType, Device, Tensor};
use candle_nn::rotary_emb::{rope, rope_slow};

use crate::error::Result;
use crate::spec::ModelSpec;

/// Cosines and sines, `[max_positions, head_dim / 2]`.
#[derive(Clone, Debug)]
pub(super) struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    pub(super) fn new(spec: &ModelSpec, device: &Device) -> Result<Self> {
        let half = spec.head_dim / 2;
        let rate = |pair: usize| 1.0 / (spec.rope_theta as f32).powf((2 * pair) as f32 / spec.head_dim as f32);
        let angles: Vec<f32> = (0..spec.max_positions)
            .flat_map(|position| (0..half).map(move |pair| position as f32 * rate(pair)))
            .collect();
        let angles = Tensor::from_vec(angles, (spec.max_positions, half), device)?;
        Ok(Self { cos: angles.cos()?, sin: angles.sin()? })
    }

    /// Rotates `[batch, heads, positions, head_dim]` whose first position is `start`.
    pub(super) fn apply(&self, heads: &Tensor, start: usize) -> Result<Tensor> {
        let positions = heads.dim(2)?;
        let cos = self.cos.narrow(0, start, positions)?.to_dtype(heads.dtype())?;
        let sin = self.sin.narrow(0, start, positions)?.to_dtype(heads.dtype())?;
        debug_assert_eq!(self.cos.dtype(), DType::F32);
        let heads = heads.contiguous()?;
        // As with the norm: the fused rotation has no backward pass.
        Ok(if heads.track_op() { rope_slow(&heads, &cos, &sin)? } else { rope(&heads, &cos, &sin)? })
    }
}
