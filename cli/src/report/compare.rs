//! The result of `compare`: which model, which text, and one row per router and capacity.

use std::fmt::{self, Display, Formatter};

use serde::Serialize;

use super::times;
use phase_moe::ModelSpec;
use phase_moe::eval::{Dropless, RouterFigures};

/// Which model was measured.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ModelSummary {
    /// Name of the checkpoint's directory.
    pub name: String,
    /// Model family.
    pub family: &'static str,
    /// Transformer blocks.
    pub layers: usize,
    /// Experts per MoE layer.
    pub experts: usize,
    /// Experts per token.
    pub top_k: usize,
    /// Weights in all.
    pub parameters: usize,
}

impl ModelSummary {
    /// The summary of a model.
    pub fn new(name: &str, spec: &ModelSpec) -> Self {
        let (layers, experts, top_k) = (spec.layers, spec.moe.experts, spec.moe.top_k);
        Self { name: name.into(), family: spec.family, layers, experts, top_k, parameters: spec.parameters() }
    }
}

/// Which text it was measured on.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct TextSummary {
    /// Names of the texts.
    pub files: Vec<String>,
    /// Tokens used of them.
    pub tokens: u64,
    /// Tokens per forward pass.
    pub batch_tokens: usize,
    /// Seed that shuffled the sequences; `None`, and no key in JSON, where they kept their order.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shuffle: Option<u64>,
}

/// The whole result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CompareReport {
    /// Which model.
    pub model: ModelSummary,
    /// Which text.
    pub text: TextSummary,
    /// Relative speeds of the devices that share a limit; `None`, and no key in JSON, where all are alike.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_speeds: Option<Vec<f64>>,
    /// The model without any limit.
    pub dropless: Dropless,
    /// One row per router and capacity.
    pub rows: Vec<RouterFigures>,
}

impl Display for CompareReport {
    fn fmt(&self, f: &mut Formatter<'_>) -> fmt::Result {
        let (model, text) = (&self.model, &self.text);
        writeln!(
            f,
            "{}: {} layers, {} experts, top {}, {:.1} M parameters",
            model.name,
            model.layers,
            model.experts,
            model.top_k,
            model.parameters as f64 / 1e6
        )?;
        writeln!(f, "{} tokens of {}, {} a batch", text.tokens, text.files.join(", "), text.batch_tokens)?;
        let Dropless { perplexity, tokens_per_second } = self.dropless;
        writeln!(f, "dropless: perplexity {perplexity:.3}, {tokens_per_second:.0} tokens/s")?;
        for (index, row) in self.rows.iter().enumerate() {
            let capacity = self.heading(row);
            if index == 0 || self.heading(&self.rows[index - 1]) != capacity {
                writeln!(f, "\n{capacity}")?;
                writeln!(
                    f,
                    "  {:<14}{:>9}{:>10}{:>10}{:>9}{:>11}{:>10}{:>9}{:>7}{:>8}",
                    "router",
                    "survival",
                    "no expert",
                    "gate mass",
                    "of bound",
                    "perplexity",
                    "increase",
                    "max load",
                    "ns/tok",
                    "tok/s"
                )?;
            }
            // What a load is measured against: its device where limits are per device, else the expert.
            let violation = row.device_max_violation.unwrap_or(row.max_violation);
            writeln!(
                f,
                "  {:<14}{:>9}{:>10}{:>10}{:>9}{:>11.3}{:>10}{:>9}{:>7.0}{:>8.0}",
                row.router,
                percent(row.survival),
                row.tokens_without_expert,
                percent(row.gate_mass),
                row.gate_mass_vs_bound.map_or("–".into(), percent),
                row.perplexity,
                signed_percent(row.perplexity_increase),
                times(violation + 1.0),
                row.route_nanos_per_token,
                row.tokens_per_second
            )?;
        }
        Ok(())
    }
}

impl CompareReport {
    /// What the limit of a row is, in words.
    fn heading(&self, row: &RouterFigures) -> String {
        let Some(factor) = row.capacity_factor else { return "no limit".into() };
        let rule = match row.capacity_rule {
            Some("ceil") => ", rounded up",
            _ => "",
        };
        let factor = format!("capacity factor {factor:?}{rule}");
        match (row.devices, row.profile) {
            (Some(devices), _) => {
                let speeds: Vec<String> = self.device_speeds.iter().flatten().map(f64::to_string).collect();
                let speeds =
                    if speeds.is_empty() { String::new() } else { format!(" of speeds {}", speeds.join(", ")) };
                format!("per {devices} devices{speeds}, {factor}")
            }
            (None, Some("uniform") | None) => format!("per expert, {factor}"),
            (None, Some(profile)) => format!("per expert, profile {profile}, {factor}"),
        }
    }
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

fn signed_percent(share: f64) -> String {
    if share >= 1.0 { format!("{:+.0} %", 100.0 * share) } else { format!("{:+.2} %", 100.0 * share) }
}
