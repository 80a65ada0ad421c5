//! The expert cache over disks that do what a test says: right bytes, one resident set, one budget, and faults that harm only
//! those who need what is broken. And the router that prefers what is resident, with the resident set that it is told.

mod cache_router;
mod disk;
mod faults;
mod memory;
mod prefetch;
mod steps;
