//! Messages between ranks, each with a head that says what it is: [`Ranks`].
//!
//! ```text
//! head, 32 bytes: b"phasemoe", number of the call u32, kind u16, sender u16, digest u64, bytes that follow u64 (little-endian)
//! ```
//!
//! A head that is not what this rank expects is an error that names the sender: a message cut short, one of another program, or of a rank that is
//! not where this one is. The digest is of what sender and receiver must have decided alike. Where nothing is to be sent there is no head either.
//! Knows nothing of experts.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::world::World;
use crate::error::{Error, Result};

/// Bytes before each message.
pub(super) const HEAD: usize = 32;
const MAGIC: &[u8; 8] = b"phasemoe";

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// What ranks must agree on, in words.
    Words = 1,
    /// Gate logits, and which experts are in memory.
    Logits = 2,
    /// Hidden states on their way to experts.
    Rows = 3,
    /// What experts made of them.
    Sums = 4,
    /// Numbers of the output: logits of the vocabulary, losses, figures.
    Numbers = 5,
}

impl Kind {
    /// Whether it is part of an MoE layer's pass, whose traffic counts.
    fn is_of_layers(self) -> bool {
        matches!(self, Self::Logits | Self::Rows | Self::Sums)
    }
}

/// How bytes of MoE layers went between the ranks so far.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Traffic {
    /// Bytes that all ranks sent to others, as far as this one knows: heads, and what it was told with [`Ranks::count`].
    pub(super) bytes: u64,
    /// Time of this rank in calls, also waiting for others.
    pub(super) time: Duration,
}

/// The ranks of a job as those who exchange checked messages.
#[derive(Debug)]
pub struct Ranks {
    world: Box<dyn World>,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    calls: u32,
    traffic: Traffic,
    send: Vec<u8>,
    received: Vec<u8>,
}

impl Ranks {
    /// The ranks of `world`.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a world without ranks, of more than 65,535, or whose rank is none of them.
    pub fn new(world: impl World + 'static) -> Result<Self> {
        let (rank, ranks) = (world.rank(), world.ranks());
        if ranks == 0 || ranks > usize::from(u16::MAX) {
            return Err(Error::parameter("ranks", ranks, "1 to 65535"));
        }
        if rank >= ranks {
            return Err(Error::parameter("rank", rank, format!("below {ranks}")));
        }
        Ok(Self { world: Box::new(world), inner: Mutex::default() })
    }

    /// The number of this process.
    pub fn rank(&self) -> usize {
        self.world.rank()
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.world.ranks()
    }

    /// Has all ranks give up together where one of them fails: `result` where all have one, else the error of the lowest rank that has
    /// one. What follows may then wait for the others.
    ///
    /// # Errors
    /// This rank's own, or [`Error::Rank`] for another's.
    pub fn together<T, E: std::fmt::Display + From<Error>>(&self, result: Result<T, E>) -> Result<T, E> {
        let own = result.as_ref().err().map(|error| format!("{error:#}")).unwrap_or_default();
        let said = self.words(&own)?;
        match (result, said.into_iter().enumerate().find(|(_, error)| !error.is_empty())) {
            (Ok(_), Some((rank, error))) => Err(Error::Rank { rank, detail: error }.into()),
            (result, _) => result,
        }
    }

    /// Checks that all ranks say the same of everything that `facts` name, by (name, value).
    ///
    /// # Errors
    /// [`Error::Rank`] for the lowest rank that says something else than rank 0, on all ranks alike.
    pub fn agree(&self, facts: &[(&str, String)]) -> Result<()> {
        let own: Vec<String> = facts.iter().map(|(name, value)| format!("{name}\u{1f}{value}")).collect();
        let said = self.words(&own.join("\u{1e}"))?;
        let facts_of = |rank: usize| said[rank].split('\u{1e}').filter_map(|fact| fact.split_once('\u{1f}'));
        for rank in 1..said.len() {
            let differing = facts_of(0).zip(facts_of(rank)).find(|(first, other)| first != other);
            if let Some(((name, expected), (_, got))) = differing {
                let detail = format!("{name}: expected {expected} as on rank 0, got {got}");
                return Err(Error::Rank { rank, detail });
            }
            if facts_of(0).count() != facts_of(rank).count() {
                let detail = "expected the program of rank 0, got another".into();
                return Err(Error::Rank { rank, detail });
            }
        }
        Ok(())
    }

