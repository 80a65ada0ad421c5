//! How a rotation tells positions apart, beside its base: as it is, or slowed down so that a model looks further than it was trained.

/// What becomes of the rates of a rotation.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) enum RopeScaling {
    /// Nothing.
    #[default]
    None,
    /// All are divided by this, which is to divide positions by it.
    Linear(f64),
    /// YaRN.
    Yarn(Yarn),
    /// Llama 3's.
    Llama3(Llama3),
    /// Each is divided by a number of its own (LongRoPE within the positions of the first training, arXiv 2402.13753).
    Each(EachRate),
}

impl RopeScaling {
    /// What cosines and sines are multiplied by.
    pub(crate) fn rotation_scale(&self) -> f64 {
        match self {
            Self::Yarn(yarn) => yarn.rotation_scale,
            Self::Each(each) => each.rotation_scale,
            Self::None | Self::Linear(_) | Self::Llama3(_) => 1.0,
        }
    }

    /// What products of queries and keys are multiplied by, beside the usual.
    pub(crate) fn score_scale(&self) -> f64 {
        match self {
            Self::Yarn(yarn) => yarn.score_scale,
            _ => 1.0,
        }
    }

    /// What the rate of each pair is multiplied by, where `dim` numbers are rotated, `dim / 2` pairs, to the base `theta`.
    pub(crate) fn slowing(&self, theta: f64, dim: usize) -> Vec<f64> {
        let pairs = 0..dim / 2;
        match self {
            Self::None => pairs.map(|_| 1.0).collect(),
            Self::Linear(factor) => pairs.map(|_| 1.0 / factor).collect(),
            Self::Yarn(yarn) => pairs.map(|pair| yarn.slowing(theta, dim, pair)).collect(),
            Self::Llama3(llama) => pairs.map(|pair| llama.slowing(theta, dim, pair)).collect(),
            Self::Each(each) => each.divisors.iter().map(|divisor| 1.0 / divisor).collect(),
        }
    }
}

/// Positions stretched past those that a model was first trained on (YaRN, arXiv 2309.00071).
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Yarn {
    /// How many times as far it now looks.
    pub(crate) factor: f64,
    /// Positions that it was first trained on.
    pub(crate) original_positions: usize,
    /// Turns over those positions above which a rotation stays as fast as it was.
    pub(crate) beta_fast: f64,
    /// Turns below which it is slowed down by the whole factor; in between by a part.
    pub(crate) beta_slow: f64,
    /// What cosines and sines are multiplied by.
    pub(crate) rotation_scale: f64,
    /// What products of queries and keys are multiplied by, beside the usual.
    pub(crate) score_scale: f64,
    /// The part in between begins and ends at whole rotations, as in the paper's code, or wherever it does (gpt-oss).
    pub(crate) whole_rotations: bool,
}

impl Yarn {
    /// 1 where a pair turns often, `1 / factor` where it hardly turns, between them a ramp.
    fn slowing(&self, theta: f64, dim: usize, pair: usize) -> f64 {
        let dim = dim as f64;
        // The pair that turns so many times over the original positions.
        let pair_of = |turns: f64| {
            dim * (self.original_positions as f64 / (turns * std::f64::consts::TAU)).ln() / (2.0 * theta.ln())
        };
        let (low, high) = (pair_of(self.beta_fast), pair_of(self.beta_slow));
        let (low, high) = if self.whole_rotations { (low.floor(), high.ceil()) } else { (low, high) };
        let (low, high) = (low.max(0.0), high.min(dim - 1.0));
        let width = if low == high { 0.001 } else { high - low };
        let ramp = ((pair as f64 - low) / width).clamp(0.0, 1.0);
        ramp / self.factor + 1.0 - ramp
    }
}

/// Positions stretched as Llama 3.1's are (arXiv 2407.21783): by how long a wave is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Llama3 {
    /// How many times slower the longest waves turn.
    pub(crate) factor: f64,
    /// Positions that the model was first trained on.
    pub(crate) original_positions: usize,
    /// Waves longer than the original positions over this are slowed down by the whole factor.
    pub(crate) low_freq_factor: f64,
    /// Waves shorter than the original positions over this stay as they are; above `low_freq_factor`.
    pub(crate) high_freq_factor: f64,
}

impl Llama3 {
    fn slowing(&self, theta: f64, dim: usize, pair: usize) -> f64 {
        let wave = std::f64::consts::TAU * theta.powf((2 * pair) as f64 / dim as f64);
        let waves = self.original_positions as f64 / wave;
        if waves < self.low_freq_factor {
            1.0 / self.factor
        } else if waves > self.high_freq_factor {
            1.0
        } else {
            let smooth = (waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor);
            (1.0 - smooth) / self.factor + smooth
        }
    }
}

/// A divisor for the rate of each pair.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct EachRate {
    /// One for each pair that is rotated; positive.
    pub(crate) divisors: Vec<f64>,
    /// What cosines and sines are multiplied by.
    pub(crate) rotation_scale: f64,
}
