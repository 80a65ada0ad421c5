//! Metrics for Burn's learner: how many slots survived, how even loads were, how much gate mass was kept.
//!
//! A model's training output adapts to [`RouteInput`], made of what its layers routed:
//!
//! ```
//! use burn::train::metric::Adaptor;
//! use phase_moe_burn::metric::RouteInput;
//!
//! struct Output {
//!     routes: RouteInput,
//! }
//!
//! impl Adaptor<RouteInput> for Output {
//!     fn adapt(&self) -> RouteInput {
//!         self.routes.clone()
//!     }
//! }
//! ```

use std::sync::Arc;

use burn::tensor::TensorReadError;
use burn::train::metric::state::{FormatOptions, NumericMetricState};
use burn::train::metric::{
    Metric, MetricAttributes, MetricMetadata, MetricName, Numeric, NumericAttributes, NumericEntry, SerializedEntry,
};
use phase_moe::{Result, RouteMetrics};

use crate::routed::Routed;

/// What the MoE layers of a model did in one step, all of them together.
#[derive(Clone, Debug, Default)]
pub struct RouteInput {
    layers: Vec<RouteMetrics>,
}

impl RouteInput {
    /// The figures of these layers.
    ///
    /// # Errors
    /// As [`Routed::metrics`].
    pub fn new<'a>(routed: impl IntoIterator<Item = &'a Routed>) -> Result<Self> {
        Ok(Self { layers: routed.into_iter().map(Routed::metrics).collect::<Result<_>>()? })
    }

    fn sum(&self, of: impl Fn(&RouteMetrics) -> f64) -> f64 {
        self.layers.iter().map(of).sum()
    }

    fn demand(&self) -> usize {
        self.layers.iter().map(|layer| layer.demand as usize).sum()
    }
}

/// What a figure is called, how it is shown and made.
struct Figure {
    name: &'static str,
    description: &'static str,
    unit: Option<&'static str>,
    higher_is_better: bool,
    /// Of a step in which some slots were asked for.
    of: fn(&RouteInput) -> f64,
}

const SURVIVAL: Figure = Figure {
    name: "MoE survival",
    description: "slots that got an expert, of those that tokens asked for",
    unit: Some("%"),
    higher_is_better: true,
    of: |input| 100.0 * input.sum(|layer| layer.kept as f64) / input.demand() as f64,
};

const GATE_MASS: Figure = Figure {
    name: "MoE gate mass",
    description: "gate scores of kept slots, of those that the gate's own choice without a limit has",
    unit: Some("%"),
    higher_is_better: true,
    of: |input| 100.0 * input.sum(|layer| layer.gate_mass) / input.sum(|layer| layer.top_k_gate_mass),
};

const BALANCE: Figure = Figure {
    name: "MoE load variation",
    description: "standard deviation of experts' loads over their mean, in the mean of the layers; 0 is even",
    unit: None,
    higher_is_better: false,
    of: |input| input.sum(|layer| layer.experts.cv) / input.layers.len() as f64,
};

macro_rules! metric {
    ($(#[$doc:meta])* $name:ident, $figure:ident) => {
        $(#[$doc])*
        #[derive(Clone)]
        pub struct $name {
            name: MetricName,
            state: NumericMetricState,
        }

        impl Default for $name {
            fn default() -> Self {
                Self { name: Arc::new($figure.name.into()), state: NumericMetricState::new() }
            }
        }

        impl $name {
            fn format(&self) -> FormatOptions {
                let format = FormatOptions::new(self.name.clone()).precision(2);
                $figure.unit.iter().fold(format, |format, unit| format.unit(unit))
            }
        }

        impl Metric for $name {
            type Input = RouteInput;

            fn name(&self) -> MetricName {
                self.name.clone()
            }

            fn description(&self) -> Option<String> {
                Some($figure.description.into())
            }

            fn attributes(&self) -> MetricAttributes {
                let (unit, higher_is_better) = ($figure.unit.map(String::from), $figure.higher_is_better);
                NumericAttributes { unit, higher_is_better }.into()
            }

            fn update(
                &mut self,
                item: &RouteInput,
                _: &MetricMetadata,
            ) -> std::result::Result<SerializedEntry, TensorReadError> {
                if item.demand() > 0 {
                    self.state.update(($figure.of)(item), item.demand());
                }
                Ok(self.state.compute_update(self.format()))
            }

            fn compute(&mut self) -> std::result::Result<SerializedEntry, TensorReadError> {
                Ok(self.state.compute_final(self.format()))
            }

            fn clear(&mut self) {
                self.state.reset();
            }
        }

        impl Numeric for $name {
            fn value(&self) -> Option<NumericEntry> {
                Some(self.state.current_value())
            }

            fn running_value(&self) -> Option<NumericEntry> {
                Some(self.state.running_value())
            }

            fn final_value(&self) -> NumericEntry {
                self.state.final_value()
            }
        }
    };
}

metric! {
    /// Slots that got an expert, of those asked for, in percent.
    SurvivalMetric, SURVIVAL
}

metric! {
    /// Gate scores of kept slots, of those of the gate's own choice without a limit, in percent.
    GateMassMetric, GATE_MASS
}

metric! {
    /// Standard deviation of the experts' loads over their mean, in the mean of the layers; 0 is even.
    BalanceMetric, BALANCE
}
