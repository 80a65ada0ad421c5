//! Phase routing: slots laid on a ring of capacities instead of scattered by a hash.

pub mod banded;
pub mod draws;
pub mod kernel;
pub mod quota;
