//! The result of `compare`: which model, which text, and one row per router and capacity.

use phase_moe::ModelSpec;
use phase_moe::eval::RouterFigures;
use serde::Serialize;

use super::loads::{Loads, SHOWN_UNASKED, has_equal_groups};
use super::meaning::{Evidence, Limit, is_causal};
use super::table::{Best, Cell, Column, NONE, Table};
use super::{load_cell, percent, percent_cell, signed_percent, times};
use crate::terminal::Terminal;

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
    /// Experts per token; where layers have numbers of their own, the largest.
    pub top_k: usize,
    /// Those of each MoE layer; no key in JSON where all are alike.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub layer_top_k: Vec<usize>,
    /// Weights in all.
    pub parameters: usize,
}

impl ModelSummary {
    /// The summary of a model.
    pub fn new(name: &str, spec: &ModelSpec) -> Self {
        let (layers, experts, top_k) = (spec.layers, spec.moe.experts, spec.moe.top_k);
        let (layer_top_k, parameters) = (spec.layer_top_k.clone(), spec.parameters());
        Self { name: name.into(), family: spec.family, layers, experts, top_k, layer_top_k, parameters }
    }

    /// Experts per token, those of each layer where they are not alike.
    fn tops(&self) -> String {
        match self.layer_top_k.as_slice() {
            [] => self.top_k.to_string(),
            each => each.iter().map(usize::to_string).collect::<Vec<_>>().join(","),
        }
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

/// The model without any limit.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Dropless {
    /// Perplexity.
    pub perplexity: f64,
    /// Tokens per second of the forward pass.
    pub tokens_per_second: f64,
    /// Largest load of a device over its share, minus 1; `None`, and no key in JSON, without devices.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub device_max_violation: Option<f64>,
}

/// What one router did.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Row {
    /// Its figures.
    #[serde(flatten)]
    pub figures: RouterFigures,
    /// Slots of each expert of each MoE layer; `None`, and no key in JSON, where they were not asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub loads: Option<Vec<Vec<u64>>>,
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
    /// `speed`, `equal` or the file that says where experts are; `None`, and no key in JSON, where it was not said.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub placement: Option<String>,
    /// The model without any limit.
    pub dropless: Dropless,
    /// One row per router and capacity.
    pub rows: Vec<Row>,
    /// What the rows mean: which router to take, what the limit costs.
    pub meaning: String,
    /// The gate's own choice, as a row.
    #[serde(skip)]
    pub own_choice: RouterFigures,
    /// Index of each MoE layer in the model.
    #[serde(skip)]
    pub moe_layers: Vec<usize>,
}

/// What was run, before it is known what it means.
pub struct Measured {
    /// Which model.
    pub model: ModelSummary,
    /// Which text.
    pub text: TextSummary,
    /// Relative speeds of the devices that share a limit; empty where all are alike.
    pub device_speeds: Vec<f64>,
    /// Where experts are, if it was said.
    pub placement: Option<String>,
    /// The gate's own choice, without any limit.
    pub own_choice: RouterFigures,
    /// One row per router and capacity, those of a limit one after the other.
    pub rows: Vec<RouterFigures>,
    /// Whether any batch was large enough for the limit of a row; true where it has none.
    pub applied: Vec<bool>,
    /// Index of each MoE layer in the model.
    pub moe_layers: Vec<usize>,
}

impl CompareReport {
    /// With what it means; `loads` asks for those of every row.
    pub fn new(measured: Measured, loads: bool) -> Self {
        let meaning = measured.evidence().meaning();
        let Measured { model, text, device_speeds, placement, own_choice, rows, moe_layers, .. } = measured;
        let row = |figures: RouterFigures| Row { loads: loads.then(|| figures.loads.clone()), figures };
        let dropless = Dropless {
            perplexity: own_choice.perplexity,
            tokens_per_second: own_choice.tokens_per_second,
            device_max_violation: own_choice.device_max_violation,
        };
        Self {
            model,
            text,
            device_speeds: Some(device_speeds).filter(|speeds| !speeds.is_empty()),
            placement,
            dropless,
            rows: rows.into_iter().map(row).collect(),
            meaning,
            own_choice,
            moe_layers,
        }
    }

