//! Whether a router's answer is one: [`check_assignment`] holds an assignment against the request it answers and what the router says of
//! itself. Every user of a router in this crate calls it before the answer is used, so that a router from outside gives an error
//! and never a panic, zeros or figures of something else.
//!
//! | of | what must hold |
//! |---|---|
//! | the table | as many tokens, experts and slots per token as the request |
//! | a token | at most `top_k` experts, where the router keeps top_k; distinct, in range, none of them masked (a group that is not allowed is a mask); none at all for padding |
//! | a weight | finite, 0 in a dropped slot, else `gate score · scale`; normalised: in proportion to the gate scores, sum `scale`, less only where a slot was dropped |
//! | a limit | no expert or device above it, where the router respects capacity |
//! | the bound | not below the gate mass that was kept |
//!
//! Costs a few operations a slot and allocates nothing for a token of at most sixteen experts without limits
//! (`cargo bench --bench plan` measures it).
//!
//! ```
//! use phase_moe::{Assignment, Capacity, Logits, RouteContext, RouteRequest, Scoring, TopK, check_assignment};
//!
//! let scores = Scoring::softmax().scores(&Logits::new(&[2.0, 1.0, f32::NEG_INFINITY], 1, 3)?, None)?;
//! let capacity = Capacity::unlimited(3)?;
//! let request = RouteRequest::new(&scores, 1, &capacity, RouteContext::default())?;
//! let masked = Assignment::from_parts(3, 1, &[2], &[0.0])?;
//! let error = check_assignment(&TopK::default(), &request, &masked).unwrap_err();
//! assert_eq!(error.to_string(), "router top-k: token 0: expected experts that are not masked, got expert 2");
//! # Ok::<(), phase_moe::Error>(())
//! ```
//!
//! Knows nothing of how good an answer is.

use crate::error::{AnswerFault, Breach, Error, Result};
use crate::routing::assignment::Assignment;
use crate::routing::metrics::gate_mass;
use crate::routing::router::{RouteRequest, Router, TokenRequest};
use crate::routing::scores::Scores;
use crate::routing::slots::EMPTY;

/// Experts of a token up to which each is compared with those before it; above, a table says which were seen.
const FEW: usize = 16;

/// How far a weight may be from what the gate scores say: routers may round in another order, and in less than `f32`'s last bits.
const RELATIVE: f64 = 1e-3;

/// Weights as small as this have too few bits to be compared by their ratio.
const TINY: f64 = 1e-36;

/// Checks that `assignment` is an answer to `request` such as `router` says it gives.
///
/// # Errors
/// [`Error::Answer`] with the router, the token, expert or device, what was expected and what came: the first breach that is found.
pub fn check_assignment(router: &dyn Router, request: &RouteRequest<'_>, assignment: &Assignment) -> Result<()> {
    let found = check_table(router, request, assignment)
        .and_then(|()| check_limits(router, request, assignment))
        .and_then(|()| check_bound(request, assignment));
    found.map_err(|breach| Error::Answer(AnswerFault { router: router.name(), breach }))
}

/// The same of an answer of [`Router::route_token`], but for what only gate scores tell: that weights are in proportion to them.
/// Allocates nothing.
pub(crate) fn check_token(router: &dyn Router, request: &TokenRequest<'_>, assignment: &Assignment) -> Result<()> {
    let found = || {
        let (logits, most) = (request.logits(), request.top_k());
        check_sizes([1, logits.len(), most], assignment)?;
        let (chosen, weights) = (assignment.raw(), assignment.weights());
        for (slot, (&id, &weight)) in chosen.iter().zip(weights).enumerate() {
            let expert = (id != EMPTY).then_some(usize::from(id));
            if !weight.is_finite() || (expert.is_none() && weight != 0.0) {
                let expected = expert.is_none().then_some(0.0);
                return Err(Breach::Weight { token: 0, expert, expected, got: weight.into() });
            }
            let Some(expert) = expert else { continue };
            match logits.get(expert) {
                None => return Err(Breach::OutOfRange { token: 0, expert, experts: logits.len() }),
                Some(&logit) if logit == f32::NEG_INFINITY => return Err(Breach::Masked { token: 0, expert }),
                _ if chosen[..slot].contains(&id) => return Err(Breach::Twice { token: 0, expert }),
                _ => {}
            }
        }
        match chosen.iter().filter(|id| **id != EMPTY).count() {
            got if got > most => Err(Breach::TooMany { token: 0, most, got }),
            _ => Ok(()),
        }
    };
    found().map_err(|breach| Error::Answer(AnswerFault { router: router.name(), breach }))
}

