//! The result of `route`: what a router did with captured gate logits, layer by layer, under which limits and in which batches.

use phase_moe::eval::{BatchCapacity, LayerFigures, RoutedLayer};
use phase_moe::routing::{Rounding, Shares};
use serde::Serialize;

use super::compare::device_words;
use super::loads::{Loads, SHOWN_UNASKED, has_equal_groups};
use super::table::{Best, Cell, Column, Table};
use super::{load_cell, percent_cell};
use crate::terminal::Terminal;

/// The whole result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RouteReport {
    /// The file that the logits come from.
    #[serde(skip)]
    pub source: String,
    /// Name of the router.
    pub router: &'static str,
    /// Experts per token.
    pub top_k: usize,
    /// What there was room for.
    #[serde(flatten)]
    pub limits: Limits,
    /// Tokens per batch; the last one may have fewer.
    pub batch_tokens: usize,
    /// Batches of each layer.
    pub batches: usize,
    /// Batches too small for the limit, which have none: all of them, or the last.
    pub batches_below_minimum: usize,
    /// Experts of a layer.
    #[serde(skip)]
    pub experts: usize,
    /// Tokens routed.
    #[serde(skip)]
    pub tokens: usize,
    /// Whether loads are shown however many layers there are.
    #[serde(skip)]
    pub all_loads: bool,
    /// What was done in each layer.
    pub layers: Vec<Routed>,
}

/// One layer.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Routed {
    /// Its figures.
    #[serde(flatten)]
    pub figures: LayerFigures,
    /// Slots of each expert, all batches together.
    pub loads: Vec<u64>,
}

impl Routed {
    /// Figures and loads.
    pub fn new(routed: RoutedLayer) -> Self {
        let mut loads = vec![0; routed.figures.experts];
        let chosen = routed.experts.iter().filter_map(|&expert| usize::try_from(expert).ok());
        chosen.for_each(|expert| loads[expert] += 1);
        Self { figures: routed.figures, loads }
    }
}

/// The room there was, as it was asked for; what does not apply is `None`.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Limits {
    /// Room over demand.
    pub capacity_factor: Option<f64>,
    /// Profile of the experts' capacities.
    pub profile: Option<String>,
    /// `exact` or `ceil`.
    pub capacity_rule: Option<&'static str>,
    /// Devices that share the limit; `None` per expert or without one.
    pub devices: Option<usize>,
    /// Their relative speeds; no key in JSON where they are alike.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub device_speeds: Vec<f64>,
    /// `speed`, `equal` or the file that says where experts are; no key in JSON where it was not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement: Option<String>,
    /// Slots per expert or device and batch, where they were given; no key in JSON where they were not.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub capacities: Vec<u32>,
    /// Mean slots per expert or device below which a batch has no limit.
    #[serde(skip)]
    minimum: f64,
}

impl Limits {
    /// Those of a run: `capacities` and `device_speeds` where they were given, and on how many `devices`.
    pub fn new(capacity: &BatchCapacity, capacities: &[u32], devices: Option<usize>, device_speeds: &[f64]) -> Self {
        let none = Self {
            capacity_factor: None,
            profile: None,
            capacity_rule: None,
            devices: None,
            device_speeds: Vec::new(),
            placement: None,
            capacities: capacities.to_vec(),
            minimum: 0.0,
        };
        match capacity {
            BatchCapacity::Unlimited => none,
            BatchCapacity::Given(_) => Self { devices, ..none },
            BatchCapacity::Rule(rule) => {
                let (profile, devices) = match &rule.shares {
                    Shares::PerExpert { profile, .. } => (Some(profile.to_string()), None),
                    Shares::PerDevice { speeds } | Shares::EqualGroups { speeds } | Shares::Placed { speeds, .. } => {
                        (None, Some(speeds.len()))
                    }
                };
                let rule_name = if rule.rounding == Rounding::Ceil { "ceil" } else { "exact" };
                Self {
                    capacity_factor: Some(rule.factor),
                    profile,
                    capacity_rule: Some(rule_name),
                    devices,
                    device_speeds: device_speeds.to_vec(),
                    minimum: rule.minimum_mean,
                    ..none
                }
            }
        }
    }

