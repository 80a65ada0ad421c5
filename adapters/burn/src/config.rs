//! What a layer is, as plain data that is saved and loaded with a model's own configuration: [`MoeConfig`].

use std::sync::{Arc, LazyLock};

use burn::config::Config;
use burn::nn::Initializer;
use burn::tensor::{Device, Tensor};
use phase_moe::routing::LayerRouter;
use phase_moe::{CapacityRule, Engine, MoeSpec, Result, RouterKind};
use serde::{Deserialize, Serialize};

use crate::expert::{Expert, Projection};
use crate::gate::Gate;
use crate::layer::{Moe, Settings};

/// What an [`Moe`] is made of; a Burn [`Config`], so that it may be part of another one.
///
/// ```
/// use burn::tensor::Device;
/// use phase_moe_burn::{CapacityRule, MoeConfig, RouterKind};
///
/// // Width 64, experts of width 128, 8 of them, 2 a token; four devices take a quarter of the slots each.
/// let config = MoeConfig::new(64, 128, 8, 2).with_router(RouterKind::Phase).with_capacity(CapacityRule::per_device(1.0, 4));
/// let layer = config.init(&Device::flex());
/// # let _ = layer;
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MoeConfig {
    /// Sizes, what the experts are, biases, shared experts, scoring. Its names count for checkpoints alone.
    pub spec: MoeSpec,
    /// The router; one that is not among these is given to the layer, [`Moe::with_router`].
    pub router: RouterKind,
    /// How much room there is in a batch; `None` for no limit.
    pub capacity: Option<CapacityRule>,
    /// What the router draws from, where it draws.
    pub seed: u64,
    /// How weights are made; biases are 0.
    pub initializer: Initializer,
}

/// What all layers run on: they work in the same memory, one after the other.
static ENGINE: LazyLock<Arc<Engine>> = LazyLock::new(Arc::default);

impl Config for MoeConfig {}

impl MoeConfig {
    /// A layer of `experts` SwiGLU experts of width `width` over a hidden state of width `hidden`, `top_k` of them a token: softmax scores,
    /// dropless top-k. Sizes are checked by [`MoeConfig::init`].
    pub fn new(hidden: usize, width: usize, experts: usize, top_k: usize) -> Self {
        // Checked sizes in the place of those that are not, which `init` refuses.
        let spec = MoeSpec::new(1, 1, 1, 1).unwrap_or_else(|_| unreachable!("a layer of one expert"));
        Self::of(MoeSpec { hidden, experts, top_k, expert_width: width, ..spec })
    }

    /// A layer as `spec` says, which may have shared experts, biases and other activations and scores; dropless top-k.
    pub fn of(spec: MoeSpec) -> Self {
        let initializer = Initializer::KaimingUniform { gain: 1.0 / 3f64.sqrt(), fan_out_only: false };
        Self { spec, router: RouterKind::TopK, capacity: None, seed: 0, initializer }
    }

    /// The same with this router.
    pub fn with_router(self, router: RouterKind) -> Self {
        Self { router, ..self }
    }

    /// The same within these limits.
    pub fn with_capacity(self, capacity: CapacityRule) -> Self {
        Self { capacity: Some(capacity), ..self }
    }

    /// The same with weights made so.
    pub fn with_initializer(self, initializer: Initializer) -> Self {
        Self { initializer, ..self }
    }

    /// A layer on `device`, in its default float type, with random weights.
    ///
    /// # Panics
    /// Where [`MoeConfig::try_init`] gives an error, as Burn's modules do.
    pub fn init(&self, device: &Device) -> Moe {
        self.try_init(device).unwrap_or_else(|error| panic!("MoeConfig: {error}"))
    }

    /// The same, or what is wrong with the configuration.
    ///
    /// # Errors
    /// [`Error::ExpertCount`](phase_moe::Error::ExpertCount), [`Error::TopKZero`](phase_moe::Error::TopKZero),
    /// [`Error::TopKExceedsExperts`](phase_moe::Error::TopKExceedsExperts), [`Error::Parameter`](phase_moe::Error::Parameter) for a width of 0,
    /// [`Error::CapacityIgnored`](phase_moe::Error::CapacityIgnored) for limits and a router that keeps within none.
    pub fn try_init(&self, device: &Device) -> Result<Moe> {
        let spec = &self.spec;
        let settings = self.settings()?;
        let weight = |rows: usize, columns: usize| {
            self.initializer.init_with::<2, _>([rows, columns], Some(columns), Some(rows), device)
        };
        let zeros = |size: usize| burn::module::Param::from_tensor(Tensor::<1>::zeros([size], device));
        let projection = |rows: usize, columns: usize, bias: bool| Projection {
            weight: weight(rows, columns),
            bias: bias.then(|| zeros(rows)),
        };
        let expert = |width: usize, bias: bool| Expert {
            gate_proj: spec.activation.gated.then(|| projection(width, spec.hidden, bias)),
            up_proj: projection(width, spec.hidden, bias),
            down_proj: projection(spec.hidden, width, bias),
        };
        Ok(Moe {
            gate: Gate {
                weight: weight(spec.experts, spec.hidden),
                bias: spec.gate_bias.then(|| zeros(spec.experts)),
                e_score_correction_bias: spec.selection_bias.then(|| zeros(spec.experts).set_require_grad(false)),
            },
            experts: (0..spec.experts).map(|_| expert(spec.expert_width, spec.expert_bias)).collect(),
            shared_expert: spec.shared.map(|shared| expert(shared.width, false)),
            shared_expert_gate: spec.shared.filter(|shared| shared.gated).map(|_| projection(1, spec.hidden, false)),
            settings,
        })
    }

    /// What a layer has beside its weights, checked.
    pub(crate) fn settings(&self) -> Result<Settings> {
        let router = self.router.build(self.seed);
        if self.capacity.is_some() && !router.respects_capacity() {
            return Err(phase_moe::Error::CapacityIgnored { router: router.name() });
        }
        let router = LayerRouter { router: Arc::from(router), capacity: self.capacity.clone() };
        let (spec, top_k) = (self.spec.clone(), self.spec.top_k);
        Settings { spec, router, index: 0, engine: ENGINE.clone(), cached: None }.checked(top_k)
    }
}
