//! What an expert would add to a token: the size of its output, known exactly or guessed by a linear probe.
//!
//! `worth = gate score · ‖expert(x)‖`: with limits, a slot with a small output may move at little loss, whatever the gate
//! thinks of it. Exact norms take every expert's forward pass over every token, so they are for measuring; a [`Probe`] takes
//! one product as large as the gate's: `‖expert(x)‖ ≈ exp(w_expert · x + b_expert)`, fitted by ridge regression.
//!
//! Shapes: hidden state `[tokens, hidden]` to norms `[tokens, experts]`, row-major `f32`.
//!
//! Knows nothing of routers; combine weights never see it.

use candle_core::{DType, Module, Tensor};

use super::expert::Expert;
use crate::error::{Error, Result};

/// Where the sizes of the experts' outputs come from.
#[derive(Clone, Debug)]
pub enum OutputNorms {
    /// Every expert runs over every token.
    Exact,
    /// A linear guess.
    Probe(Probe),
}

impl OutputNorms {
    /// Norms of the experts' outputs for `tokens`, `[tokens, experts]` row-major; without experts, which are in a cache then, a probe
    /// has to do.
    ///
    /// # Errors
    /// [`Error::Shape`] when a probe is of another layer and for exact norms without experts, [`Error::Candle`] when Candle refuses an operation.
    pub(crate) fn norms(&self, tokens: &Tensor, experts: &[Expert]) -> Result<Vec<f32>> {
        match self {
            Self::Exact if experts.is_empty() => {
                Err(Error::shape("exact output norms", "experts held in memory", "experts in a cache: take a probe"))
            }
            Self::Exact => exact(tokens, experts),
            Self::Probe(probe) if experts.is_empty() => probe.norms(tokens, probe.experts),
            Self::Probe(probe) => probe.norms(tokens, experts.len()),
        }
    }
}

fn exact(tokens: &Tensor, experts: &[Expert]) -> Result<Vec<f32>> {
    let norm = |expert: &Expert| -> Result<Tensor> {
        Ok(expert.forward(&tokens.detach())?.to_dtype(DType::F32)?.sqr()?.sum(1)?.sqrt()?)
    };
    let columns: Vec<Tensor> = experts.iter().map(norm).collect::<Result<_>>()?;
    Ok(Tensor::stack(&columns, 1)?.flatten_all()?.to_vec1()?)
}

/// Smallest norm that is told from none.
const LEAST: f32 = 1e-6;

/// A share of the mean square of the inputs, added to keep the regression sound.
const RIDGE: f64 = 1e-3;

/// `log ‖expert(x)‖` as a linear function of `x`.
#[derive(Clone, Debug, PartialEq)]
pub struct Probe {
    hidden: usize,
    experts: usize,
    /// `[hidden + 1, experts]`, the constant first.
    weights: Vec<f64>,
}

impl Probe {
    fn norms(&self, tokens: &Tensor, experts: usize) -> Result<Vec<f32>> {
        let rows = rows(tokens)?;
        if experts != self.experts || rows.first().is_some_and(|row| row.len() != self.hidden) {
            return Err(Error::shape(
                "probe",
                format!("{experts} experts, the layer's hidden size"),
                format!("{} experts, hidden size {}", self.experts, self.hidden),
            ));
        }
        let mut norms = Vec::with_capacity(rows.len() * experts);
        for row in rows {
            let mut logs = self.weights[..experts].to_vec();
            for (value, weights) in row.iter().zip(self.weights[experts..].chunks_exact(experts)) {
                logs.iter_mut().zip(weights).for_each(|(log, weight)| *log += f64::from(*value) * weight);
            }
            norms.extend(logs.into_iter().map(|log| log.clamp(-60.0, 60.0).exp() as f32));
        }
        Ok(norms)
    }
}

impl From<ProbeFit> for OutputNorms {
    /// Those that the probe of least squared error guesses.
    fn from(fit: ProbeFit) -> Self {
        Self::Probe(fit.solved())
    }
}

/// Sums from which a [`Probe`] is fitted, over any number of batches.
#[derive(Clone, Debug)]
pub struct ProbeFit {
    hidden: usize,
    experts: usize,
    /// Inputs by inputs, with a constant 1 as the first input.
    square: Vec<f64>,
    /// Inputs by experts.
    cross: Vec<f64>,
}

impl ProbeFit {
    /// Nothing seen yet.
    pub fn new(hidden: usize, experts: usize) -> Self {
        let inputs = hidden + 1;
        Self { hidden, experts, square: vec![0.0; inputs * inputs], cross: vec![0.0; inputs * experts] }
    }