    /// For people.
    pub fn text(&self, terminal: &Terminal) -> String {
        let (model, text) = (&self.model, &self.text);
        let of_model = format!(
            "{}: {} layers, {} experts, top {}, {:.1} M parameters",
            model.name,
            model.layers,
            model.experts,
            model.tops(),
            model.parameters as f64 / 1e6
        );
        let of_text = format!("{} tokens of {}, {} a batch", text.tokens, text.files.join(", "), text.batch_tokens);
        let Dropless { perplexity, tokens_per_second, device_max_violation } = self.dropless;
        let fullest =
            device_max_violation.zip(self.own_choice.devices).map_or(String::new(), |(violation, devices)| {
                format!(", fullest of {devices} devices {}", times(violation + 1.0))
            });
        let dropless = format!("dropless: perplexity {perplexity:.3}, {tokens_per_second:.0} tokens/s{fullest}");
        let mut shown = String::new();
        for line in [of_model, of_text, dropless] {
            shown += &(terminal.wrapped(&line, 2) + "\n");
        }
        shown += &format!("\n{}", self.table().text(terminal));
        if self.rows.iter().any(|row| !is_causal(&row.figures)) {
            let note = "  expert-choice looks at later tokens of its batch too: a baseline, not for generation";
            shown += &(terminal.wrapped(note, 2) + "\n");
        }
        for loads in self.loads() {
            shown += &format!("\n{}", loads.text(terminal));
        }
        shown + &format!("\n{}\n", terminal.wrapped(&self.meaning, 0))
    }

    fn table(&self) -> Table {
        let figures = || self.rows.iter().map(|row| &row.figures);
        let over_ranks = figures().any(|row| row.ranks.is_some());
        let mut all = columns(figures());
        all.extend(over_ranks.then(rank_columns).into_iter().flatten());
        let mut table = Table::new(all);
        let mut before = None;
        for row in figures() {
            let heading = heading(row, &self.devices());
            if before.as_ref() != Some(&heading) {
                table.section(&heading);
                before = Some(heading);
            }
            let mut cells = cells(row);
            cells.extend(over_ranks.then(|| rank_cells(row)).into_iter().flatten());
            table.row(cells);
        }
        table
    }

    /// Loads of every row where they were asked for or there are few, those of the gate's own choice first.
    fn loads(&self) -> Vec<Loads<'_>> {
        let asked = self.rows.iter().any(|row| row.loads.is_some());
        let single = self.rows.iter().all(|row| row.figures.router == self.rows[0].figures.router);
        let few = single && (1 + self.rows.len()) * self.moe_layers.len() <= SHOWN_UNASKED;
        if !asked && !few {
            return Vec::new();
        }
        let devices = self.devices();
        let equal = has_equal_groups(self.device_speeds.as_deref().unwrap_or_default(), self.placement.as_deref());
        let has_own = self.rows.iter().any(|row| is_own_choice(&row.figures));
        let own = (!has_own).then(|| (&self.own_choice, "dropless".to_owned()));
        let title = |row: &RouterFigures| match row.capacity_factor {
            Some(_) => format!("{}, {}", row.router, limit(row, &devices, " at ")),
            None => format!("{}, no limit", row.router),
        };
        let rows = self.rows.iter().map(|row| (&row.figures, title(&row.figures)));
        own.into_iter()
            .chain(rows)
            .map(|(row, title)| {
                let devices = row.devices.filter(|_| equal);
                Loads { title, layers: &self.moe_layers, loads: &row.loads, devices }
            })
            .collect()
    }
}

impl CompareReport {
    fn devices(&self) -> String {
        device_words(self.device_speeds.as_deref().unwrap_or_default(), self.placement.as_deref())
    }
}

impl Measured {
    fn evidence(&self) -> Evidence<'_> {
        let mut limits: Vec<Limit<'_>> = Vec::new();
        let devices = device_words(&self.device_speeds, self.placement.as_deref());
        for (row, &applied) in self.rows.iter().zip(&self.applied).filter(|(row, _)| row.capacity_factor.is_some()) {
            let label = limit(row, &devices, " at ");
            match limits.last_mut().filter(|limit| limit.label == label) {
                Some(limit) => limit.rows.push(row),
                None => limits.push(Limit { label, applied, rows: vec![row] }),
            }
        }
        let unlimited = self.rows.iter().filter(|row| row.capacity_factor.is_none()).collect();
        Evidence { dropless: &self.own_choice, unlimited, limits }
    }
}

/// Whether a row is the gate's own choice without any limit.
fn is_own_choice(row: &RouterFigures) -> bool {
    row.router == "top-k" && row.capacity_factor.is_none()
}

/// What the limit of a row is, in words.
fn heading(row: &RouterFigures, of_devices: &str) -> String {
    match (row.capacity_factor, row.devices) {
        (None, None) => "no limit".into(),
        (None, Some(devices)) => format!("no limit (max load over {devices} devices{of_devices})"),
        (Some(_), _) => limit(row, of_devices, ", capacity factor "),
    }
}

