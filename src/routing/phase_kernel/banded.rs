//! The phase kernel for many tokens and few experts, and the router made of it: [`PhaseKernel`], the reference point.
//!
//! Tokens are padded to a multiple of the experts; each expert owns a band of `width = padded tokens / experts` columns of
//! the square [`PhaseRing`]. Source rows have degree `density · padded tokens`, the target rows of expert e have
//! `density · width · share_e / mean share`, so load follows capacity on average. The kernel samples `oversample · top_k`
//! columns a token, of which the first `top_k` distinct experts count: `[tokens, top_k]`, empty where there were fewer.
//! With equal shares this is the reference's uniform dispatch, bit for bit.
//!
//! Knows nothing of what the gate wants. Slots stay empty wherever the sample holds too few distinct experts, and slots past
//! a limit are dropped in order of arrival: it keeps far less than there is room for. [`crate::routing::quota`] is the exact form.

use crate::error::{Error, Result};
use crate::expert::check_expert_count;
use crate::routing::assignment::Assignment;
use crate::routing::drop::{DropRule, keep_within};
use crate::routing::metrics::expert_shares;
use crate::routing::phase_kernel::draws::permutations;
use crate::routing::phase_kernel::ring::{PhaseRing, PhaseSide};
use crate::routing::router::{RouteRequest, RouteState, Router, Scratch};
use crate::routing::slots::{EMPTY, check_top_k};
use crate::routing::stream::layer_seed;

/// The published fused phase kernel in its many-tokens form.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PhaseKernel {
    density: f64,
    oversample: usize,
    seed: u64,
}

impl PhaseKernel {
    /// Density of the published benchmarks and training runs.
    pub(crate) const DEFAULT_DENSITY: f64 = 0.3;
    /// Oversampling of the published training runs.
    pub(crate) const DEFAULT_OVERSAMPLE: usize = 4;

    /// A kernel of this density (share of the ring that a row covers; 0.3 in the published benchmarks and training runs) and
    /// oversampling (sampled columns per slot; 4 there).
    ///
    /// # Errors
    /// [`Error::Parameter`] for a density outside `(0, 1]` or an oversampling of 0.
    pub fn new(density: f64, oversample: usize, seed: u64) -> Result<Self> {
        if !(density > 0.0 && density <= 1.0) {
            return Err(Error::parameter("density", density, "above 0, at most 1"));
        }
        if oversample == 0 {
            return Err(Error::parameter("oversample", oversample, "at least 1"));
        }
        Ok(Self { density, oversample, seed })
    }

    /// The kernel with the published density and oversampling.
    pub(crate) const fn published(seed: u64) -> Self {
        Self { density: Self::DEFAULT_DENSITY, oversample: Self::DEFAULT_OVERSAMPLE, seed }
    }

    /// Experts of every token, `[tokens, top_k]`, −1 where empty; `shares[expert]` are relative capacities.
    ///
    /// # Errors
    /// [`Error::ExpertCount`], [`Error::TopKZero`], [`Error::TopKExceedsExperts`]; [`Error::Parameter`] for a share that is
    /// negative or not finite, and for more tokens than the kernel has columns for.
    pub fn select(&self, tokens: usize, shares: &[f64], top_k: usize) -> Result<Vec<i32>> {
        check_expert_count(shares.len())?;
        check_top_k(top_k, shares.len())?;
        if let Some(bad) = shares.iter().find(|share| !(share.is_finite() && **share >= 0.0)) {
            return Err(Error::parameter("share of an expert", bad, "a finite number, at least 0"));
        }
        let chosen = self.choose(tokens, shares, top_k, self.seed, |_, _| true)?;
        Ok(chosen.into_iter().map(|expert| if expert == EMPTY { -1 } else { i32::from(expert) }).collect())
    }