    /// Numbers of every rank in order of rank, of which each gives as many as `counts` says: `own` are this one's.
    ///
    /// # Errors
    /// [`Error::Shape`] for other counts than ranks or numbers, [`Error::Rank`] where messages fail.
    pub fn numbers(&self, own: &[f64], counts: &[usize]) -> Result<Vec<f64>> {
        if counts.len() != self.count() || counts[self.rank()] != own.len() {
            let expected = format!("{} counts, this rank's {}", self.count(), own.len());
            return Err(Error::shape("numbers of ranks", expected, format!("{counts:?}")));
        }
        let sizes: Vec<usize> = counts.iter().map(|count| count * size_of::<f64>()).collect();
        let mut all = Vec::with_capacity(counts.iter().sum());
        let write = |bytes: &mut [u8]| bytes.copy_from_slice(bytemuck::cast_slice(own));
        self.gather((Kind::Numbers, 0), &sizes, write, |_, bytes| {
            let numbers = bytes.chunks_exact(8).map(|number| number.try_into().map_or(f64::NAN, f64::from_le_bytes));
            all.extend(numbers);
        })?;
        Ok(all)
    }

    /// What each rank says.
    fn words(&self, own: &str) -> Result<Vec<String>> {
        let mut lengths = vec![0; self.count()];
        let length = (own.len() as u64).to_le_bytes();
        let ours = vec![length.len(); self.count()];
        self.gather(
            (Kind::Words, 0),
            &ours,
            |bytes| bytes.copy_from_slice(&length),
            |rank, bytes| {
                lengths[rank] = bytes.try_into().map_or(0, u64::from_le_bytes) as usize;
            },
        )?;
        let mut said = vec![String::new(); self.count()];
        self.gather(
            (Kind::Words, 0),
            &lengths,
            |bytes| bytes.copy_from_slice(own.as_bytes()),
            |rank, bytes| {
                said[rank] = String::from_utf8_lossy(bytes).into_owned();
            },
        )?;
        Ok(said)
    }

    /// Gives all ranks what `write` writes, of as many bytes as `sizes` says for this rank; `read` sees what each rank gave, its own too.
    ///
    /// # Errors
    /// [`Error::Rank`] where the transport fails or a message is not what it should be; `read` may have seen others by then.
    pub(super) fn gather(
        &self,
        what: (Kind, u64),
        sizes: &[usize],
        write: impl FnOnce(&mut [u8]),
        mut read: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let (mut inner, rank) = (self.lock(), self.rank());
        let Inner { calls, traffic, send, received } = &mut *inner;
        let full = full(sizes);
        send.resize(full[rank], 0);
        if sizes[rank] > 0 {
            head(what, *calls, rank, sizes[rank], send);
            write(&mut send[HEAD..]);
        }
        received.resize(full.iter().sum(), 0);
        let started = Instant::now();
        self.world.gather(send, &full, received)?;
        if what.0.is_of_layers() {
            traffic.time += started.elapsed();
            traffic.bytes += (full.iter().sum::<usize>() * (self.count() - 1)) as u64;
        }
        each(what, *calls, sizes, received, |from, bytes| read(from, bytes))?;
        *calls = calls.wrapping_add(1);
        Ok(())
    }