/// Checks tokens, experts and slots per token.
fn check_sizes(expected: [usize; 3], assignment: &Assignment) -> Result<(), Breach> {
    let got = [assignment.tokens(), assignment.experts(), assignment.top_k()];
    let sizes = ["tokens", "experts", "top_k"].into_iter().zip(expected).zip(got);
    match sizes.into_iter().find(|((_, expected), got)| expected != got) {
        Some(((operand, expected), got)) => Err(Breach::Size { operand, expected, got }),
        None => Ok(()),
    }
}

fn check_table(router: &dyn Router, request: &RouteRequest<'_>, assignment: &Assignment) -> Result<(), Breach> {
    let scores = request.scores();
    check_sizes([scores.tokens(), scores.experts(), request.top_k()], assignment)?;
    let most = if router.keeps_top_k() { request.top_k() } else { scores.experts() };
    // A batch without tokens has no width that would mean anything.
    let width = assignment.width().max(1);
    let mut seen = vec![0; if width > FEW { scores.experts() } else { 0 }];
    let rows = assignment.raw().chunks_exact(width).zip(assignment.weights().chunks_exact(width));
    for (token, (chosen, weights)) in rows.enumerate() {
        check_experts(request, token, chosen, most, assignment.is_outside_groups(), &mut seen)?;
        check_weights(scores, token, chosen, weights)?;
    }
    Ok(())
}

/// `seen` holds for every expert the last token that had it, plus 1; it is empty where tokens have few experts. With `any_group` an expert
/// is masked only where its logit is, which leaves it no score.
fn check_experts(
    request: &RouteRequest<'_>,
    token: usize,
    chosen: &[u16],
    most: usize,
    any_group: bool,
    seen: &mut [usize],
) -> Result<(), Breach> {
    let (scores, padding, mut kept) = (request.scores(), request.is_padding(token), 0);
    let (experts, selection) = (scores.experts(), scores.selection(token));
    for (slot, &id) in chosen.iter().enumerate().filter(|(_, id)| **id != EMPTY) {
        let expert = usize::from(id);
        let Some(&score) = selection.get(expert) else { return Err(Breach::OutOfRange { token, expert, experts }) };
        if padding {
            return Err(Breach::Padding { token, expert });
        }
        if score == f32::NEG_INFINITY && !(any_group && scores.gate(token)[expert] > 0.0) {
            return Err(Breach::Masked { token, expert });
        }
        let twice = match seen.get_mut(expert) {
            Some(seen) => std::mem::replace(seen, token + 1) == token + 1,
            None => chosen[..slot].contains(&id),
        };
        if twice {
            return Err(Breach::Twice { token, expert });
        }
        kept += 1;
    }
    match kept > most {
        true => Err(Breach::TooMany { token, most, got: kept }),
        false => Ok(()),
    }
}

