//! Which numbers does a sample draw? ChaCha8's, seeded with everything that names the sample.
//!
//! `rand_chacha` promises its stream for ever; what is made of it is written here, so that no other release changes a
//! sample either.

use std::collections::BTreeSet;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A stream of draws. A clone draws the same again.
#[derive(Clone)]
pub(super) struct Draw(ChaCha8Rng);

impl Draw {
    /// The stream of four numbers; any other four give another one.
    pub fn new(names: [u64; 4]) -> Draw {
        let mut seed = [0; 32];
        for (bytes, name) in seed.chunks_exact_mut(8).zip(names) {
            bytes.copy_from_slice(&name.to_le_bytes());
        }
        Draw(ChaCha8Rng::from_seed(seed))
    }

    /// A stream of its own.
    pub fn fork(&mut self) -> Draw {
        Draw::new(std::array::from_fn(|_| self.0.next_u64()))
    }

    /// Uniform in `0..n`; `n` is at least 1.
    pub fn below(&mut self, n: usize) -> usize {
        assert!(n > 0, "a draw from nothing");
        let n = n as u64;
        let whole = u64::MAX - u64::MAX % n;
        loop {
            let draw = self.0.next_u64();
            if draw < whole {
                return (draw % n) as usize;
            }
        }
    }

    /// One of `items`, which has some.
    pub fn pick<'a, T: ?Sized>(&mut self, items: &[&'a T]) -> &'a T {
        items[self.below(items.len())]
    }

    /// `k` different numbers of `0..n`, ascending; `k` is at most `n`, and small.
    pub fn ascending(&mut self, n: usize, k: usize) -> Vec<usize> {
        assert!(k <= n, "{k} different ones of {n}");
        let mut drawn = BTreeSet::new();
        while drawn.len() < k {
            drawn.insert(self.below(n));
        }
        drawn.into_iter().collect()
    }

    /// Any order is as likely as any other (Fisher and Yates).
    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }

    /// `k` letters from `first` on, of the 26 of its case.
    pub fn letters(&mut self, k: usize, first: char) -> String {
        (0..k).map(|_| char::from(first as u8 + self.below(26) as u8)).collect()
    }

    /// A version 4 UUID as `8-4-4-4-12` hexadecimal digits.
    pub fn uuid(&mut self) -> String {
        let bits = u128::from(self.0.next_u64()) << 64 | u128::from(self.0.next_u64());
        let bits = bits & !(0xf << 76) | 4 << 76; // version
        let bits = bits & !(3 << 62) | 2 << 62; // variant
        let hex = format!("{bits:032x}");
        format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As computed from the definition of ChaCha (Bernstein 2008) with 8 rounds, apart from this crate.
    #[test]
    fn the_stream_is_chacha8() {
        let mut draw = Draw::new([42, 0, 4096, 7]);
        let first: Vec<usize> = (0..4).map(|_| draw.below(1_000_000)).collect();
        assert_eq!(first, [296405, 480432, 333715, 188399]);
        assert_eq!(draw.uuid(), "563eb6c0-5336-42e4-976a-84d765342f36");
    }

    #[test]
    fn draws_are_even_and_different() {
        let mut draw = Draw::new([1, 2, 3, 4]);
        let mut counts = [0; 7];
        for _ in 0..7000 {
            counts[draw.below(7)] += 1;
        }
        assert!(counts.iter().all(|count| (850..1150).contains(count)), "{counts:?}");
        assert_eq!(draw.ascending(5, 5), [0, 1, 2, 3, 4]);
        let mut items: Vec<usize> = (0..100).collect();
        draw.shuffle(&mut items);
        assert_ne!(items, (0..100).collect::<Vec<_>>());
        items.sort_unstable();
        assert_eq!(items, (0..100).collect::<Vec<_>>());
        assert!(draw.letters(50, 'A').chars().all(|letter| letter.is_ascii_uppercase()));
        for _ in 0..100 {
            let uuid = draw.uuid();
            assert!(uuid.len() == 36 && &uuid[14..15] == "4" && "89ab".contains(&uuid[19..20]), "{uuid}");
        }
    }
}