    /// The same with a seed for the layer, among the experts that `allowed(token, expert)` admits.
    fn choose(
        &self,
        tokens: usize,
        shares: &[f64],
        top_k: usize,
        seed: u64,
        allowed: impl Fn(usize, u16) -> bool,
    ) -> Result<Vec<u16>> {
        let experts = shares.len();
        let width = tokens.div_ceil(experts);
        let padded = width
            .checked_mul(experts)
            .and_then(|padded| u32::try_from(padded).ok())
            .filter(|&padded| i32::try_from(padded).is_ok());
        let padded = padded.ok_or_else(|| Error::parameter("tokens", tokens, format!("at most {}", i32::MAX)))?;
        let mut chosen = vec![EMPTY; tokens * top_k];
        let mean = shares.iter().sum::<f64>() / experts as f64;
        if tokens == 0 || mean <= 0.0 {
            return Ok(chosen);
        }
        let degree = |columns: f64| (columns.round().max(1.0) as u32).min(padded);
        let band = |share: &f64| std::iter::repeat_n(degree(share / mean * self.density * width as f64), width);

        let [source_order, target_order] = permutations(padded, seed);
        let source_degree = degree(self.density * f64::from(padded));
        let sources = PhaseSide::new(vec![source_degree; padded as usize], source_order)?;
        let targets = PhaseSide::new(shares.iter().flat_map(band).collect(), target_order)?;
        let sampled = top_k.saturating_mul(self.oversample).max(top_k + 1).min(padded as usize);
        let columns = PhaseRing::new(sources, targets)?.route_first(tokens, sampled, seed)?;

        for (token, (chosen, columns)) in chosen.chunks_exact_mut(top_k).zip(columns.chunks_exact(sampled)).enumerate()
        {
            let mut count = 0;
            for &column in columns.iter().filter(|&&column| column >= 0) {
                let expert = (column as usize / width) as u16;
                if count < top_k && !chosen[..count].contains(&expert) && allowed(token, expert) {
                    chosen[count] = expert;
                    count += 1;
                }
            }
        }
        Ok(chosen)
    }
}

