//! What holds for all routers, and figures of balance.

mod balance;
mod properties;
mod routers;