    /// Adds what `experts` put out for `tokens`.
    ///
    /// # Errors
    /// [`Error::Shape`] for another number of experts or another hidden size, [`Error::Candle`] when Candle refuses an
    /// operation.
    pub fn add(&mut self, tokens: &Tensor, experts: &[Expert]) -> Result<()> {
        let (rows, inputs) = (rows(tokens)?, self.hidden + 1);
        if experts.len() != self.experts || rows.first().is_some_and(|row| row.len() != self.hidden) {
            let expected = format!("{} experts, hidden size {}", self.experts, self.hidden);
            return Err(Error::shape("probe's layer", expected, format!("{} experts", experts.len())));
        }
        let norms = exact(tokens, experts)?;
        for (row, norms) in rows.iter().zip(norms.chunks_exact(self.experts)) {
            let input = |at: usize| if at == 0 { 1.0 } else { f64::from(row[at - 1]) };
            for at in 0..inputs {
                let value = input(at);
                let line = &mut self.square[at * inputs..(at + 1) * inputs];
                line.iter_mut().enumerate().for_each(|(other, sum)| *sum += value * input(other));
                let line = &mut self.cross[at * self.experts..(at + 1) * self.experts];
                line.iter_mut().zip(norms).for_each(|(sum, norm)| *sum += value * f64::from(norm.max(LEAST)).ln());
            }
        }
        Ok(())
    }

    /// The probe with the least squared error so far.
    fn solved(mut self) -> Probe {
        let (inputs, experts) = (self.hidden + 1, self.experts);
        let trace: f64 = (0..inputs).map(|at| self.square[at * inputs + at]).sum();
        let ridge = (RIDGE * trace / inputs as f64).max(f64::MIN_POSITIVE);
        (0..inputs).for_each(|at| self.square[at * inputs + at] += ridge);
        // Gauss and Jordan; the matrix is symmetric and positive, so no pivots are needed.
        for at in 0..inputs {
            let pivot: Vec<f64> = self.square[at * inputs..(at + 1) * inputs].to_vec();
            let solved: Vec<f64> = self.cross[at * experts..(at + 1) * experts].to_vec();
            for other in (0..inputs).filter(|&other| other != at) {
                let factor = self.square[other * inputs + at] / pivot[at];
                let line = &mut self.square[other * inputs..(other + 1) * inputs];
                line[at..].iter_mut().zip(&pivot[at..]).for_each(|(value, by)| *value -= factor * by);
                let line = &mut self.cross[other * experts..(other + 1) * experts];
                line.iter_mut().zip(&solved).for_each(|(value, by)| *value -= factor * by);
            }
        }
        for at in 0..inputs {
            let pivot = self.square[at * inputs + at];
            self.cross[at * experts..(at + 1) * experts].iter_mut().for_each(|value| *value /= pivot);
        }
        Probe { hidden: self.hidden, experts, weights: self.cross }
    }
}

fn rows(tokens: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(tokens.detach().to_dtype(DType::F32)?.to_vec2()?)
}

#[cfg(test)]
mod tests {
    use candle_core::Device;
    use candle_nn::{VarBuilder, VarMap};

    use super::*;
    use crate::layer::projection::Built;
    use crate::spec::MoeSpec;

    fn experts(spec: &MoeSpec) -> Vec<Expert> {
        let vb = VarBuilder::from_varmap(&VarMap::new(), DType::F32, &Device::Cpu);
        (0..spec.experts)
            .map(|expert| Expert::load_dense(spec, spec.expert_width, vb.pp(expert), &Built).unwrap())
            .collect()
    }

    #[test]
    fn exact_norms_are_those_of_the_outputs() {
        let experts = experts(&MoeSpec::new(8, 3, 1, 16).unwrap());
        let tokens = Tensor::randn(0f32, 1.0, (5, 8), &Device::Cpu).unwrap();
        let norms = OutputNorms::Exact.norms(&tokens, &experts).unwrap();
        let output: Vec<Vec<f32>> = experts[2].forward(&tokens).unwrap().to_vec2().unwrap();
        let norm = output[4].iter().map(|value| value * value).sum::<f32>().sqrt();
        assert!((norms[4 * 3 + 2] - norm).abs() < 1e-5);
    }

    #[test]
    fn a_probe_guesses_better_than_the_mean() {
        let experts = experts(&MoeSpec::new(8, 3, 1, 16).unwrap());
        // Away from zero in one direction, so that there is something linear to find.
        let draw = || {
            let noise = Tensor::randn(0f32, 0.3, (400, 8), &Device::Cpu).unwrap();
            let along = Tensor::rand(0.5f32, 3.0, (400, 1), &Device::Cpu).unwrap();
            noise.broadcast_add(&along).unwrap()
        };
        let mut fit = ProbeFit::new(8, 3);
        (0..3).for_each(|_| fit.add(&draw(), &experts).unwrap());
        let probe = OutputNorms::Probe(fit.solved());
        let tokens = draw();
        let logs = |norms: OutputNorms| -> Vec<f32> {
            norms.norms(&tokens, &experts).unwrap().iter().map(|norm| norm.max(LEAST).ln()).collect()
        };
        let (exact, guess) = (logs(OutputNorms::Exact), logs(probe.clone()));
        for expert in 0..3 {
            let of = |logs: &[f32]| logs.iter().skip(expert).step_by(3).copied().collect::<Vec<f32>>();
            let (exact, guess) = (of(&exact), of(&guess));
            let mean = exact.iter().sum::<f32>() / 400.0;
            let error: f32 = exact.iter().zip(&guess).map(|(a, b)| (a - b).powi(2)).sum();
            let spread: f32 = exact.iter().map(|value| (value - mean).powi(2)).sum();
            assert!(error < 0.5 * spread, "expert {expert}: {error} of {spread}");
        }
        assert!(probe.norms(&Tensor::zeros((2, 4), DType::F32, &Device::Cpu).unwrap(), &experts).is_err());
    }
}
