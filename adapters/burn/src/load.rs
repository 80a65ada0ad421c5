//! Loading a layer from a model's files: every MoE block of every family that `phase_moe::zoo` knows, in Hugging Face layout or as GGUF, its
//! experts one by one or stacked.
//!
//! Which tensor is which, and how it lies in its file, is for [`Weights`] to say.

use std::sync::Arc;

use burn::module::Param;
use burn::tensor::{DType, Device, Tensor, TensorData};
use phase_moe::{Error, ExpertCache, MoeSpec, Result, Weights};

use crate::config::MoeConfig;
use crate::expert::{Expert, Projection};
use crate::gate::Gate;
use crate::layer::{Moe, Settings};

/// Numbers of one layer, on their way to a device.
struct Loader<'a> {
    weights: &'a Weights,
    /// `model.layers.3.mlp`
    prefix: &'a str,
    dtype: DType,
    device: &'a Device,
}

impl Moe {
    /// MoE layer `layer` of a model, counted without blocks that have no experts: its weights in `dtype` on `device`. It routes by dropless
    /// top-k until told otherwise.
    ///
    /// ```no_run
    /// use burn::tensor::{DType, Device};
    /// use phase_moe_burn::{Moe, Weights};
    ///
    /// let weights = Weights::open("OLMoE-1B-7B-0924".as_ref())?;
    /// let layer = Moe::load(&weights, 0, DType::BF16, &Device::flex())?;
    /// # Ok::<(), phase_moe_burn::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Weights::spec`] and [`Moe::load_block`]; [`Error::ExpertOutOfRange`] for a layer that is not there.
    pub fn load(weights: &Weights, layer: usize, dtype: DType, device: &Device) -> Result<Self> {
        let (spec, prefix) = place(weights, layer)?;
        Ok(Self::load_block(weights, spec, &prefix, dtype, device)?.with_index(layer))
    }

    /// The same with its experts in a cache, which reads them from their files, in the type that they have there. Such a layer runs on Flex
    /// without autodiff; its records hold all but the experts.
    ///
    /// # Errors
    /// As [`Moe::load`], and [`Error::Shape`] for a cache of another model.
    pub fn load_cached(
        weights: &Weights,
        layer: usize,
        cache: &Arc<ExpertCache>,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let (spec, prefix) = place(weights, layer)?;
        let load = Loader::new(weights, &prefix, dtype, device)?;
        let mut settings = MoeConfig::of(spec.clone()).settings()?;
        settings.cached = Some(weights.cached_experts(cache, layer)?);
        Ok(load.layer(settings, Vec::new())?.with_index(layer))
    }

    /// A layer that `spec` describes and whose tensors' names begin with `prefix` and a dot: one of a checkpoint of your own, or of a family whose MoE
    /// layer alone is known (`phase_moe::zoo::parse_moe_config`).
    ///
    /// # Errors
    /// Those of [`MoeConfig::try_init`], [`Weights::experts`] and [`Weights::floats`]; [`Error::Parameter`] for a type that is no float.
    pub fn load_block(weights: &Weights, spec: &MoeSpec, prefix: &str, dtype: DType, device: &Device) -> Result<Self> {
        let settings = MoeConfig::of(spec.clone()).settings()?;
        let load = Loader::new(weights, prefix, dtype, device)?;
        let (inner, outer) = ([spec.expert_width, spec.hidden], [spec.hidden, spec.expert_width]);
        let missing = || Error::shape("expert", "up and down projection", "none");
        let expert = |parts: Result<[Option<_>; 3]>| {
            let [gate, up, down] = parts?;
            Ok(Expert {
                gate_proj: gate.map(|gate| load.projection(gate, inner)),
                up_proj: load.projection(up.ok_or_else(missing)?, inner),
                down_proj: load.projection(down.ok_or_else(missing)?, outer),
            })
        };
        load.layer(settings, weights.experts(spec, prefix)?.map(expert).collect::<Result<_>>()?)
    }
}

