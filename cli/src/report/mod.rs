//! What was measured, for people: tables as wide as the terminal, and a page. Figures for programs are the same structs as JSON.

pub mod compare;
mod fit;
pub mod loads;
pub mod meaning;
pub mod option;
mod page;
pub mod place;
pub mod reason;
pub mod replay;
pub mod route;
pub mod seen;
pub mod table;
pub mod tune;

use table::{Cell, NONE};

/// So many times as much, for a table; a dash where there is no telling: a load where there should have been none.
pub fn times(ratio: f64) -> String {
    if ratio.is_finite() { format!("{ratio:.2} ×") } else { NONE.into() }
}

/// A share of 1 with two places.
pub fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

/// A change with its sign.
pub fn signed_percent(share: f64) -> String {
    if share >= 1.0 { format!("{:+.0} %", 100.0 * share) } else { format!("{:+.2} %", 100.0 * share) }
}

/// A cell with a share of 1, or with a dash.
pub fn percent_cell(share: Option<f64>) -> Cell {
    share.map_or_else(Cell::none, |share| Cell::figure(percent(share), share))
}

/// A cell with a largest load over its share, given as that minus 1.
pub fn load_cell(violation: f64) -> Cell {
    match violation.is_finite() {
        true => Cell::figure(times(violation + 1.0), violation),
        false => Cell::none(),
    }
}
