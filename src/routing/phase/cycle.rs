//! Cycles in a graph given as a matrix of arc costs: one step of lowering labels, and the rings that the steps leave.
//!
//! `label_a ← min over b of (label_b + cost_ab)`; which pool each follows is kept, and a ring of followers is a cycle of negative
//! cost (Bellman–Ford from any labels). Where no label can be lowered there is no such cycle.
//!
//! Knows nothing of what nodes and costs stand for.

/// The cost of an arc that cannot be taken.
pub(super) const NEVER: i64 = 1 << 62;

/// Labels are starting points, and kept this small so that sums stay in range.
pub(super) const FAR: i64 = 1 << 58;

/// The lowest label that the arcs of a node allow, where it is below the node's `own`, and the end of that arc.
#[inline]
pub(super) fn least(costs: &[i64], labels: &[i64], own: i64) -> Option<(i64, usize)> {
    let sums = || costs.iter().zip(labels).map(|(cost, label)| cost + label);
    let least = sums().fold(NEVER, i64::min);
    // An arc that cannot be taken is far above any label.
    if least >= own || least >= NEVER / 2 {
        return None;
    }
    Some((least, sums().position(|sum| sum == least)?))
}

/// The rings of a graph in which every node has at most one next.
pub(super) fn rings(next: &[usize]) -> Vec<Vec<usize>> {
    let mut seen = vec![usize::MAX; next.len()];
    let mut rings = Vec::new();
    for start in 0..next.len() {
        let mut node = start;
        while node < next.len() && seen[node] == usize::MAX {
            seen[node] = start;
            node = next[node];
        }
        if node < next.len() && seen[node] == start {
            let mut ring = vec![node];
            while next[ring[ring.len() - 1]] != node {
                ring.push(next[ring[ring.len() - 1]]);
            }
            rings.push(ring);
        }
    }
    rings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_found_once_and_tails_are_not() {
        let none = usize::MAX;
        assert_eq!(rings(&[1, 2, 0, 0, none, 5]), [vec![0, 1, 2], vec![5]]);
        assert!(rings(&[1, 2, none]).is_empty());
    }

    #[test]
    fn labels_fall_along_the_cheapest_arc_alone() {
        assert_eq!(least(&[NEVER, 3, 2, 2], &[0, 0, 1, 0], 5), Some((2, 3)));
        assert_eq!(least(&[NEVER, 3], &[0, 2], 5), None);
        assert_eq!(least(&[NEVER, NEVER], &[-FAR, 0], FAR), None);
    }
}
