//! Runs a property, and says how many cases there are.

use std::fmt::Debug;

use proptest::strategy::Strategy;
use proptest::test_runner::{Config, RngSeed, TestRunner};

/// Cases of each property at `PHASE_MOE_CASES=1`.
pub const CASES: [(&str, u32); 23] = [
    ("every_router_keeps_the_invariants", 27_000),
    ("padding_changes_nothing_for_the_others", 8_000),
    ("what_is_reused_decides_nothing", 8_000),
    ("one_and_many_threads_agree", 400),
    ("plans_are_permutations_of_any_assignment", 10_000),
    ("parts_that_are_wrong_are_errors", 5_000),
    ("drop_rules_drop_whom_they_say", 5_000),
    ("a_drop_leaves_the_other_weights_as_they_are", 4_000),
    ("scores_match_their_formulas", 8_000),
    ("rules_share_what_they_say", 12_000),
    ("shapes_that_do_not_fit_are_errors", 3_000),
    ("where_everything_fits_it_is_top_k_to_the_bit", 7_000),
    ("the_place_in_the_batch_does_not_matter", 6_000),
    ("the_names_of_experts_do_not_matter", 5_000),
    ("prices_of_any_kind_give_a_bound", 8_000),
    ("stale_prices_break_nothing", 4_000),
    ("kept_slots_are_the_maximum_flow", 9_000),
    ("quota_keeps_all_that_has_room", 4_000),
    ("the_solver_finds_what_trying_everything_finds", 2_000),
    ("small_batches_are_as_good_as_can_be", 6_000),
    ("small_batches_are_within_the_gap_of_the_optimum", 6_000),
    ("quarters_of_a_batch_survive_alike", 24),
    ("layers_draw_differently", 200),
];

fn variable(name: &str) -> Option<u64> {
    let value = std::env::var(name).ok()?;
    Some(value.parse().unwrap_or_else(|_| panic!("{name} is {value}: expected a whole number")))
}

/// How many cases the property called `name` has in this run.
pub fn count(name: &str) -> u32 {
    let listed = CASES.iter().find(|(listed, _)| *listed == name);
    let (_, count) = listed.unwrap_or_else(|| panic!("`{name}` is not in the table of cases"));
    let times = variable("PHASE_MOE_CASES").unwrap_or(1);
    u32::try_from(times * u64::from(*count)).expect("a number of cases below 2^32")
}

/// Runs `test` on what `strategy` draws, as often as the table says, and shrinks what fails.
pub fn property<S: Strategy>(name: &str, strategy: S, test: impl Fn(S::Value))
where
    S::Value: Debug,
{
    let config = Config {
        cases: count(name),
        rng_seed: RngSeed::Fixed(variable("PHASE_MOE_SEED").unwrap_or(0)),
        failure_persistence: None,
        max_shrink_iters: 2_000,
        ..Config::default()
    };
    let outcome = TestRunner::new(config).run(&strategy, |value| {
        test(value);
        Ok(())
    });
    if let Err(error) = outcome {
        panic!("{name}: {error}");
    }
}

#[test]
fn there_are_a_hundred_thousand_cases() {
    let total: u32 = CASES.iter().map(|(_, cases)| cases).sum();
    assert!(total >= 100_000, "{total}");
}
