//! Loads of experts as bars, a line per layer: which experts are crowded, which are idle.

use crate::terminal::{BARS, Mark, Terminal};

/// More lines than this are shown only where they are asked for.
pub const SHOWN_UNASKED: usize = 32;

/// The loads of one run.
pub struct Loads<'a> {
    /// Whose they are.
    pub title: String,
    /// Index of each MoE layer in the model.
    pub layers: &'a [usize],
    /// Slots of each expert of each of these layers.
    pub loads: &'a [Vec<u64>],
    /// Contiguous groups of experts that share a device.
    pub devices: Option<usize>,
}

/// Whether devices of these speeds, placed so, hold groups that can be drawn alike: contiguous and equally large.
pub fn has_equal_groups(speeds: &[f64], placement: Option<&str>) -> bool {
    match placement {
        Some("equal") => true,
        Some("speed") | None => speeds.is_empty(),
        Some(_) => false,
    }
}

impl Loads<'_> {
    /// A heading and a line for each layer; every line ends.
    pub fn text(&self, terminal: &Terminal) -> String {
        let mean = |loads: &[u64]| loads.iter().sum::<u64>() as f64 / loads.len().max(1) as f64;
        let over_mean = |loads: &[u64]| {
            let fullest = loads.iter().max().map_or(0.0, |&load| load as f64);
            if fullest > 0.0 { fullest / mean(loads) } else { 0.0 }
        };
        let fullest = self.loads.iter().map(|loads| over_mean(loads)).fold(0.0, f64::max);
        let experts = self.loads.first().map_or(0, Vec::len);
        let digits = self.layers.iter().max().map_or(1, |layer| layer.to_string().len());
        let largest = format!("{fullest:.2}").len();
        let devices = self.devices.filter(|&devices| devices > 1 && devices <= experts).unwrap_or(1);
        // "  3 |", a bar before each further device, "|  2.31 ×"; "layer " and ", expert 12" where there is room for them.
        let around = 2 + digits + 2 + (devices - 1) + 3 + largest + 2;
        let words = "layer , expert ".len() + experts.to_string().len();
        let group_beside = |taken: usize| {
            let room = terminal.width.saturating_sub(taken).max(devices);
            experts.div_ceil(devices).div_ceil(room / devices).max(1)
        };
        let (group, in_words) = match (group_beside(around + words), group_beside(around)) {
            (group, 1) if group > 1 => (1, false),
            (group, _) => (group, true),
        };
        let several = if group > 1 { format!(", {group} experts a bar") } else { String::new() };
        let borders = if devices > 1 { ", devices apart" } else { "" };
        let heading = format!("{}: loads of experts, █ is {fullest:.2} × a layer's mean{several}{borders}", self.title);
        let mut text = terminal.wrapped(&heading, 2) + "\n";
        for (layer, loads) in self.layers.iter().zip(self.loads) {
            let top = fullest * mean(loads);
            let bars: Vec<String> =
                groups(loads.len(), devices).map(|device| bars(&loads[device], group, top)).collect();
            let busiest = (0..loads.len()).rev().max_by_key(|&expert| loads[expert]).unwrap_or(0);
            let ratio = format!("{:>largest$}", format!("{:.2}", over_mean(loads)));
            let (before, after) =
                if in_words { ("layer ", format!(", expert {busiest}")) } else { ("", String::new()) };
            let aside = terminal.marked(Mark::Aside, &format!("{ratio} ×{after}"));
            text.push_str(&format!("  {before}{layer:>digits$} |{}|  {aside}\n", bars.join("|")));
        }
        text
    }
}

/// The experts of each device, as the library places them: contiguous, the first ones larger by one where they are unequal.
fn groups(experts: usize, devices: usize) -> impl Iterator<Item = std::ops::Range<usize>> {
    let start = move |device: usize| device * (experts / devices) + device.min(experts % devices);
    (0..devices).map(move |device| start(device)..start(device + 1))
}

/// A bar for the mean of each `group` of loads: none for no load, the highest for `top`.
fn bars(loads: &[u64], group: usize, top: f64) -> String {
    let bar = |loads: &[u64]| {
        let mean = loads.iter().sum::<u64>() as f64 / loads.len() as f64;
        match (mean / top * BARS.len() as f64).ceil() as usize {
            0 => ' ',
            height => BARS[height.min(BARS.len()) - 1],
        }
    };
    loads.chunks(group).map(bar).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(loads: &[Vec<u64>], devices: Option<usize>, width: usize) -> String {
        let layers: Vec<usize> = (1..=loads.len()).collect();
        Loads { title: "phase".into(), layers: &layers, loads, devices }.text(&Terminal::plain(width))
    }

    #[test]
    fn the_fullest_expert_of_all_layers_is_the_highest_bar() {
        let expected = "\
phase: loads of experts, █ is 2.00 × a layer's mean
  layer 1 | ▄█▄|  2.00 ×, expert 2
  layer 2 |▄▄▄▄|  1.00 ×, expert 0
";
        assert_eq!(text(&[vec![0, 5, 10, 5], vec![7, 7, 7, 7]], None, 80), expected);
    }

    #[test]
    fn devices_stand_apart_and_what_has_no_load_no_bar() {
        let shown = text(&[vec![1, 0, 0, 0, 3]], Some(2), 80);
        assert!(
            shown.ends_with("  layer 1 |▃  | █|  3.75 ×, expert 4\n") && shown.contains("devices apart"),
            "{shown}"
        );
        assert!(text(&[vec![0, 0]], None, 80).contains("|  |  0.00 ×"));
    }

    #[test]
    fn more_experts_than_columns_share_bars() {
        for (experts, devices) in [(256, None), (256, Some(4)), (300, Some(7)), (64, None), (32, Some(4)), (48, None)] {
            let shown = text(&[(0..experts).collect()], devices, 80);
            assert!(shown.lines().all(|line| line.chars().count() <= 80), "{shown}");
            assert_eq!(shown.contains("experts a bar"), experts > 64, "{shown}");
            // Words go before bars are shared.
            assert_eq!(shown.contains("  layer 1 |"), experts != 64, "{shown}");
        }
    }
}