fn check_weights(scores: &Scores, token: usize, chosen: &[u16], weights: &[f32]) -> Result<(), Breach> {
    let (gate, scale) = (scores.gate(token), f64::from(scores.scale()));
    let near = |got: f64, expected: f64| (got - expected).abs() <= RELATIVE * expected.abs() + TINY;
    let slots = || chosen.iter().zip(weights).map(|(&id, &weight)| (id, f64::from(weight)));
    let kept = || slots().filter(|(id, _)| *id != EMPTY).map(|(id, got)| (id, f64::from(gate[usize::from(id)]), got));
    let (mut mass, mut sum, mut dropped) = (0.0, 0.0, false);
    for (id, got) in slots() {
        let expert = (id != EMPTY).then_some(usize::from(id));
        let expected = match expert {
            None if got != 0.0 => Some(0.0),
            Some(expert) if !scores.normalize() => Some(f64::from(gate[expert]) * scale),
            _ => None,
        };
        if !got.is_finite() || expected.is_some_and(|expected| !near(got, expected)) {
            return Err(Breach::Weight { token, expert, expected, got });
        }
        (mass, sum, dropped) =
            (mass + expert.map_or(0.0, |expert| f64::from(gate[expert])), sum + got, dropped || expert.is_none());
    }
    if !scores.normalize() {
        return Ok(());
    }
    // Without any mass there is nothing that a share could be of.
    let factor = if mass > 0.0 { sum / mass } else { 0.0 };
    for (id, gate, got) in kept() {
        if !near(got, gate * factor) {
            return Err(Breach::Weight { token, expert: Some(id.into()), expected: Some(gate * factor), got });
        }
    }
    if mass == 0.0 {
        return Ok(());
    }
    // Each of as many roundings may have gone the same way.
    let room = scale.abs() * (RELATIVE + chosen.len() as f64 * f64::from(f32::EPSILON)) + TINY;
    // What was dropped had a part of at least nothing and at most all.
    let (least, most) = if dropped { (scale.min(0.0), scale.max(0.0)) } else { (scale, scale) };
    match least - room <= sum && sum <= most + room {
        true => Ok(()),
        false => Err(Breach::WeightSum { token, expected: scale, got: sum }),
    }
}

fn check_limits(router: &dyn Router, request: &RouteRequest<'_>, assignment: &Assignment) -> Result<(), Breach> {
    let capacity = request.capacity();
    let Some(limits) = capacity.limits().filter(|_| router.respects_capacity()) else { return Ok(()) };
    let mut loads = vec![0u32; limits.len()];
    for &expert in assignment.raw().iter().filter(|&&expert| expert != EMPTY) {
        loads[capacity.pool_of(expert)] += 1;
    }
    let pool = if capacity.placement().is_some() { "device" } else { "expert" };
    match loads.iter().zip(limits).position(|(load, limit)| load > limit) {
        Some(id) => Err(Breach::OverLimit { pool, id, limit: limits[id], got: loads[id] }),
        None => Ok(()),
    }
}

