//! The result of `place`: what a placement comes to on text that it was not chosen on, beside simpler ones.

use phase_moe::eval::PlacedFigures;
use serde::Serialize;

use super::compare::device_words;
use super::table::{Best, Cell, Column, Table};
use super::{percent_cell, times};
use crate::terminal::Terminal;

/// The whole result.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PlaceReport {
    /// The file that the logits come from.
    #[serde(skip)]
    pub source: String,
    /// How many devices there are.
    pub devices: usize,
    /// Their relative speeds; no key in JSON where they are alike.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub device_speeds: Vec<f64>,
    /// MoE layers of the trace.
    pub layers: usize,
    /// Experts of each.
    pub experts: usize,
    /// Tokens of the trace: on half of them was chosen, on the others measured.
    pub tokens: usize,
    /// Tokens per batch.
    pub batch_tokens: usize,
    /// Kinds of text; `None` where the trace does not say.
    pub kinds: Option<usize>,
    /// One row for each way to place experts.
    pub rows: Vec<PlacedFigures>,
}

impl PlaceReport {
    /// For people.
    pub fn text(&self, terminal: &Terminal) -> String {
        let Self { source, devices, layers, experts, tokens, batch_tokens, .. } = self;
        let of_devices = device_words(&self.device_speeds, None);
        let of = format!("{source}: {layers} layers of {experts} experts on {devices} devices{of_devices}");
        let halves = match self.kinds {
            Some(1) | None => format!("{tokens} tokens, {batch_tokens} a batch"),
            Some(kinds) => format!("{tokens} tokens of {kinds} kinds of text, {batch_tokens} a batch"),
        };
        let of_each = if self.kinds.is_some_and(|kinds| kinds > 1) { " of each kind" } else { "" };
        let halves = format!("{halves}: chosen on the first half{of_each}, measured on the second");
        let lines: String = [of, halves].iter().map(|line| terminal.wrapped(line, 2) + "\n").collect();
        format!("{lines}\n{}", self.table().text(terminal))
    }

    fn table(&self) -> Table {
        let worst = match self.kinds {
            Some(_) => "the same of the kind of text that is worst off",
            None => "the same of the batch that is worst off",
        };
        let mut table = Table::new(vec![
            Column::names("placement"),
            Column::figures("devices\na token").legend("devices that a token's experts are on").best(Best::Lowest),
            Column::figures("rows\na token")
                .legend("rows that go from device to device for a token and layer, there and back")
                .worth(5)
                .best(Best::Lowest),
            Column::figures("slowest\ndevice")
                .legend("slots of plain top-k of the fullest device for its speed, over all slots for all speed, mean over batches")
                .worth(8)
                .best(Best::Lowest),
            Column::figures("worst\nkind").legend(worst).worth(7).best(Best::Lowest),
            Column::figures("gate\nmass")
                .legend("gate scores over those of plain top-k that phase keeps with exactly as much room as slots")
                .worth(6)
                .best(Best::Highest),
        ]);
        for row in &self.rows {
            let ratio = |value: f64| Cell::figure(times(value), value);
            let count = |value: f64| Cell::figure(format!("{value:.2}"), value);
            table.row(vec![
                Cell::name(row.placement),
                count(row.devices_per_token),
                count(row.rows_exchanged_per_token),
                ratio(row.straggler_ratio),
                ratio(row.worst_kind_straggler_ratio),
                percent_cell(Some(row.gate_mass)),
            ]);
        }
        table
    }
}
