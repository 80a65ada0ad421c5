//! What the engine works on: an expert's weights, of sizes that fit each other, and the tokens that it works for.
//!
//! Knows nothing of how it is done.

use crate::error::{Error, Result};
use crate::experts::activation::Activation;
use crate::experts::matrix::Matrix;
use crate::simd::LANES;
use crate::simd::product::BLOCK;

/// One linear layer, `y = W x + b`.
#[derive(Clone, Copy, Debug)]
pub struct ProjectionWeights<'a> {
    /// `[out, in]`.
    pub weight: Matrix<'a>,
    /// `[out]`.
    pub bias: Option<&'a [f32]>,
}

impl<'a> From<Matrix<'a>> for ProjectionWeights<'a> {
    fn from(weight: Matrix<'a>) -> Self {
        Self { weight, bias: None }
    }
}

impl<'a> ProjectionWeights<'a> {
    /// Sixteen biases from `first` on, as far as there are any.
    pub(super) fn biases(&self, first: usize) -> &'a [f32] {
        let biases = self.bias.and_then(|biases| biases.get(first..)).unwrap_or_default();
        &biases[..biases.len().min(LANES)]
    }
}

/// One linear layer at work: `output[t, r] = Σ_k weight[r, k] · input[t, k] + bias[r]`.
pub(crate) struct Linear<'a> {
    /// `[tokens, columns]`.
    pub(crate) input: Matrix<'a>,
    /// `[rows, columns]`, and `[rows]` of a bias.
    pub(crate) projection: ProjectionWeights<'a>,
    /// `[tokens, rows]`.
    pub(crate) output: &'a mut [f32],
}

impl Linear<'_> {
    pub(super) fn tokens(&self) -> usize {
        self.input.shape()[0]
    }

    pub(super) fn rows(&self) -> usize {
        self.projection.weight.shape()[0]
    }

    /// Rows of weights that one thread does at a time.
    pub(super) fn piece(&self, threads: usize) -> usize {
        self.rows().div_ceil(8 * threads).next_multiple_of(BLOCK).max(BLOCK)
    }

    pub(super) fn check(&self) -> Result<()> {
        let ([tokens, columns], [rows, inner]) = (self.input.shape(), self.projection.weight.shape());
        check_input(self.input)?;
        if inner != columns {
            return Err(Error::shape("weight of a product", format!("{columns} columns"), inner));
        }
        if self.output.len() != tokens * rows {
            return Err(Error::shape("output of a product", format!("{} values", tokens * rows), self.output.len()));
        }
        match self.projection.bias.filter(|bias| bias.len() != rows) {
            Some(bias) => Err(Error::shape("bias of a product", format!("{rows} values"), bias.len())),
            None => Ok(()),
        }
    }
}

/// One expert's weights, of sizes that fit each other.
#[derive(Clone, Copy, Debug)]
pub struct ExpertWeights<'a> {
    pub(super) activation: Activation,
    pub(crate) gate: Option<ProjectionWeights<'a>>,
    pub(crate) up: ProjectionWeights<'a>,
    pub(crate) down: ProjectionWeights<'a>,
}

impl<'a> ExpertWeights<'a> {
    /// An expert with `gate` and `up` `[width, hidden]` and `down` `[hidden, width]`; the gate is there exactly where the
    /// activation has one.
    ///
    /// # Errors
    /// [`Error::Shape`] for sizes that do not fit, a gate too many or too few;
    /// [`Error::Parameter`] for an activation that is none.
    pub fn new(
        activation: Activation,
        gate: Option<ProjectionWeights<'a>>,
        up: ProjectionWeights<'a>,
        down: ProjectionWeights<'a>,
    ) -> Result<Self> {
        activation.check()?;
        let [width, hidden] = up.weight.shape();
        let named = [
            ("gate projection", gate, [width, hidden]),
            ("up projection", Some(up), [width, hidden]),
            ("down projection", Some(down), [hidden, width]),
        ];
        for (name, projection, shape) in named {
            let Some(projection) = projection else { continue };
            if projection.weight.shape() != shape {
                return Err(Error::shape(name, format!("{shape:?}"), format!("{:?}", projection.weight.shape())));
            }
            if let Some(bias) = projection.bias.filter(|bias| bias.len() != shape[0]) {
                return Err(Error::shape(format!("bias of the {name}"), format!("{} values", shape[0]), bias.len()));
            }
        }
        if gate.is_some() != activation.gated {
            let word = |is_there: bool| if is_there { "one" } else { "none" };
            return Err(Error::shape("gate projection", word(activation.gated), word(gate.is_some())));
        }
        Ok(Self { activation, gate, up, down })
    }

    /// Width of the hidden state.
    pub(crate) fn hidden(&self) -> usize {
        self.up.weight.shape()[1]
    }

    /// Width between the projections.
    pub(crate) fn width(&self) -> usize {
        self.up.weight.shape()[0]
    }

    /// Bytes of all projections' weights.
    pub(crate) fn size_in_bytes(&self) -> usize {
        let gate = self.gate.map_or(0, |gate| gate.weight.size_in_bytes());
        gate + self.up.weight.size_in_bytes() + self.down.weight.size_in_bytes()
    }

    /// The gate where it is not of the up projection's dtype.
    pub(super) fn other_gate(&self) -> Option<ProjectionWeights<'a>> {
        self.gate.filter(|gate| gate.weight.dtype() != self.up.weight.dtype())
    }

    /// Whether some of its weights are floats of one dtype and some of another: they multiply floats then, as they do where all were
    /// brought to the widest dtype before.
    pub(super) fn mixes_floats(&self) -> bool {
        let dtypes = [self.gate.unwrap_or(self.up), self.up, self.down].map(|projection| projection.weight.dtype());
        let mut floats = dtypes.into_iter().filter(|dtype| !dtype.is_quantized());
        floats.next().is_some_and(|first| floats.any(|dtype| dtype != first))
    }

    pub(super) fn parameters(&self) -> usize {
        (2 + usize::from(self.gate.is_some())) * self.hidden() * self.width()
    }
}

/// Which tokens an expert works for.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// The expert.
    pub expert: ExpertWeights<'a>,
    /// Its tokens, rows of the input.
    pub tokens: &'a [u32],
    /// What its output counts for each of them.
    pub weights: &'a [f32],
}

fn check_input(input: Matrix<'_>) -> Result<()> {
    match input.dtype().is_quantized() {
        true => Err(Error::shape("input of experts", "f32, f16 or bf16", input.dtype())),
        false => Ok(()),
    }
}

pub(super) fn check(input: Matrix<'_>, work: &[Work<'_>], output: &[f32]) -> Result<()> {
    let [tokens, hidden] = input.shape();
    check_input(input)?;
    if output.len() != tokens * hidden {
        return Err(Error::shape("output of experts", format!("{} values", tokens * hidden), output.len()));
    }
    for Work { expert, tokens: named, weights } in work {
        if expert.hidden() != hidden {
            return Err(Error::shape("hidden width of an expert", hidden, expert.hidden()));
        }
        if named.len() != weights.len() {
            return Err(Error::shape("weights of an expert's tokens", named.len(), weights.len()));
        }
        if let Some(token) = named.iter().find(|&&token| token as usize >= tokens) {
            return Err(Error::parameter("token of an expert", token, format!("below {tokens}")));
        }
    }
    Ok(())
}