/// The limit with its factor after `before_factor`.
fn limit(row: &RouterFigures, of_devices: &str, before_factor: &str) -> String {
    let Some(factor) = row.capacity_factor else { return String::new() };
    let rule = if row.capacity_rule == Some("ceil") { ", rounded up" } else { "" };
    let pools = match (row.devices, row.profile) {
        (Some(devices), _) => format!("per {devices} devices{of_devices}"),
        (None, Some("uniform") | None) => "per expert".into(),
        (None, Some(profile)) => format!("per expert, profile {profile}"),
    };
    format!("{pools}{before_factor}{factor:?}{rule}")
}

/// What is said of devices after their number: " of speeds 3, 1, placement equal".
pub fn device_words(speeds: &[f64], placement: Option<&str>) -> String {
    let names: Vec<String> = speeds.iter().map(f64::to_string).collect();
    let speeds = if names.is_empty() { String::new() } else { format!(" of speeds {}", names.join(", ")) };
    speeds + &placement.map_or(String::new(), |placement| format!(", placement {placement}"))
}

/// What is shown of a row; where there is too little room, speed goes first, then what the other columns tell too.
fn columns<'a>(rows: impl Iterator<Item = &'a RouterFigures> + Clone) -> Vec<Column> {
    let per_device = |row: &RouterFigures| row.device_max_violation.is_some();
    let of = match (rows.clone().any(per_device), rows.clone().all(per_device)) {
        (_, true) => "the fullest device's load over its share",
        (true, false) => "the fullest expert's load over its share; where devices are named, the fullest device's",
        (false, false) => "the fullest expert's load over its share",
    };
    vec![
        Column::names("router"),
        Column::figures("survival")
            .legend("slots that have an expert, of those asked for")
            .worth(8)
            .best(Best::Highest),
        Column::figures("no\nexpert").legend("tokens without any expert in a layer, all layers together").worth(5),
        Column::figures("gate\nmass").legend("kept gate scores over those of plain top-k").worth(7).best(Best::Highest),
        Column::figures("of\nbound")
            .legend("kept gate scores over the most that this limit allows any router")
            .worth(3)
            .best(Best::Highest),
        Column::figures("perplexity").worth(2).best(Best::Lowest),
        Column::figures("increase").legend("of perplexity, over dropless").best(Best::Lowest),
        Column::figures("max\nload").legend(format!("{of}, mean over layers and batches")).worth(6),
        Column::figures("ns/tok")
            .legend("median time in the router a token and layer, states warm")
            .worth(4)
            .best(Best::Lowest),
        Column::figures("tok/s").legend("tokens a second of the whole forward pass").worth(1),
    ]
}

/// What is shown of experts over ranks.
fn rank_columns() -> [Column; 3] {
    [
        Column::figures("slowest\nrank")
            .legend("slots of the rank with the most for its speed, over the mean: what the layers take longer for it")
            .worth(7)
            .best(Best::Lowest),
        Column::figures("KB/tok").legend("bytes from rank to rank, all layers and both ways, a token").worth(5),
        Column::figures("in\nmessages")
            .legend("share of the time that ranks exchange rows or wait for each other")
            .worth(5),
    ]
}

fn rank_cells(row: &RouterFigures) -> [Cell; 3] {
    let Some(ranks) = &row.ranks else { return [NONE; 3].map(Cell::name) };
    let bytes = ranks.bytes_exchanged_per_token;
    [
        Cell::figure(times(ranks.straggler_ratio), ranks.straggler_ratio),
        Cell::figure(format!("{:.1}", bytes / 1e3), bytes),
        percent_cell(Some(ranks.exchange_share_of_time)),
    ]
}

fn cells(row: &RouterFigures) -> Vec<Cell> {
    let whole = |value: f64| Cell::figure(format!("{value:.0}"), value);
    let cells = vec![
        Cell::name(row.router),
        Cell::figure(percent(row.survival), row.survival).bad(row.dropped_slots > 0),
        Cell::figure(row.tokens_without_expert.to_string(), row.tokens_without_expert as f64)
            .bad(row.tokens_without_expert > 0),
        percent_cell(Some(row.gate_mass)),
        percent_cell(row.gate_mass_vs_bound),
        Cell::figure(format!("{:.3}", row.perplexity), row.perplexity),
        Cell::figure(signed_percent(row.perplexity_increase), row.perplexity_increase),
        load_cell(row.device_max_violation.unwrap_or(row.max_violation)),
        whole(row.route_nanos_per_token),
        whole(row.tokens_per_second),
    ];
    match is_causal(row) {
        true => cells,
        // It is none that could be taken.
        false => cells.into_iter().map(Cell::unranked).collect(),
    }
}