/// What MoE layer `layer` of a model is, and where.
fn place(weights: &Weights, layer: usize) -> Result<(&MoeSpec, String)> {
    let model = weights.spec()?;
    let block = model.moe_blocks().nth(layer).ok_or_else(|| Error::ExpertOutOfRange {
        operand: "MoE layers".into(),
        id: i64::try_from(layer).unwrap_or(i64::MAX),
        expected: format!("one of {}", model.moe_blocks().count()),
    })?;
    Ok((&model.moe, format!("{}.{}", model.block_prefix(block), model.ffn)))
}

impl<'a> Loader<'a> {
    fn new(weights: &'a Weights, prefix: &'a str, dtype: DType, device: &'a Device) -> Result<Self> {
        if !dtype.is_float() {
            let (got, expected) = (format!("{dtype:?}"), "a float type".into());
            return Err(Error::Parameter { name: "dtype of a layer", got, expected });
        }
        Ok(Self { weights, prefix, dtype, device })
    }

    /// All but the experts, which are these.
    fn layer(&self, settings: Settings, experts: Vec<Expert>) -> Result<Moe> {
        let (spec, load) = (settings.spec.clone(), self);
        let names = &spec.names;
        let shared_expert = |width: usize| {
            let projection = |name: &str, shape: [usize; 2]| load.linear(&format!("{}.{name}", names.shared), shape);
            Ok::<_, Error>(Expert {
                gate_proj: spec
                    .activation
                    .gated
                    .then(|| projection(&names.gate_proj, [width, spec.hidden]))
                    .transpose()?,
                up_proj: projection(&names.up_proj, [width, spec.hidden])?,
                down_proj: projection(&names.down_proj, [spec.hidden, width])?,
            })
        };
        let shared_gate = || load.linear(&names.shared_gate, [1, spec.hidden]);
        let numbers = |name: &str| load.numbers(name, &[spec.experts]);
        let gate_bias = || Ok::<_, Error>(load.bias(numbers(&format!("{}.bias", names.gate))?));
        // Always in f32, as it is added to scores.
        let selection_bias = || {
            let bias = numbers(&names.selection_bias)?;
            let bias = Tensor::from_data(TensorData::new(bias, [spec.experts]), (load.device, DType::F32));
            Ok::<_, Error>(Param::from_tensor(bias).set_require_grad(false))
        };
        Ok(Moe {
            gate: Gate {
                weight: load.linear(&names.gate, [spec.experts, spec.hidden])?.weight,
                bias: spec.gate_bias.then(gate_bias).transpose()?,
                e_score_correction_bias: spec.selection_bias.then(selection_bias).transpose()?,
            },
            experts,
            shared_expert: spec.shared.map(|shared| shared_expert(shared.width)).transpose()?,
            shared_expert_gate: spec.shared.filter(|shared| shared.gated).map(|_| shared_gate()).transpose()?,
            settings,
        })
    }

    fn numbers(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        self.weights.floats(&format!("{}.{name}", self.prefix), shape)
    }

    fn linear(&self, name: &str, shape: [usize; 2]) -> Result<Projection> {
        Ok(self.projection((self.numbers(&format!("{name}.weight"), &shape)?, Vec::new()), shape))
    }

    /// Without numbers of a bias it has none.
    fn projection(&self, (weight, bias): (Vec<f32>, Vec<f32>), shape: [usize; 2]) -> Projection {
        let weight = Tensor::from_data(TensorData::new(weight, shape), (self.device, self.dtype));
        Projection { weight: Param::from_tensor(weight), bias: (!bias.is_empty()).then(|| self.bias(bias)) }
    }

    fn bias(&self, bias: Vec<f32>) -> Param<Tensor<1>> {
        let size = bias.len();
        Param::from_tensor(Tensor::from_data(TensorData::new(bias, [size]), (self.device, self.dtype)))
    }
}
