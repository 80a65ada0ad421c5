//! The routing core by itself, without any tensor framework: logits → scores → router under a capacity → assignment.
//!
//! 512 tokens meet 32 experts, four each, and like some experts far more than others. Room is exactly what is asked for:
//! first the same for every expert, then the same for each of four devices that hold eight experts. Printed for each
//! router: the slots that survive, the gate mass they keep of what unlimited top-k would have, and the fullest pool.
//!
//! ```text
//! cargo run --release --no-default-features --example route_tokens
//! ```

use phase_moe::{
    Capacity, CapacityRule, DispatchPlan, Logits, Result, RouteContext, RouteMetrics, RouteRequest, RouteState,
    RouterKind, Scoring,
};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

const TOKENS: usize = 512;
const EXPERTS: usize = 32;
const TOP_K: usize = 4;
const DEVICES: usize = 4;

fn main() -> Result<()> {
    // What a gate would give: some experts are liked by everyone, and every token has its own taste.
    let mut rng = ChaCha8Rng::seed_from_u64(7);
    let popularity: Vec<f32> = (0..EXPERTS).map(|_| rng.random_range(-1.5..1.5)).collect();
    let logit = |at: usize| popularity[at % EXPERTS] + rng.random_range(-2.0..2.0);
    let values: Vec<f32> = (0..TOKENS * EXPERTS).map(logit).collect();

    let logits = Logits::new(&values, TOKENS, EXPERTS)?;
    let scores = Scoring::softmax().scores(&logits, None)?;

    let rooms = [
        ("per expert", CapacityRule::per_expert(1.0).capacity(TOKENS, EXPERTS, TOP_K)?),
        ("per device", CapacityRule::per_device(1.0, DEVICES).capacity(TOKENS, EXPERTS, TOP_K)?),
    ];
    for (label, capacity) in &rooms {
        let limit = capacity.limits().and_then(|limits| limits.first()).copied().unwrap_or(0);
        println!("\nroom {label}, {limit} slots each, {} asked for", TOKENS * TOP_K);
        println!("{:<16}{:>10}{:>12}{:>14}", "router", "survival", "gate mass", "fullest pool");
        for kind in RouterKind::ALL {
            let request = RouteRequest::new(&scores, TOP_K, capacity, RouteContext::default())?;
            let assignment = kind.build(42).route(&request, &mut RouteState::default())?;
            let metrics = RouteMetrics::new(&request, &assignment);
            println!(
                "{:<16}{:>9.1}%{:>11.1}%{:>14}",
                kind.name(),
                100.0 * metrics.survival(),
                100.0 * metrics.gate_mass_share(),
                fullest_pool(capacity, &assignment.load())
            );
        }
    }

    // Sorted by expert: the order in which a layer hands tokens to its experts.
    println!();
    let request = RouteRequest::new(&scores, TOP_K, &rooms[0].1, RouteContext::default())?;
    let assignment = RouterKind::TopKScore.build(42).route(&request, &mut RouteState::default())?;
    let plan = DispatchPlan::from(&assignment);
    for (expert, slots) in plan.busy_experts().take(3) {
        println!("expert {expert} computes {} tokens, among them token {}", slots.len(), plan.tokens()[slots.start]);
    }
    Ok(())
}

/// Slots of the expert or device that has most: the one that the others wait for.
fn fullest_pool(capacity: &Capacity, load: &[u32]) -> u32 {
    let mut pools = vec![0; capacity.limits().map_or(load.len(), <[u32]>::len)];
    load.iter().enumerate().for_each(|(expert, load)| pools[capacity.pool_of(expert as u16)] += load);
    pools.into_iter().max().unwrap_or(0)
}
