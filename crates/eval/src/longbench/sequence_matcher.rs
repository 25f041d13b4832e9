//! How alike are two lines, in the way of Python's `difflib`?
//!
//! Ratcliff and Obershelp's measure (Dr. Dobb's Journal, July 1988): the longest common run of characters, then the same
//! on either side of it, and twice the characters found over those of both texts. `difflib.SequenceMatcher` adds that in
//! a second text of 200 characters and more, a character that makes up more than a hundredth of it begins no run: runs
//! may only be stretched over it. It is not symmetric.

use std::collections::{HashMap, HashSet};
use std::ops::Range;

/// `fuzz.ratio` of the Python package `fuzzywuzzy` 0.18.0 over `difflib`: a whole number from 0 to 100.
pub(super) fn percent(first: &str, second: &str) -> f64 {
    if first == second {
        return 100.0;
    }
    if first.is_empty() || second.is_empty() {
        return 0.0;
    }
    let (first, second): (Vec<char>, Vec<char>) = (first.chars().collect(), second.chars().collect());
    let lengths = first.len() + second.len();
    let same = Matcher::new(&first, &second).characters_in_common();
    (100.0 * (2.0 * same as f64 / lengths as f64)).round_ties_even()
}

struct Matcher<'t> {
    first: &'t [char],
    second: &'t [char],
    /// Where in `second` a character is, rising, for those that may begin a run.
    places: HashMap<char, Vec<usize>>,
}

/// The same `length` characters at `first` and at `second`.
struct Run {
    first: usize,
    second: usize,
    length: usize,
}

impl<'t> Matcher<'t> {
    fn new(first: &'t [char], second: &'t [char]) -> Matcher<'t> {
        let wanted: HashSet<char> = first.iter().copied().collect();
        let mut places: HashMap<char, Vec<usize>> = HashMap::new();
        for (at, &c) in second.iter().enumerate().filter(|(_, c)| wanted.contains(c)) {
            places.entry(c).or_default().push(at);
        }
        if second.len() >= 200 {
            places.retain(|_, at| at.len() <= second.len() / 100 + 1);
        }
        Matcher { first, second, places }
    }

    fn characters_in_common(&self) -> usize {
        let mut total = 0;
        let mut open = vec![(0..self.first.len(), 0..self.second.len())];
        while let Some((a, b)) = open.pop() {
            if a.is_empty() || b.is_empty() {
                continue;
            }
            let run = self.longest_run(a.clone(), b.clone());
            if run.length > 0 {
                total += run.length;
                open.push((a.start..run.first, b.start..run.second));
                open.push((run.first + run.length..a.end, run.second + run.length..b.end));
            }
        }
        total
    }

    /// The longest run, the earliest in `a` and then in `b` of the longest, stretched both ways.
    fn longest_run(&self, a: Range<usize>, b: Range<usize>) -> Run {
        let mut best = Run { first: a.start, second: b.start, length: 0 };
        // ends[j - b.start + 1]: how long a run ends with the last character of `a` seen and `second[j]`.
        let mut ends = vec![0; b.len() + 1];
        let mut next = ends.clone();
        for i in a.clone() {
            next.fill(0);
            let places = self.places.get(&self.first[i]).map_or(&[][..], Vec::as_slice);
            let from = places.partition_point(|&j| j < b.start);
            for &j in places[from..].iter().take_while(|&&j| j < b.end) {
                let length = ends[j - b.start] + 1;
                next[j - b.start + 1] = length;
                if length > best.length {
                    best = Run { first: i + 1 - length, second: j + 1 - length, length };
                }
            }
            std::mem::swap(&mut ends, &mut next);
        }
        while best.first > a.start
            && best.second > b.start
            && self.first[best.first - 1] == self.second[best.second - 1]
        {
            best = Run { first: best.first - 1, second: best.second - 1, length: best.length + 1 };
        }
        while best.first + best.length < a.end
            && best.second + best.length < b.end
            && self.first[best.first + best.length] == self.second[best.second + best.length]
        {
            best.length += 1;
        }
        best
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_and_empty_texts() {
        assert_eq!(percent("", ""), 100.0);
        assert_eq!(percent("x", ""), 0.0);
        assert_eq!(percent("", "x"), 0.0);
        assert_eq!(percent("é = 1", "é = 1"), 100.0);
    }

    #[test]
    fn difflib_and_not_levenshtein() {
        // difflib finds "A", " " and "A"; 44 would be the indel ratio.
        assert_eq!(percent("A L I E N S", "A S A L"), 33.0);
        assert_eq!(percent("tide", "diet"), 25.0);
        assert_eq!(percent("diet", "tide"), 50.0);
    }

    #[test]
    fn halves_round_to_even() {
        // 2 * 1 / 16 = 12.5 %, 2 * 3 / 16 = 37.5 %.
        assert_eq!(percent("aqqqqqqq", "azzzzzzz"), 12.0);
        assert_eq!(percent("abcqqqqq", "abczzzzz"), 38.0);
    }
}
