//! Ids and weights that a caller hands in: an error, or an assignment whose plan is a permutation.

#![no_main]

#[path = "../../src/routing/tests/properties/invariants.rs"]
#[allow(dead_code)]
mod invariants;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
// What `invariants` finds in its crate.
#[rustfmt::skip]
use phase_moe::{Assignment, DispatchPlan, RouteMetrics, RouteRequest, RouteState, Router, check_assignment, routing};

fn run(bytes: &mut Unstructured<'_>) -> Result<()> {
    let (experts, top_k): (usize, usize) = (bytes.int_in_range(0..=70)?, bytes.int_in_range(0..=20)?);
    let experts = if bytes.ratio(1, 32)? { bytes.arbitrary()? } else { experts };
    let top_k = if bytes.ratio(1, 32)? { bytes.arbitrary()? } else { top_k };
    let (mut ids, mut weights) = (Vec::new(), Vec::new());
    while !bytes.is_empty() && ids.len() < 500 {
        let tag: u8 = bytes.arbitrary()?;
        ids.push(if tag < 250 { i32::from(tag % 64) - 1 } else { bytes.arbitrary()? });
        let drawn: u8 = bytes.arbitrary()?;
        weights.push(match drawn {
            0..=240 if tag < 250 && tag % 64 == 0 => 0.0,
            0..=240 => f32::from(drawn) / 240.0,
            _ => f32::from_bits(bytes.arbitrary()?),
        });
    }
    if bytes.len() == 1 {
        weights.pop();
    }
    let Ok(assignment) = Assignment::from_parts(experts, top_k, &ids, &weights) else { return Ok(()) };
    assert_eq!(assignment.ids().collect::<Vec<_>>(), ids);
    for (row, ids) in ids.chunks_exact(top_k).enumerate() {
        for (slot, &id) in ids.iter().enumerate() {
            assert!((-1..experts as i32).contains(&id) && (id < 0 || !ids[..slot].contains(&id)));
        }
        let kept = assignment.slots(row).map(|(expert, _)| expert.index() as i32);
        assert!(kept.eq(ids.iter().copied().filter(|&id| id >= 0)));
    }
    assert!(weights.iter().all(|weight| weight.is_finite()));
    invariants::check_plan(&assignment);
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = run(&mut Unstructured::new(data));
});
