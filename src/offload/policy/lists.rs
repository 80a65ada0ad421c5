//! Doubly linked lists over keys `0..keys`, each key in at most one of them: put in, taken out and moved in constant time.
//!
//! A list is a circle through a node of its own, and a key outside all lists is a circle of itself, so that no operation has a
//! special case. Nothing is allocated after [`Lists::new`].
//!
//! Knows nothing of what the keys or the lists stand for.

/// Neighbours of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Link {
    previous: u32,
    next: u32,
}

/// Some lists over the same keys.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Lists {
    /// The keys' nodes, then one for each list.
    links: Vec<Link>,
    keys: usize,
}

impl Lists {
    /// `lists` empty lists over `keys` keys, together fewer than `u32` can count.
    pub(crate) fn new(keys: usize, lists: usize) -> Self {
        let links = (0..(keys + lists) as u32).map(|node| Link { previous: node, next: node }).collect();
        Self { links, keys }
    }

    /// Puts `key` at the end of `list`, out of whichever it was in.
    pub(crate) fn push_back(&mut self, list: usize, key: usize) {
        let end = self.keys + list;
        self.insert(self.links[end].previous as usize, key, end);
    }

    /// Puts `key` at the beginning of `list`, out of whichever it was in.
    pub(crate) fn push_front(&mut self, list: usize, key: usize) {
        let end = self.keys + list;
        self.insert(end, key, self.links[end].next as usize);
    }

    fn insert(&mut self, previous: usize, key: usize, next: usize) {
        // A key that is moved to where it is already is its own neighbour.
        let (previous, next) = match self.links[key] {
            Link { previous: before, .. } if previous == key => (before as usize, next),
            Link { next: after, .. } if next == key => (previous, after as usize),
            _ => (previous, next),
        };
        self.remove(key);
        self.links[key] = Link { previous: previous as u32, next: next as u32 };
        self.links[previous].next = key as u32;
        self.links[next].previous = key as u32;
    }

    /// Takes `key` out of the list it is in; true when it was in one.
    pub(crate) fn remove(&mut self, key: usize) -> bool {
        let Link { previous, next } = self.links[key];
        self.links[previous as usize].next = next;
        self.links[next as usize].previous = previous;
        self.links[key] = Link { previous: key as u32, next: key as u32 };
        previous as usize != key
    }

    /// The first key of `list`.
    pub(crate) fn first(&self, list: usize) -> Option<usize> {
        Some(self.links[self.keys + list].next as usize).filter(|&node| node < self.keys)
    }

    /// The last key of `list`.
    pub(crate) fn last(&self, list: usize) -> Option<usize> {
        Some(self.links[self.keys + list].previous as usize).filter(|&node| node < self.keys)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn keys(lists: &Lists, list: usize) -> Vec<usize> {
        let after = |&key: &usize| Some(lists.links[key].next as usize).filter(|&node| node < lists.keys);
        std::iter::successors(lists.first(list), after).collect()
    }

    proptest! {
        #[test]
        fn they_are_lists(operations in prop::collection::vec((0usize..3, 0usize..2, 0usize..6), 0..60)) {
            let (mut lists, mut naive) = (Lists::new(6, 2), [vec![], vec![]]);
            for (operation, list, key) in operations {
                let was = naive.iter().any(|list| list.contains(&key));
                naive.iter_mut().for_each(|list| list.retain(|&other| other != key));
                match operation {
                    0 => prop_assert_eq!(lists.remove(key), was),
                    1 => {
                        naive[list].insert(0, key);
                        lists.push_front(list, key);
                    }
                    _ => {
                        naive[list].push(key);
                        lists.push_back(list, key);
                    }
                }
                for (list, naive) in naive.iter().enumerate() {
                    prop_assert_eq!(&keys(&lists, list), naive);
                    prop_assert_eq!(lists.last(list), naive.last().copied());
                }
            }
        }
    }
}