    /// The same with the words of where experts are.
    pub fn with_placement(self, placement: Option<String>) -> Self {
        Self { placement, ..self }
    }

    /// "per 4 devices, capacity factor 1.0, exact".
    fn words(&self) -> String {
        let pools = match self.devices {
            Some(devices) => {
                format!("per {devices} devices{}", device_words(&self.device_speeds, self.placement.as_deref()))
            }
            None => "per expert".into(),
        };
        let profile = self.profile.as_ref().filter(|profile| *profile != "uniform");
        let profile = profile.map_or(String::new(), |profile| format!(", profile {profile}"));
        match (self.capacity_factor, self.capacities.as_slice()) {
            (Some(factor), _) => {
                let rule = self.capacity_rule.unwrap_or("exact");
                format!("limits {pools}{profile}, capacity factor {factor:?}, {rule}")
            }
            (None, []) => "no limit".into(),
            (None, given) => {
                let total: u64 = given.iter().map(|&slots| u64::from(slots)).sum();
                let (least, most) = (given.iter().min().unwrap_or(&0), given.iter().max().unwrap_or(&0));
                format!("limits {pools} as given, {least} to {most} slots, {total} a batch")
            }
        }
    }

    fn pool(&self) -> &'static str {
        if self.devices.is_some() { "device" } else { "expert" }
    }
}

impl RouteReport {
    /// For people.
    pub fn text(&self, terminal: &Terminal) -> String {
        let Self { source, router, top_k, experts, tokens, .. } = self;
        let layers = self.layers.len();
        let of_trace =
            format!("{router} on {source}: {layers} layers of {experts} experts, top {top_k}, {tokens} tokens");
        let mut text = String::new();
        for line in [of_trace, format!("{}; {}", self.limits.words(), self.batches_in_words())] {
            text += &(terminal.wrapped(&line, 2) + "\n");
        }
        text += &format!("\n{}", self.table().text(terminal));
        if self.all_loads || self.layers.len() <= SHOWN_UNASKED {
            let loads: Vec<Vec<u64>> = self.layers.iter().map(|layer| layer.loads.clone()).collect();
            let layers: Vec<usize> = self.layers.iter().map(|layer| layer.figures.layer).collect();
            let Limits { device_speeds, placement, .. } = &self.limits;
            let equal = has_equal_groups(device_speeds, placement.as_deref());
            let (title, devices) = ((*router).to_owned(), self.limits.devices.filter(|_| equal));
            text += &format!("\n{}", Loads { title, layers: &layers, loads: &loads, devices }.text(terminal));
        }
        text
    }

    /// How the trace was cut, and which parts were too small for the limit.
    fn batches_in_words(&self) -> String {
        let (size, batches, below) = (self.batch_tokens, self.batches, self.batches_below_minimum);
        let rest = self.tokens - size * batches.saturating_sub(1);
        let cut = match batches {
            0 | 1 => format!("one batch of {} tokens", self.tokens),
            _ if rest == size => format!("{batches} batches of {size} tokens"),
            _ => format!("{batches} batches of {size} tokens, the last of {rest}"),
        };
        let why = format!("fewer than {} slots per {} on average", self.limits.minimum, self.limits.pool());
        match below {
            0 => cut,
            _ if below == batches => format!("{cut}, none of them limited: {why}"),
            1 => format!("{cut}, which has no limit: {why}"),
            // A smaller batch than the others is the last one alone.
            _ => format!("{cut}, {below} without limit: {why}"),
        }
    }

