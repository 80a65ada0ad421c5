//! Combine weights to the last bit where they are gate scores, by one factor a token where they are normalised.

use crate::{Assignment, RouteRequest};

/// Numbers as small as this have too few bits to be compared by their ratio.
const TINY: f64 = 1e-36;

/// Checks the weights of every token.
pub fn check(request: &RouteRequest<'_>, assignment: &Assignment) {
    let (ids, width): (Vec<i32>, usize) = (assignment.ids().collect(), assignment.width());
    for token in 0..request.scores().tokens() {
        check_token(request, assignment, &ids[token * width..(token + 1) * width], token);
    }
}

/// Weights of a token are gate scores to the last bit, or have one factor.
fn check_token(request: &RouteRequest<'_>, assignment: &Assignment, ids: &[i32], token: usize) {
    let (scores, width) = (request.scores(), assignment.width());
    let weights = &assignment.weights()[token * width..(token + 1) * width];
    let gate = scores.gate(token);
    let mut factors = Vec::new();
    for (&id, &weight) in ids.iter().zip(weights) {
        if id < 0 {
            assert_eq!(id, -1, "token {token}");
            continue;
        }
        let expert = id as usize;
        if scores.normalize() {
            // Scores this small have too few bits for a ratio to mean anything.
            if gate[expert] > 1e-30 && weight.abs() > 1e-30 {
                factors.push(f64::from(weight) / f64::from(gate[expert]));
            }
        } else {
            assert_eq!(weight, gate[expert] * scores.scale(), "token {token}: expert {expert}");
        }
    }
    // One factor for the whole token; with all slots kept the weights sum to the scale.
    let near = |a: f64, b: f64| (a - b).abs() <= 1e-5 * a.abs().max(b.abs());
    assert!(factors.windows(2).all(|pair| near(pair[0], pair[1])), "token {token}: factors {factors:?}");
    let (sum, scale) = (weights.iter().map(|&weight| f64::from(weight)).sum::<f64>(), f64::from(scores.scale()));
    let held: f64 = ids.iter().filter(|&&id| id >= 0).map(|&id| f64::from(gate[id as usize])).sum();
    if scores.normalize() && held > 0.0 {
        assert!(sum.abs() <= scale.abs() * (1.0 + 1e-4) + TINY, "token {token}: weights sum to {sum} of {scale}");
        if ids.iter().all(|&id| id >= 0) {
            assert!(
                near(sum, scale) || (sum - scale).abs() <= 1e-4 * scale.abs() + TINY,
                "token {token}: {sum} of {scale}"
            );
        }
    }
}