    /// Gives each rank what `write` writes for it, of `sizes` bytes, and has `read` see what each gave to this one, of `received_sizes`; both are 0
    /// for this rank itself. `meanwhile` runs while bytes are on their way.
    ///
    /// # Errors
    /// As [`Ranks::gather`].
    pub(super) fn exchange(
        &self,
        what: (Kind, u64),
        sizes: &[usize],
        received_sizes: &[usize],
        mut write: impl FnMut(usize, &mut [u8]),
        meanwhile: impl FnOnce(),
        mut read: impl FnMut(usize, &[u8]),
    ) -> Result<()> {
        let (mut inner, rank) = (self.lock(), self.rank());
        let Inner { calls, traffic, send, received } = &mut *inner;
        let (full_sizes, full_received) = (full(sizes), full(received_sizes));
        send.resize(full_sizes.iter().sum(), 0);
        let mut rest = send.as_mut_slice();
        for (to, (&size, &full)) in sizes.iter().zip(&full_sizes).enumerate().filter(|(_, (size, _))| **size > 0) {
            let (own, after) = std::mem::take(&mut rest).split_at_mut(full);
            rest = after;
            head(what, *calls, rank, size, own);
            write(to, &mut own[HEAD..]);
        }
        received.resize(full_received.iter().sum(), 0);
        let (mut meanwhile, mut worked) = (Some(meanwhile), Duration::ZERO);
        let started = Instant::now();
        self.world.exchange(send, &full_sizes, received, &full_received, &mut || {
            let began = Instant::now();
            if let Some(work) = meanwhile.take() {
                work();
            }
            worked += began.elapsed();
        })?;
        traffic.time += started.elapsed().saturating_sub(worked);
        each(what, *calls, received_sizes, received, |from, bytes| read(from, bytes))?;
        *calls = calls.wrapping_add(1);
        Ok(())
    }

    /// Counts bytes that all ranks sent in exchanges.
    pub(super) fn add_bytes(&self, bytes: u64) {
        self.lock().traffic.bytes += bytes;
    }

    pub(super) fn traffic(&self) -> Traffic {
        self.lock().traffic
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Sizes with heads.
fn full(sizes: &[usize]) -> Vec<usize> {
    sizes.iter().map(|&size| if size > 0 { size + HEAD } else { 0 }).collect()
}

/// Writes the head of a message into the first bytes of `into`.
fn head((kind, digest): (Kind, u64), call: u32, rank: usize, size: usize, into: &mut [u8]) {
    into[..8].copy_from_slice(MAGIC);
    into[8..12].copy_from_slice(&call.to_le_bytes());
    into[12..14].copy_from_slice(&(kind as u16).to_le_bytes());
    into[14..16].copy_from_slice(&(rank as u16).to_le_bytes());
    into[16..24].copy_from_slice(&digest.to_le_bytes());
    into[24..32].copy_from_slice(&(size as u64).to_le_bytes());
}

/// Checks the heads of what each rank gave and hands on what follows them.
fn each(
    what: (Kind, u64),
    call: u32,
    sizes: &[usize],
    received: &[u8],
    mut read: impl FnMut(usize, &[u8]),
) -> Result<()> {
    let mut rest = received;
    for (rank, &size) in sizes.iter().enumerate().filter(|(_, size)| **size > 0) {
        let (message, after) = rest.split_at(size + HEAD);
        rest = after;
        let mut expected = [0; HEAD];
        head(what, call, rank, size, &mut expected);
        if message[..HEAD] != expected {
            return Err(Error::Rank { rank, detail: difference(what, call, size, message) });
        }
        read(rank, &message[HEAD..]);
    }
    Ok(())
}

/// What is wrong with a message's head, the first thing that explains the others.
fn difference((kind, digest): (Kind, u64), call: u32, size: usize, message: &[u8]) -> String {
    let number = |at: std::ops::Range<usize>| at.rev().fold(0u64, |number, at| number << 8 | u64::from(message[at]));
    if message[..8] != *MAGIC {
        return format!("message {call}, {kind:?}: expected one of phase-moe, got {:02x?}", &message[..8]);
    }
    let (got_call, got_kind, got_digest, got_size) = (number(8..12), number(12..14), number(16..24), number(24..32));
    let expected_kind = kind as u64;
    if (got_call, got_kind) != (u64::from(call), expected_kind) {
        return format!(
            "message: expected number {call} of kind {expected_kind} ({kind:?}), got number {got_call} of kind {got_kind}"
        );
    }
    if got_size != size as u64 {
        return format!("message {call}, {kind:?}: expected {size} bytes, got {got_size}");
    }
    if got_digest != digest {
        return format!(
            "message {call}, {kind:?}: expected routing {digest:016x} as on this rank, got {got_digest:016x}"
        );
    }
    format!("message {call}, {kind:?}: expected another sender, got rank {}", number(14..16))
}