impl Router for PhaseKernel {
    fn name(&self) -> &'static str {
        "phase-kernel"
    }

    fn route_into(
        &self,
        request: &RouteRequest<'_>,
        _state: &mut RouteState,
        _scratch: &mut Scratch,
        assignment: &mut Assignment,
    ) -> Result<()> {
        let (scores, top_k) = (request.scores(), request.top_k());
        let live: Vec<usize> = (0..scores.tokens()).filter(|&token| !request.is_padding(token)).collect();
        let shares = expert_shares(request.capacity());
        let seed = layer_seed(self.seed, request.context().layer);
        let allowed = |row: usize, expert: u16| scores.is_allowed(live[row], usize::from(expert));
        let rows = self.choose(live.len(), &shares, top_k, seed, allowed)?;
        let mut chosen = vec![EMPTY; scores.tokens() * top_k];
        for (row, &token) in rows.chunks_exact(top_k).zip(&live) {
            chosen[token * top_k..(token + 1) * top_k].copy_from_slice(row);
        }
        let kept = keep_within(DropRule::Arrival, &chosen, request);
        *assignment = Assignment::from_chosen(scores, top_k, chosen, Some(&kept));
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::ring::tests::{cases, naive};
    use super::*;
    use proptest::prelude::*;

    /// The oracle: the square kernel from its matrices, each column named by its band, repeats passed over.
    fn naive_bands(kernel: PhaseKernel, tokens: usize, shares: &[f64], top_k: usize) -> Vec<i32> {
        let experts = shares.len();
        let mut padded = tokens;
        while !padded.is_multiple_of(experts) {
            padded += 1;
        }
        let (width, total) = (padded / experts, shares.iter().sum::<f64>());
        if tokens == 0 || total == 0.0 {
            return vec![-1; tokens * top_k];
        }
        let degree = |columns: f64| (columns.round() as u32).clamp(1, padded as u32);
        let sources = vec![degree(kernel.density * padded as f64); padded];
        let share = |column: usize| shares[column / width] / (total / experts as f64);
        let targets: Vec<u32> =
            (0..padded).map(|column| degree(share(column) * kernel.density * width as f64)).collect();
        let [source_order, target_order] = permutations(padded as u32, kernel.seed);
        let sampled = (top_k * kernel.oversample).max(top_k + 1).min(padded);
        let columns = naive([&sources, &targets], [&source_order, &target_order], sampled, kernel.seed);
        let row = |token: usize| {
            let mut row: Vec<i32> = Vec::new();
            for &column in columns[token * sampled..(token + 1) * sampled].iter().filter(|&&column| column >= 0) {
                let expert = column / width as i32;
                if !row.contains(&expert) {
                    row.push(expert);
                }
            }
            row.resize(row.len().max(top_k), -1);
            row.truncate(top_k);
            row
        };
        (0..tokens).flat_map(row).collect()
    }

    proptest! {
        #![proptest_config(cases(1_000))]
        #[test]
        fn bands_match_the_matrices(
            tokens in prop_oneof![3 => 0usize..65, 1 => 0usize..300],
            shares in prop::collection::vec(prop_oneof![4 => 0.1f64..8.0, 2 => Just(1.0), 1 => Just(0.0)], 1..40),
            top_k in 1usize..9,
            density in prop_oneof![Just(0.3), 0.001f64..=1.0],
            oversample in 1usize..6,
            seed: u64,
        ) {
            let top_k = top_k.min(shares.len());
            let kernel = PhaseKernel::new(density, oversample, seed).unwrap();
            prop_assert_eq!(kernel.select(tokens, &shares, top_k).unwrap(), naive_bands(kernel, tokens, &shares, top_k));
        }
    }

    #[test]
    fn equal_shares_match_the_reference_bit_for_bit() {
        // From `tests/goldens/phase_kernel_digests.py`, and before that from the reference itself on rand 0.8.8.
        let golden = [
            (16, 4, 2, 1, 0x6ebd_e8f9_7e90_ed03u64),
            (1000, 8, 2, 42, 0xb9b6_a903_14c9_9160),
            (4096, 64, 8, 42, 0x0074_2110_3098_31e3),
            (4096, 128, 8, 42, 0xa89a_3cb0_3adb_3812),
            (1, 8, 2, 42, 0x3cd0_2a86_2a57_4321),
        ];
        for (tokens, experts, top_k, seed, expected) in golden {
            let chosen = PhaseKernel::published(seed).select(tokens, &vec![1.0; experts], top_k).unwrap();
            let bytes = chosen.iter().flat_map(|expert| expert.to_le_bytes());
            let digest =
                bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
            assert_eq!(digest, expected, "{tokens} tokens, {experts} experts");
        }
    }

    #[test]
    fn empty_slots_come_out_as_measured() {
        let empty = |experts: usize| {
            let chosen = PhaseKernel::published(42).select(4096, &vec![1.0; experts], 8).unwrap();
            chosen.iter().filter(|&&expert| expert < 0).count() as f64 / chosen.len() as f64
        };
        assert!((empty(64) - 0.30).abs() < 0.01);
        assert!((empty(128) - 0.62).abs() < 0.01);
    }

    #[test]
    fn settings_outside_their_domain_are_named() {
        for bad in [0.0, -0.1, 1.1, f64::NAN] {
            assert!(PhaseKernel::new(bad, 4, 0).unwrap_err().to_string().starts_with("density is "));
        }
        assert_eq!(PhaseKernel::new(0.3, 0, 0).unwrap_err().to_string(), "oversample is 0: expected at least 1");
        let kernel = PhaseKernel::published(0);
        let message = |shares: &[f64], top_k| kernel.select(4, shares, top_k).unwrap_err().to_string();
        assert_eq!(message(&[1.0, -1.0], 1), "share of an expert is -1: expected a finite number, at least 0");
        assert_eq!(message(&[1.0], 2), "top_k 2 exceeds experts 1");
        assert_eq!(message(&[1.0], 0), "top_k is 0: expected at least 1");
        assert!(matches!(kernel.select(4, &[], 1), Err(Error::ExpertCount { experts: 0 })));
        assert!(matches!(kernel.select(usize::MAX / 4, &[1.0], 1), Err(Error::Parameter { .. })));
        assert_eq!(kernel.select(2, &[0.0, 0.0], 1).unwrap(), [-1, -1]);
    }
}