    fn table(&self) -> Table {
        let of = self.limits.pool();
        let mut table = Table::new(vec![
            Column::figures("layer"),
            Column::figures("survival").legend("slots that have an expert, of those asked for").worth(6),
            Column::figures("feasible").legend("the most that there is room for").worth(3),
            Column::figures("gate\nmass").legend("kept gate scores over those of plain top-k").worth(5),
            Column::figures("of\nbound")
                .legend("kept gate scores over the most that this limit allows any router")
                .worth(2),
            Column::figures("max\nload")
                .legend(format!("the fullest {of}'s load over its share, mean over batches"))
                .worth(4)
                .best(Best::Lowest),
            Column::figures("ns/tok").legend("median time in the router a token, states warm").worth(1),
        ]);
        for Routed { figures, .. } in &self.layers {
            table.row(vec![
                Cell::name(figures.layer.to_string()),
                percent_cell(Some(figures.survival)).bad(figures.kept < figures.demand),
                percent_cell(Some(figures.feasible_survival)),
                percent_cell(Some(figures.gate_mass)),
                percent_cell(figures.gate_mass_vs_bound),
                load_cell(figures.max_violation),
                Cell::figure(format!("{:.0}", figures.route_nanos_per_token), figures.route_nanos_per_token),
            ]);
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use phase_moe::routing::Profile;
    use phase_moe::{Capacity, CapacityRule};

    fn report(limits: Limits, tokens: usize, size: usize, below: usize) -> String {
        let loads = vec![5, 0, 10, 5, 1, 1, 1, 1];
        let figures = LayerFigures { layer: 3, tokens, experts: 8, demand: 24, kept: 24, ..LayerFigures::default() };
        let report = RouteReport {
            source: "t.safetensors".into(),
            router: "phase",
            top_k: 2,
            limits,
            batch_tokens: size,
            batches: tokens.div_ceil(size),
            batches_below_minimum: below,
            experts: 8,
            tokens,
            all_loads: false,
            layers: vec![Routed { figures, loads }],
        };
        report.text(&Terminal::plain(100))
    }

    #[test]
    fn limits_and_batches_are_told() {
        let none = report(Limits::new(&BatchCapacity::Unlimited, &[], None, &[]), 12, 12, 0);
        let expected =
            "phase on t.safetensors: 1 layers of 8 experts, top 2, 12 tokens\nno limit; one batch of 12 tokens\n";
        assert!(none.starts_with(expected), "{none}");
        assert!(
            none.contains("the fullest expert's load") && none.contains("layer 3 |▄ █▄▁▁▁▁|  3.33 ×, expert 2"),
            "{none}"
        );

        let rule = BatchCapacity::Rule(CapacityRule::per_device(1.25, 2));
        let tail = report(Limits::new(&rule, &[], Some(2), &[]), 603, 300, 1);
        let expected = "limits per 2 devices, capacity factor 1.25, exact; 3 batches of 300 tokens, the last of 3, which has no limit: \
                        fewer than 4 slots per device on average";
        assert!(tail.replace("\n  ", " ").contains(expected) && tail.contains("the fullest device's load"), "{tail}");

        let ceil =
            CapacityRule::new(1.0, Shares::PerExpert { profile: Profile::Mild, seed: 1 }).with_rounding(Rounding::Ceil);
        let small = report(Limits::new(&BatchCapacity::Rule(ceil), &[], None, &[]), 8, 4, 2);
        let expected =
            "limits per expert, profile mild, capacity factor 1.0, ceil; 2 batches of 4 tokens, none of them limited";
        assert!(small.replace("\n  ", " ").contains(expected), "{small}");

        let given = BatchCapacity::Given(Capacity::per_expert(vec![3; 8]).unwrap());
        let given = report(Limits::new(&given, &[0, 3, 3, 3, 3, 3, 3, 9], None, &[]), 12, 6, 0);
        assert!(
            given.contains("limits per expert as given, 0 to 9 slots, 27 a batch; 2 batches of 6 tokens\n"),
            "{given}"
        );
    }
}
