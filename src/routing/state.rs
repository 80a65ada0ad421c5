//! What goes from call to call: [`RouteState`], which decides, and [`Scratch`], which only saves time.
//!
//! Knows nothing of what routers keep in them.

use std::any::Any;
use std::fmt;

use crate::routing::affinity::Affinity;
use crate::simd::Isa;

/// What a layer's router carries from one batch to the next; start with `RouteState::default()`.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RouteState {
    /// Price per pool (expert or device) of the last batch; empty before the first.
    pub(crate) prices: Vec<f32>,
    /// How far apart the last held and the first refused expert of its rows were, in the mean.
    pub(crate) gap: f64,
    /// Sweeps over the whole batch that the phase router made for the last one: the fewer, the better its old prices were.
    pub(crate) sweeps: usize,
    /// Running mean of the tokens' ranges of selection scores (best minus worst allowed one): the unit of the residency bonus. `None`
    /// before a memory-aware router saw a batch.
    pub(crate) score_range: Option<f64>,
    /// Recent use of the experts; `None` before the first batch.
    pub(crate) affinity: Option<Affinity>,
    /// What the bonus controller has come to; `None` where there is none.
    pub(crate) bonus: Option<f64>,
    /// What routers of other crates remember, by type.
    others: Vec<Box<dyn Memory>>,
}

impl RouteState {
    /// Price per expert or device that the last batch ended with; empty before the first.
    pub fn prices(&self) -> &[f32] {
        &self.prices
    }

    /// How much each expert was used of late; `None` before a memory-aware router saw a batch.
    pub fn affinity(&self) -> Option<&Affinity> {
        self.affinity.as_ref()
    }

    /// What a router of another crate remembers of the layer, one value for each type; the type's default at the first call.
    pub fn of<T: Any + Clone + fmt::Debug + Default + PartialEq + Send + Sync>(&mut self) -> &mut T {
        let is_that = |memory: &dyn Memory| (memory as &dyn Any).is::<T>();
        let at = self.others.iter().position(|memory| is_that(memory.as_ref())).unwrap_or_else(|| {
            self.others.push(Box::<T>::default());
            self.others.len() - 1
        });
        match (self.others[at].as_mut() as &mut dyn Any).downcast_mut() {
            Some(memory) => memory,
            None => unreachable!("a memory was found by its type"),
        }
    }

    /// The residency bonus that the controller has come to, in units of the running score range; `None` without one.
    pub(crate) fn bonus(&self) -> Option<f64> {
        self.bonus
    }
}

/// A value of any type that can be kept in a [`RouteState`].
trait Memory: Any + fmt::Debug + Send + Sync {
    fn boxed(&self) -> Box<dyn Memory>;
    fn equals(&self, other: &dyn Any) -> bool;
}

impl<T: Any + Clone + fmt::Debug + PartialEq + Send + Sync> Memory for T {
    fn boxed(&self) -> Box<dyn Memory> {
        Box::new(self.clone())
    }

    fn equals(&self, other: &dyn Any) -> bool {
        other.downcast_ref().is_some_and(|other| self == other)
    }
}

impl Clone for Box<dyn Memory> {
    fn clone(&self) -> Self {
        self.as_ref().boxed()
    }
}

impl PartialEq for dyn Memory {
    fn eq(&self, other: &Self) -> bool {
        self.equals(other)
    }
}

/// Buffers that routers reuse from call to call; one serves any number of layers and routers, one call at a time.
/// What it holds never decides anything.
#[derive(Default)]
pub struct Scratch {
    isa: Isa,
    buffers: Vec<Box<dyn Any + Send>>,
}

impl Scratch {
    /// Scratch of routers that are to run on `isa` rather than on the widest instructions there are.
    #[cfg(test)]
    pub(crate) fn on(isa: Isa) -> Self {
        Self { isa, buffers: Vec::new() }
    }

    /// The instructions that routers run on.
    pub(crate) fn isa(&self) -> Isa {
        self.isa
    }

    /// The buffers of type `T`, made at the first call.
    pub fn of<T: Any + Default + Send>(&mut self) -> &mut T {
        let known = self.buffers.iter().position(|buffers| buffers.is::<T>());
        let at = known.unwrap_or_else(|| {
            self.buffers.push(Box::<T>::default());
            self.buffers.len() - 1
        });
        match self.buffers[at].downcast_mut() {
            Some(buffers) => buffers,
            None => unreachable!("buffers were found by their type"),
        }
    }
}

impl fmt::Debug for Scratch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Scratch({}, {} kinds of buffers)", self.isa, self.buffers.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_state_keeps_one_value_of_each_type_and_is_compared_and_cloned_with_them() {
        let (mut state, mut other) = (RouteState::default(), RouteState::default());
        state.of::<Vec<f32>>().push(1.0);
        *state.of::<u64>() += 2;
        assert_eq!(state.of::<Vec<f32>>(), &[1.0]);
        assert_eq!(*state.of::<u64>(), 2);
        assert_ne!(state, other);
        other.clone_from(&state);
        assert_eq!(state, other);
        *other.of::<u64>() += 1;
        assert_ne!(state, other);
        assert_eq!(*state.of::<u64>(), 2);
    }
}
