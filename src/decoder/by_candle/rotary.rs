//! Rotary position embedding (arXiv 2104.09864), the two halves of a head's front or its neighbours rotated against each
//! other, angles in `f32`.

use candle_core::{D, DType, Device, Tensor};
use candle_nn::rotary_emb::{rope, rope_i, rope_i_slow, rope_slow};

use crate::error::Result;
use crate::spec::ModelSpec;

/// Cosines and sines of the positions of one forward pass: `[positions, rotary_dim / 2]`, or where sequences begin at different ones
/// `[sequences, positions, rotary_dim / 2]`.
#[derive(Clone, Debug)]
pub(super) struct Rotary {
    cos: Tensor,
    sin: Tensor,
}

impl Rotary {
    /// For `positions` positions of each sequence from its start on, to rotate heads of `dtype`.
    pub(super) fn new(
        spec: &ModelSpec,
        starts: &[usize],
        positions: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let half = spec.rotary_dim / 2;
        let rates = spec.rotation_rates();
        let alike = starts.windows(2).all(|pair| pair[0] == pair[1]);
        let starts = if alike { &starts[..starts.len().min(1)] } else { starts };
        let angles: Vec<f32> = starts
            .iter()
            .flat_map(|&start| start..start + positions)
            .flat_map(|position| rates.iter().map(move |rate| position as f32 * rate))
            .collect();
        let angles = match alike {
            true => Tensor::from_vec(angles, (positions, half), device)?,
            false => Tensor::from_vec(angles, (starts.len(), positions, half), device)?,
        };
        let scale = spec.rope_scaling.rotation_scale();
        let scaled = |tensor: Tensor| (tensor * scale)?.to_dtype(dtype);
        Ok(Self { cos: scaled(angles.cos()?)?, sin: scaled(angles.sin()?)? })
    }

    /// Rotates the front of `[batch, heads, positions, head_dim]`, the halves of it against each other.
    pub(super) fn apply(&self, heads: &Tensor) -> Result<Tensor> {
        let (width, rotated) = (heads.dim(D::Minus1)?, 2 * self.cos.dim(D::Minus1)?);
        if rotated < width {
            let front = self.apply(&heads.narrow(D::Minus1, 0, rotated)?)?;
            let rest = heads.narrow(D::Minus1, rotated, width - rotated)?;
            // Joined along the last dimension it would be a view, which a cache of keys does not take.
            return Ok(Tensor::cat(&[&front, &rest], D::Minus1)?.contiguous()?);
        }
        let heads = heads.contiguous()?;
        // As with the norm: the fused rotation has no backward pass.
        Ok(match heads.track_op() {
            true => self.each(&heads, rope_slow)?,
            false => rope(&heads, &self.cos, &self.sin)?,
        })
    }

    /// Rotates `[batch, heads, positions, rotary_dim]`, each number against its neighbour.
    pub(super) fn apply_pairs(&self, heads: &Tensor) -> Result<Tensor> {
        let heads = heads.contiguous()?;
        Ok(match heads.track_op() {
            true => self.each(&heads, rope_i_slow)?,
            false => rope_i(&heads, &self.cos, &self.sin)?,
        })
    }
}

impl Rotary {
    /// A rotation that takes the same positions for all sequences, of each by itself where they differ.
    fn each(
        &self,
        heads: &Tensor,
        rotate: impl Fn(&Tensor, &Tensor, &Tensor) -> candle_core::Result<Tensor>,
    ) -> Result<Tensor> {
        if self.cos.rank() == 2 {
            return Ok(rotate(heads, &self.cos, &self.sin)?);
        }
        let rotated =
            (0..heads.dim(0)?).map(|row| rotate(&heads.narrow(0, row, 1)?, &self.cos.get(row)?, &self.sin.get(row)?));
        Ok(Tensor::cat(&rotated.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
    }
}
