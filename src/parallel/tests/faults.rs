//! Ranks that differ, and messages that are not what they should be: an error that names the rank, on every rank that can know of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::{Thread, each};
use crate::error::Result;
use crate::parallel::message::{HEAD, Kind};
use crate::parallel::{Ranks, World};

/// What happens to a message.
type Spoil = fn(&mut [u8]);

/// A world whose calls go wrong on rank 0 from some message of rank 1 on.
#[derive(Debug)]
struct Faulty {
    inner: Thread,
    calls: AtomicUsize,
    /// The call that is spoilt, and how.
    at: usize,
    spoil: Spoil,
}

impl Faulty {
    fn spoil(&self, sizes: &[usize], received: &mut [u8]) {
        if self.calls.fetch_add(1, Ordering::Relaxed) == self.at && self.rank() == 0 {
            let start: usize = sizes[..1].iter().sum();
            (self.spoil)(&mut received[start..start + sizes[1]]);
        }
    }
}

impl World for Faulty {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn ranks(&self) -> usize {
        self.inner.ranks()
    }

    fn gather(&self, own: &[u8], sizes: &[usize], all: &mut [u8]) -> Result<()> {
        self.inner.gather(own, sizes, all)?;
        self.spoil(sizes, all);
        Ok(())
    }

    fn exchange(
        &self,
        send: &[u8],
        sizes: &[usize],
        received: &mut [u8],
        received_sizes: &[usize],
        meanwhile: &mut dyn FnMut(),
    ) -> Result<()> {
        self.inner.exchange(send, sizes, received, received_sizes, meanwhile)?;
        self.spoil(received_sizes, received);
        Ok(())
    }
}

#[test]
fn a_short_or_foreign_message_names_its_sender() {
    let cases: [(Spoil, &str); 6] = [
        // What a shorter message leaves of a buffer that is used again.
        (|bytes| bytes[24] -= 4, "message 1, Rows: expected 8 bytes, got 4"),
        (
            |bytes| bytes[..8].copy_from_slice(b"GIF89a.."),
            "message 1, Rows: expected one of phase-moe, got [47, 49, 46, 38, 39, 61, 2e, 2e]",
        ),
        (|bytes| bytes[8] = 0, "message: expected number 1 of kind 3 (Rows), got number 0 of kind 3"),
        (|bytes| bytes[12] = 4, "message: expected number 1 of kind 3 (Rows), got number 1 of kind 4"),
        (
            |bytes| bytes[16] ^= 1,
            "message 1, Rows: expected routing 0000000000000007 as on this rank, got 0000000000000006",
        ),
        (|bytes| bytes[14] = 2, "message 1, Rows: expected another sender, got rank 2"),
    ];
    for (spoil, detail) in cases {
        let worlds = Thread::ranks(2).into_iter();
        let worlds = worlds.map(|inner| Faulty { inner, calls: AtomicUsize::new(0), at: 1, spoil }).collect();
        let errors = each(worlds, |world: Faulty| {
            let ranks = Ranks::new(world).unwrap();
            ranks
                .gather((Kind::Logits, 7), &[4, 4], |bytes| bytes.fill(1), |_, bytes| assert_eq!(bytes, [1; 4]))
                .unwrap();
            let other = 1 - ranks.rank();
            let sizes: Vec<usize> = (0..2).map(|rank| if rank == other { 8 } else { 0 }).collect();
            let write = |_: usize, bytes: &mut [u8]| bytes.fill(other as u8);
            ranks.exchange((Kind::Rows, 7), &sizes, &sizes, write, || {}, |_, _| {})
        });
        let errors: Vec<Option<String>> =
            errors.into_iter().map(|done| done.err().map(|error| error.to_string())).collect();
        assert_eq!(errors, [Some(format!("rank 1: {detail}")), None]);
    }
}

#[test]
fn ranks_that_differ_find_out_alike() {
    let said = |facts: fn(usize) -> Vec<(&'static str, String)>| {
        let errors = each(Thread::ranks(3), |world| {
            let ranks = Ranks::new(world).unwrap();
            ranks.agree(&facts(ranks.rank())).err().map(|error| error.to_string())
        });
        assert!(errors.iter().all(|error| *error == errors[0]), "{errors:?}");
        errors[0].clone()
    };
    assert_eq!(said(|_| vec![("version", "0.1.0".into()), ("model", "a3".into())]), None);
    let other = said(|rank| vec![("version", "0.1.0".into()), ("model", if rank == 2 { "b4" } else { "a3" }.into())]);
    assert_eq!(other.as_deref(), Some("rank 2: model: expected a3 as on rank 0, got b4"));
    let fewer = said(|rank| vec![("version", "0.1.0".into()); 2 - usize::from(rank == 1)]);
    assert_eq!(fewer.as_deref(), Some("rank 1: expected the program of rank 0, got another"));
}

#[test]
fn one_that_fails_takes_the_others_along() {
    let done = each(Thread::ranks(3), |world| {
        let ranks = Ranks::new(world).unwrap();
        let own = match ranks.rank() {
            0 => Ok(7),
            rank => Err(crate::Error::Tokenizer(format!("none on {rank}"))),
        };
        ranks.together(own).map_err(|error| error.to_string())
    });
    let expected = ["rank 1: tokenizer: none on 1", "tokenizer: none on 1", "tokenizer: none on 2"];
    assert_eq!(done, expected.map(|error| Err(error.to_owned())));
}

#[test]
fn bytes_and_heads_are_counted() {
    let counted = each(Thread::ranks(3), |world| {
        let ranks = Arc::new(Ranks::new(world).unwrap());
        // What is no layer's counts for nothing.
        for kind in [Kind::Numbers, Kind::Sums] {
            ranks.gather((kind, 0), &[8, 0, 0], |bytes| bytes.fill(0), |_, _| {}).unwrap();
        }
        ranks.traffic().bytes
    });
    // Eight bytes and a head to each of two others.
    assert_eq!(counted, [2 * (8 + HEAD as u64); 3]);
}