fn check_bound(request: &RouteRequest<'_>, assignment: &Assignment) -> Result<(), Breach> {
    let Some(bound) = assignment.gate_mass_bound() else { return Ok(()) };
    let mass = gate_mass(request, assignment.raw(), assignment.width().max(1));
    // Written so that a bound that is no number is none.
    match mass <= bound + 1e-6 * (1.0 + bound.abs()) {
        true => Ok(()),
        false => Err(Breach::Bound { bound, mass }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::routing::capacity::{Capacity, Placement};
    use crate::routing::logits::Logits;
    use crate::routing::router::{RouteContext, RouteState, Scratch};
    use crate::routing::scores::Scoring;

    /// A router that says these of itself.
    struct Says {
        respects_capacity: bool,
        keeps_top_k: bool,
    }

    impl Router for Says {
        fn name(&self) -> &'static str {
            "says"
        }

        fn respects_capacity(&self) -> bool {
            self.respects_capacity
        }

        fn keeps_top_k(&self) -> bool {
            self.keeps_top_k
        }

        fn route_into(
            &self,
            _: &RouteRequest<'_>,
            _: &mut RouteState,
            _: &mut Scratch,
            _: &mut Assignment,
        ) -> Result<()> {
            unreachable!("only its answers are looked at")
        }
    }

    const GATES: [f32; 4] = [0.4, 0.3, 0.2, 0.1];
    const STRICT: Says = Says { respects_capacity: true, keeps_top_k: true };
    const LOOSE: Says = Says { respects_capacity: false, keeps_top_k: false };

    /// Three tokens, of four experts: the first may go anywhere, the second not to expert 2, the third is padding. Device 0 has
    /// experts 0 and 1 and room for two slots, device 1 has the others and room for one.
    fn message(router: &Says, normalize: bool, answer: impl FnOnce(&Scores) -> Assignment) -> String {
        let mut logits: Vec<f32> = [GATES; 3].as_flattened().iter().map(|gate| gate.ln()).collect();
        logits[6] = f32::NEG_INFINITY;
        let logits = Logits::new(&logits, 3, 4).unwrap();
        let scores = Scoring { scale: 2.0, ..Scoring::softmax().normalized(normalize) }.scores(&logits, None).unwrap();
        let capacity = Capacity::per_device(Placement::contiguous(4, 2).unwrap(), vec![2, 1]).unwrap();
        let context = RouteContext { padding: Some(&[false, false, true]), ..RouteContext::default() };
        let request = RouteRequest::new(&scores, 2, &capacity, context).unwrap();
        check_assignment(router, &request, &answer(&scores)).map_or_else(|error| error.to_string(), |()| "fine".into())
    }

    /// Ids with −1 in dropped slots, weighed as the trait wants it.
    fn of(top_k: usize, width: usize, ids: &[i32]) -> impl Fn(&Scores) -> Assignment {
        let raw: Vec<u16> = ids.iter().map(|&id| if id < 0 { EMPTY } else { id as u16 }).collect();
        assert_eq!(raw.len() % width, 0);
        move |scores| Assignment::from_chosen(scores, top_k, raw.clone(), None)
    }

    #[test]
    fn each_rule_is_held() {
        let table: &[(&Says, &[i32], &str)] = &[
            (&STRICT, &[0, 3, 1, -1, -1, -1], "fine"),
            (&STRICT, &[-1, -1, -1, -1, -1, -1], "fine"),
            (&STRICT, &[3, 3, 1, -1, -1, -1], "router says: token 0: expected distinct experts, got expert 3 twice"),
            (
                &STRICT,
                &[0, 3, 2, -1, -1, -1],
                "router says: token 1: expected experts that are not masked, got expert 2",
            ),
            (&STRICT, &[0, 3, 1, -1, -1, 0], "router says: padding token 2: expected no expert, got expert 0"),
            (&STRICT, &[0, 3, 3, -1, -1, -1], "router says: device 1: expected at most 1 slots, got 2"),
            (&LOOSE, &[0, 3, 3, -1, -1, -1], "fine"),
            (&STRICT, &[0, 1, 0, -1, -1, -1], "router says: device 0: expected at most 2 slots, got 3"),
            (&STRICT, &[0, 1, 3, 2, -1, 0, -1, -1, -1], "router says: token 0: expected at most 2 experts, got 3"),
            (&LOOSE, &[0, 1, 3, 1, -1, 0, -1, -1, -1], "fine"),
            (
                &LOOSE,
                &[0, 1, 0, 1, -1, 0, -1, -1, -1],
                "router says: token 0: expected distinct experts, got expert 0 twice",
            ),
        ];
        for (router, ids, wanted) in table {
            for normalize in [false, true] {
                assert_eq!(message(router, normalize, of(2, ids.len() / 3, ids)), *wanted, "{ids:?} {normalize}");
            }
        }
        // As wide as only a table of which were seen is asked.
        let mut wide = vec![-1; 3 * (FEW + 1)];
        (wide[0], wide[FEW]) = (1, 1);
        let wanted = "router says: token 0: expected distinct experts, got expert 1 twice";
        assert_eq!(message(&LOOSE, true, of(2, FEW + 1, &wide)), wanted);
        // The same expert in the next token is another slot.
        (wide[FEW], wide[FEW + 1]) = (-1, 1);
        assert_eq!(message(&LOOSE, true, of(2, FEW + 1, &wide)), "fine");
    }

    #[test]
    fn the_table_is_that_of_the_request() {
        let parts = |experts, top_k, ids: &'static [i32]| {
            move |_: &Scores| Assignment::from_parts(experts, top_k, ids, &vec![0.0; ids.len()]).unwrap()
        };
        let none: &[i32] = &[-1; 6];
        assert_eq!(message(&STRICT, true, parts(4, 2, none)), "fine");
        for (answer, wanted) in [
            (parts(4, 2, &none[..4]), "tokens of the assignment: expected 3, got 2"),
            (parts(4, 2, &[]), "tokens of the assignment: expected 3, got 0"),
            (parts(5, 2, none), "experts of the assignment: expected 4, got 5"),
            (parts(4, 1, &none[..3]), "top_k of the assignment: expected 2, got 1"),
        ] {
            assert_eq!(message(&LOOSE, true, answer), format!("router says: {wanted}"));
        }
        let untouched = |_: &Scores| Assignment::default();
        assert_eq!(message(&STRICT, true, untouched), "router says: tokens of the assignment: expected 3, got 0");
    }

    #[test]
    fn weights_are_those_of_the_gate() {
        let weighed = |weights: [f32; 2]| {
            move |scores: &Scores| {
                let mut made = Assignment::default();
                let (ids, all) = made.refill(scores, 2);
                ids.fill(EMPTY);
                all.fill(0.0);
                (ids[0], ids[1]) = (0, 3);
                all[..2].copy_from_slice(&weights);
                made
            }
        };
        let dropped = |weights: [f32; 2]| {
            move |scores: &Scores| {
                let mut made = weighed(weights)(scores);
                made.refill(scores, 2).0[1] = EMPTY;
                made
            }
        };
        // The scale is 2, the gate scores are 0.4 and 0.1.
        for (normalize, weights, wanted) in [
            (false, [0.8, 0.2], "fine"),
            (false, [0.8001, 0.2], "fine"),
            (false, [0.8, 0.1], "expert 3: expected 0.2, got 0.1"),
            (false, [0.8, f32::INFINITY], "expert 3: expected 0.2, got inf"),
            (true, [1.6, 0.4], "fine"),
            (true, [1.0, 1.0], "expert 0: expected 1.6, got 1"),
            (true, [f32::NAN, 0.4], "expert 0: expected a finite number, got NaN"),
            (true, [0.8, 0.2], "a sum of 2, less where slots were dropped, got 1"),
        ] {
            let got = message(&LOOSE, normalize, weighed(weights));
            // Logarithms and exponentials were in between.
            let got = rounded(&got);
            assert!(got == wanted || got.ends_with(wanted), "{normalize} {weights:?}: {got}");
        }
        for (normalize, weights, wanted) in [
            (false, [0.8, 0.0], "fine"),
            (true, [1.6, 0.0], "fine"),
            (true, [0.4, 0.0], "fine"),
            (true, [2.5, 0.0], "a sum of 2, less where slots were dropped, got 2.5"),
            (true, [-0.4, 0.0], "a sum of 2, less where slots were dropped, got -0.4"),
            (true, [1.6, 0.4], "a dropped slot: expected 0, got 0.4"),
            (false, [0.8, 1e-3], "a dropped slot: expected 0, got 0.001"),
        ] {
            let got = rounded(&message(&LOOSE, normalize, dropped(weights)));
            assert!(got == wanted || got.ends_with(wanted), "{normalize} {weights:?}: {got}");
        }
    }

    /// Numbers of a message to four digits.
    fn rounded(message: &str) -> String {
        let round = |word: &str| {
            let (number, rest) = word.split_at(word.len() - usize::from(word.ends_with(',')));
            match number.parse::<f64>() {
                Ok(number) if number.is_finite() => format!("{}{rest}", (number * 1e4).round() / 1e4),
                _ => word.into(),
            }
        };
        message.split(' ').map(round).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_bound_is_above_what_was_kept() {
        let bounded = |bound: f64| {
            move |scores: &Scores| {
                let mut made = of(2, 2, &[0, 3, 1, -1, -1, -1])(scores);
                made.set_gate_mass_bound(bound);
                made
            }
        };
        // 0.4 + 0.1 of the first token, 0.3 of 0.8 of the second.
        assert_eq!(message(&STRICT, true, bounded(0.875)), "fine");
        for bound in [0.87, f64::NAN] {
            let got = message(&STRICT, true, bounded(bound));
            assert!(
                got.starts_with(&format!("router says: gate mass: expected at most its bound {bound}, got 0.87")),
                "{got}"
            );
        }
    }
}
