//! What was measured, for people: tables at 100 columns, and a page. Figures for programs are the same structs as JSON.

pub mod compare;
mod fit;
pub mod option;
mod page;
pub mod reason;
pub mod replay;
pub mod seen;
pub mod tune;

/// So many times as much, for a table; a dash where there is no telling: a load where there should have been none.
pub fn times(ratio: f64) -> String {
    if ratio.is_finite() { format!("{ratio:.2} ×") } else { "–".into() }
}
