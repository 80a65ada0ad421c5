//! What recurrent mixers have in common: a convolution over the last few positions, and batches whose sequences end at different ones.
//!
//! Padding goes through no recurrence: a sequence's state is that after its own tokens, whatever is beside it.

use candle_core::{D, Tensor};

use super::kept::Memory;
use crate::error::Result;

/// Runs `mix` over `[sequences, positions, hidden]`, for which it gets the state that each sequence had and leaves the one that it has then:
/// over all sequences together where they are equally long, else over each by itself; zeros for padding. What comes out of it is `width` wide.
pub(super) fn each_sequence(
    hidden: &Tensor,
    width: usize,
    lengths: &[usize],
    memory: &mut Memory,
    mix: impl Fn(&Tensor, &mut Memory) -> Result<Tensor>,
) -> Result<Tensor> {
    let positions = hidden.dim(1)?;
    if lengths.iter().all(|&length| length == positions) {
        return mix(hidden, memory);
    }
    let (mut mixed, mut tails, mut matrices) = (Vec::new(), Vec::new(), Vec::new());
    for (at, &length) in lengths.iter().enumerate() {
        let mut own = Memory {
            tail: memory.tail.narrow(0, at, 1)?,
            matrices: memory.matrices.as_ref().map(|all| all.narrow(0, at, 1)).transpose()?,
        };
        let hidden = hidden.narrow(0, at, 1)?;
        mixed.push(match length {
            0 => Tensor::zeros((1, positions, width), hidden.dtype(), hidden.device())?,
            _ => mix(&hidden.narrow(1, 0, length)?, &mut own)?.pad_with_zeros(1, 0, positions - length)?,
        });
        tails.push(own.tail);
        matrices.extend(own.matrices);
    }
    memory.tail = Tensor::cat(&tails, 0)?;
    memory.matrices = if matrices.is_empty() { None } else { Some(Tensor::cat(&matrices, 0)?) };
    Ok(Tensor::cat(&mixed, 0)?)
}

/// A depthwise convolution over the own position and those before it, of `[sequences, positions, channels]` after the `tail` that it leaves
/// for the next ones; `weight` is `[channels, 1, width]`.
pub(super) fn convolve(input: &Tensor, tail: &mut Tensor, weight: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let (_, positions, _) = input.dims3()?;
    let width = weight.dim(D::Minus1)?;
    let all = if width == 1 { input.clone() } else { Tensor::cat(&[&*tail, input], 1)? };
    *tail = all.narrow(1, positions, width - 1)?.contiguous()?;
    let mut sum: Option<Tensor> = None;
    for at in 0..width {
        let part = all.narrow(1, at, positions)?.broadcast_mul(&weight.narrow(2, at, 1)?.flatten_all()?)?;
        sum = Some(match sum {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    let sum = sum.unwrap_or(all);
    Ok(match bias {
        Some(bias) => sum.broadcast_add(bias)?,
        None => sum,
    })
}
