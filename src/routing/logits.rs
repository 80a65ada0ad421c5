//! Gate logits, checked once: [`Logits`] is a view of a `[tokens, experts]` row-major `f32` slice.
//!
//! Policy for values that are no numbers: −∞ is a mask (the expert may never be chosen for that token), NaN and +∞ are
//! errors. Finite logits of any size are fine, denormal or near `f32::MAX`.
//!
//! ```
//! use phase_moe::Logits;
//!
//! assert!(Logits::new(&[0.5, 2.0, f32::NEG_INFINITY, 1.0, 0.0, -1.0], 2, 3).is_ok());
//! let error = Logits::new(&[0.5, f32::NAN], 1, 2).unwrap_err();
//! assert_eq!(error.to_string(), "logit of token 0, expert 1 is NaN: expected a finite number or -inf (masked)");
//! ```
//!
//! Knows nothing of where the logits come from.

use crate::error::{Error, Result};
use crate::expert::check_expert_count;
use crate::simd::score::all_allowed;
use crate::simd::{Isa, Kernel, Lanes};

/// A checked view of gate logits, `[tokens, experts]` row-major.
#[derive(Clone, Copy, Debug)]
pub struct Logits<'a> {
    values: &'a [f32],
    tokens: usize,
    experts: usize,
}

impl<'a> Logits<'a> {
    /// Checks `values` (length `tokens · experts`) and wraps them; zero tokens are allowed.
    ///
    /// # Errors
    /// [`Error::ExpertCount`], [`Error::Shape`] when the length is not `tokens · experts`,
    /// [`Error::NonFiniteLogit`] for the first NaN or +∞.
    pub fn new(values: &'a [f32], tokens: usize, experts: usize) -> Result<Self> {
        check_expert_count(experts)?;
        if tokens.checked_mul(experts) != Some(values.len()) {
            return Err(Error::shape(
                "logits",
                format!("{tokens} tokens · {experts} experts values"),
                format!("{} values", values.len()),
            ));
        }
        let wrong = |value: &f32| value.is_nan() || *value == f32::INFINITY;
        if !Isa::detect().run(Check(values))
            && let Some(at) = values.iter().position(wrong)
        {
            return Err(Error::NonFiniteLogit { token: at / experts, expert: at % experts, value: values[at] });
        }
        Ok(Self { values, tokens, experts })
    }

    /// Rows.
    pub(crate) fn tokens(&self) -> usize {
        self.tokens
    }

    /// Columns.
    pub(crate) fn experts(&self) -> usize {
        self.experts
    }

    /// All values, row-major.
    pub(crate) fn values(&self) -> &'a [f32] {
        self.values
    }
}

/// Whether no value is NaN or +∞.
struct Check<'a>(&'a [f32]);

impl Kernel for Check<'_> {
    type Output = bool;

    #[inline(always)]
    fn run<L: Lanes>(self, lanes: L) -> bool {
        all_allowed(lanes, self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_length_names_both_sides() {
        let error = Logits::new(&[0.0; 7], 2, 4).unwrap_err();
        assert_eq!(error.to_string(), "logits: expected 2 tokens · 4 experts values, got 7 values");
        assert!(Logits::new(&[], usize::MAX, 3).is_err());
    }

    #[test]
    fn infinities_and_nan_follow_the_policy() {
        assert!(Logits::new(&[f32::NEG_INFINITY; 4], 1, 4).is_ok());
        assert!(Logits::new(&[f32::MAX, f32::MIN, f32::MIN_POSITIVE / 2.0, -0.0], 1, 4).is_ok());
        for bad in [f32::INFINITY, f32::NAN, -f32::NAN] {
            assert!(matches!(
                Logits::new(&[0.0, 0.0, 0.0, bad], 2, 2),
                Err(Error::NonFiniteLogit { token: 1, expert: 1, .. })
            ));
        }
    }

    #[test]
    fn zero_tokens_are_fine_and_zero_experts_are_not() {
        assert_eq!(Logits::new(&[], 0, 4).unwrap().tokens(), 0);
        assert!(matches!(Logits::new(&[], 0, 0), Err(Error::ExpertCount { experts: 0 })));
        assert!(matches!(Logits::new(&[], 0, 65_536), Err(Error::ExpertCount { experts: 65_536 })));
    }
}
