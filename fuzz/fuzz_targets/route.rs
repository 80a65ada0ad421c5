//! Raw bytes to a request of any shape: whatever is accepted must be routed, by every router, within the invariants.

#![no_main]

#[path = "../../src/routing/tests/properties/invariants.rs"]
mod invariants;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::{Corpus, fuzz_target};
// Some of it is what `invariants` finds in its crate.
#[rustfmt::skip]
use phase_moe::{Assignment, Capacity, DispatchPlan, ExpertId, ExpertSet, Logits, Placement, RouteContext, RouteMetrics, RouteRequest, RouteState, Router, RouterKind, Scoring, Scratch, check_assignment};
use phase_moe::routing::{self, GroupLimit, GroupScore, ScoreFunction};

/// A logit: often an ordinary one or a mask, sometimes any bits at all.
fn logit(bytes: &mut Unstructured<'_>) -> Result<f32> {
    let tag: u8 = bytes.arbitrary()?;
    Ok(match tag {
        0..=199 => (f32::from(tag) - 100.0) / 16.0,
        200..=219 => f32::NEG_INFINITY,
        220..=239 => f32::from(bytes.arbitrary::<i8>()?),
        _ => f32::from_bits(bytes.arbitrary()?),
    })
}

fn many<T>(
    bytes: &mut Unstructured<'_>,
    count: usize,
    one: impl Fn(&mut Unstructured<'_>) -> Result<T>,
) -> Result<Vec<T>> {
    (0..count).map(|_| one(bytes)).collect()
}

fn limit(bytes: &mut Unstructured<'_>) -> Result<u32> {
    let tag: u8 = bytes.arbitrary()?;
    Ok(if tag < 240 { u32::from(tag % 48) } else { bytes.arbitrary()? })
}

fn scoring(bytes: &mut Unstructured<'_>) -> Result<Scoring> {
    let flags: u8 = bytes.arbitrary()?;
    let score = if flags & 1 == 0 { GroupScore::Max } else { GroupScore::TopTwo };
    let groups = match flags & 2 {
        0 => None,
        _ => Some(GroupLimit { groups: bytes.int_in_range(0..=8)?, top_groups: bytes.int_in_range(0..=8)?, score }),
    };
    Ok(Scoring {
        function: if flags & 4 == 0 { ScoreFunction::Softmax } else { ScoreFunction::Sigmoid },
        normalize: flags & 8 == 0,
        scale: if flags & 16 == 0 { 1.0 } else { f32::from_bits(bytes.arbitrary()?) },
        groups,
    })
}

fn capacity(bytes: &mut Unstructured<'_>, experts: usize) -> Result<Capacity> {
    Ok(match bytes.int_in_range(0..=7)? {
        0 => Capacity::unlimited(experts),
        1..=4 => Capacity::per_expert(many(bytes, experts, limit)?),
        _ => {
            let devices: u16 = bytes.int_in_range(1..=9)?;
            let device_of = many(bytes, experts, |bytes| Ok(bytes.arbitrary::<u16>()? % devices))?;
            let placement = Placement::new(device_of, usize::from(devices)).expect("devices are in range");
            Capacity::per_device(placement, many(bytes, usize::from(devices), limit)?)
        }
    }
    .expect("made of the right lengths"))
}

fn run(bytes: &mut Unstructured<'_>) -> Result<()> {
    let (mut state, mut scratch, mut dirty) = (RouteState::default(), Scratch::default(), Assignment::default());
    for _ in 0..bytes.int_in_range(1..=2)? {
        batch(bytes, &mut state, &mut scratch, &mut dirty)?;
    }
    Ok(())
}

fn batch(
    bytes: &mut Unstructured<'_>,
    state: &mut RouteState,
    scratch: &mut Scratch,
    dirty: &mut Assignment,
) -> Result<()> {
    let (experts, tokens): (usize, usize) = (bytes.int_in_range(1..=40)?, bytes.int_in_range(0..=48)?);
    let (top_k, kind) = (bytes.int_in_range(1..=experts)?, *bytes.choose(&RouterKind::ALL)?);
    let seed: u64 = bytes.arbitrary()?;
    let (scoring, capacity) = (scoring(bytes)?, capacity(bytes, experts)?);
    let flags: u8 = bytes.arbitrary()?;
    let bias = if flags & 1 == 0 { None } else { Some(many(bytes, experts, logit)?) };
    let padding = if flags & 2 == 0 { None } else { Some(many(bytes, tokens, |bytes| bytes.ratio(1, 4))?) };
    let ids = if flags & 4 == 0 { None } else { Some(many(bytes, tokens, |bytes| bytes.arbitrary::<u32>())?) };
    let mut resident = ExpertSet::new(experts).expect("experts are in range");
    resident.insert(ExpertId::new(seed as usize % experts, experts).expect("below experts"));
    let values = many(bytes, tokens * experts, logit)?;

    let logits = Logits::new(&values, tokens, experts);
    assert_eq!(logits.is_ok(), values.iter().all(|value| *value < f32::INFINITY));
    let Ok(logits) = logits else { return Ok(()) };
    let Ok(scores) = scoring.scores(&logits, bias.as_deref()) else { return Ok(()) };
    let context = RouteContext {
        layer: usize::from(flags),
        token_ids: ids.as_deref(),
        padding: padding.as_deref(),
        step: seed,
        resident: (flags & 8 != 0).then_some(&resident),
    };
    let request = RouteRequest::new(&scores, top_k, &capacity, context).expect("parts that belong together");
    let router = kind.build(seed);
    let mut cold = RouteState::default();
    let assignment = router.route(&request, &mut cold).expect("a valid request");
    invariants::check(&request, &assignment, &*router);
    if kind == RouterKind::Phase {
        invariants::check_prices(&request, &cold, invariants::gate_mass(&request, &assignment));
    }
    // Again from whatever the batch before left.
    router.route_into(&request, state, scratch, dirty).expect("a valid request");
    invariants::check(&request, dirty, &*router);
    assert_eq!(dirty.kept(), assignment.kept());
    if kind != RouterKind::Phase {
        assert_eq!(*dirty, assignment);
    }
    Ok(())
}

fuzz_target!(|data: &[u8]| -> Corpus {
    match run(&mut Unstructured::new(data)) {
        Ok(()) => Corpus::Keep,
        Err(_) => Corpus::Reject,
    }
});
