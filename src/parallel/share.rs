//! Who holds what: which tokens of a batch are a rank's own, which experts are on it, and which rows go from whom to whom.
//!
//! Every rank derives the same from the same assignment. Knows nothing of messages.

use std::ops::Range;

use crate::routing::assignment::Assignment;
use crate::routing::capacity::Placement;
use crate::routing::slots::EMPTY;

/// How the rows of a batch, `[sequences · positions]`, are shared out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// First row of each rank's own, and the end of the last one's; of a batch that all ranks have whole, all begin at 0.
    starts: Vec<usize>,
    rows: usize,
    whole: bool,
}

impl Share {
    /// Whole sequences for each rank in turn, as evenly as they go, or the whole batch for all of them where there are fewer sequences than
    /// ranks.
    pub(crate) fn new(ranks: usize, sequences: usize, positions: usize) -> Self {
        let rows = sequences * positions;
        match sequences < ranks || ranks < 2 {
            true => Self::whole(ranks, rows),
            false => {
                let starts = (0..=ranks).map(|rank| rank * sequences / ranks * positions).collect();
                Self { starts, rows, whole: false }
            }
        }
    }

    /// All rows for every rank.
    pub(crate) fn whole(ranks: usize, rows: usize) -> Self {
        Self { starts: vec![0; ranks + 1], rows, whole: true }
    }

    /// True where every rank has all rows.
    pub(crate) fn is_whole(&self) -> bool {
        self.whole
    }

    /// The rows that a rank runs.
    pub(crate) fn rows_of(&self, rank: usize) -> Range<usize> {
        if self.whole { 0..self.rows } else { self.starts[rank]..self.starts[rank + 1] }
    }

    /// The rows whose numbers a rank gives to all others: of a batch that all have whole, rank 0 gives everything, so that all go by the same bits.
    pub(crate) fn given_by(&self, rank: usize) -> Range<usize> {
        match (self.whole, rank) {
            (true, 0) => 0..self.rows,
            (true, _) => 0..0,
            (false, rank) => self.rows_of(rank),
        }
    }

    /// All rows.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }
}

/// Which rows meet which rank's experts, of one assignment: ascending rows for each pair of ranks.
#[derive(Debug, Default)]
pub(super) struct Routes {
    /// `to[rank]`: this rank's own rows that want experts of `rank`; of a whole batch, all rows that do.
    pub(super) to: Vec<Vec<u32>>,
    /// `from[rank]`: rows of `rank` that want experts of this one.
    pub(super) from: Vec<Vec<u32>>,
    /// Rows that go from a rank to another one, all ranks together.
    pub(super) sent: u64,
    /// Pairs of ranks between which some go.
    pub(super) messages: u64,
}

impl Routes {
    /// Fills in the routes of an assignment, of all rows.
    pub(super) fn refill(&mut self, assignment: &Assignment, placement: &Placement, share: &Share, rank: usize) {
        let (ranks, width) = (placement.devices(), assignment.width().max(1));
        let Self { to, from, sent, messages } = self;
        for rows in [&mut *to, &mut *from] {
            rows.resize(ranks, Vec::new());
            rows.iter_mut().for_each(Vec::clear);
        }
        let mut counts = vec![0u64; ranks * ranks];
        let mut wanted = vec![false; ranks];
        let (mut home, mut row) = (0, 0u32);
        for slots in assignment.raw().chunks_exact(width) {
            while !share.is_whole() && share.rows_of(home).end <= row as usize {
                home += 1;
            }
            for &expert in slots.iter().filter(|&&expert| expert != EMPTY) {
                wanted[usize::from(placement.device_of()[usize::from(expert)])] = true;
            }
            for (device, wanted) in wanted.iter_mut().enumerate().filter(|(_, wanted)| **wanted) {
                *wanted = false;
                if share.is_whole() || home == rank {
                    to[device].push(row);
                }
                if !share.is_whole() && device == rank {
                    from[home].push(row);
                }
                counts[home * ranks + device] += 1;
            }
            row += 1;
        }
        let others = (0..ranks * ranks).filter(|at| share.is_whole() || at / ranks != at % ranks).map(|at| counts[at]);
        (*sent, *messages) = others.fold((0, 0), |(sent, pairs), count| (sent + count, pairs + u64::from(count > 0)));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sequences_are_shared_whole_and_few_are_everybodys() {
        let rows = |ranks, sequences, positions| {
            let share = Share::new(ranks, sequences, positions);
            (0..ranks).map(|rank| share.rows_of(rank)).collect::<Vec<_>>()
        };
        assert_eq!(rows(2, 5, 10), [0..20, 20..50]);
        assert_eq!(rows(3, 3, 1), [0..1, 1..2, 2..3]);
        assert_eq!(rows(3, 2, 7), [0..14, 0..14, 0..14]);
        let whole = Share::new(3, 2, 7);
        assert!(whole.is_whole() && whole.given_by(0) == (0..14) && whole.given_by(1).is_empty());
    }

    #[test]
    fn a_row_goes_once_to_each_rank_that_has_experts_of_it() {
        // Four experts on two ranks; four rows, two of each rank.
        let placement = Placement::contiguous(4, 2).unwrap();
        let assignment =
            Assignment::from_parts(4, 2, &[0, 1, 1, 2, -1, -1, 3, 2], &[1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
                .unwrap();
        let share = Share::new(2, 2, 2);
        let mut routes = Routes::default();
        routes.refill(&assignment, &placement, &share, 0);
        assert_eq!((&routes.to, &routes.from), (&vec![vec![0, 1], vec![1]], &vec![vec![0, 1], vec![]]));
        assert_eq!((routes.sent, routes.messages), (1, 1));
        routes.refill(&assignment, &placement, &share, 1);
        assert_eq!((&routes.to, &routes.from), (&vec![vec![], vec![3]], &vec![vec![1], vec![3]]));
        // Whole batches: every rank's rows go to all others.
        routes.refill(&assignment, &placement, &Share::new(2, 1, 4), 1);
        assert_eq!(routes.to, [vec![0, 1], vec![1, 3]]);
        assert_eq!((routes.sent, routes.messages), (4, 2));
    }
}
