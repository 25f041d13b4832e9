//! How much haystack fits the length? The most that does, found with few calls of the tokenizer.

use std::ops::RangeInclusive;

/// A sample whose haystack has yet to get its size. The same recipe and size give the same prompt.
pub(super) trait Recipe {
    /// What a prompt can be made with: words, sentences, documents.
    fn sizes(&self) -> RangeInclusive<usize>;
    /// The whole prompt, answer prefix included.
    fn prompt(&self, size: usize) -> String;
    /// Right answers, whatever the size.
    fn answers(&self) -> Vec<String>;
}

/// Calls of the tokenizer for one sample at most.
const PROBES: usize = 24;

/// The longest prompt of at most `budget` tokens, to about 0.4 % of it; the tokens of the shortest one if none is.
///
/// Tokens grow with the size nearly in proportion, so straight lines through what is known lead to the answer; every
/// third probe halves what is left, in case they do not. What is returned has been counted.
pub(super) fn longest(
    recipe: &dyn Recipe,
    budget: usize,
    count: &mut dyn FnMut(&str) -> usize,
) -> Result<String, usize> {
    let (mut low, most) = recipe.sizes().into_inner();
    let mut best = recipe.prompt(low);
    let mut tokens = count(&best);
    if tokens > budget {
        return Err(tokens);
    }
    let mut slope = tokens as f64 / low.max(1) as f64;
    let mut above: Option<(usize, usize)> = None; // the smallest size known to be too large, its tokens
    for probe in 1..PROBES {
        let top = above.map_or(most, |(size, _)| size - 1);
        let room = budget - tokens;
        if low >= top || room <= budget / 256 {
            break;
        }
        let guess = match above {
            None if slope > 0.0 => low.saturating_add((room as f64 / slope) as usize),
            None => low.saturating_mul(2),
            Some((size, _)) if probe % 3 == 0 => low + (size - low) / 2,
            Some((size, tokens_above)) => {
                low + ((size - low) as f64 * room as f64 / (tokens_above - tokens) as f64) as usize
            }
        }
        .clamp(low + 1, top);
        let prompt = recipe.prompt(guess);
        let counted = count(&prompt);
        if counted > budget {
            above = Some((guess, counted));
        } else {
            slope = (counted as f64 - tokens as f64) / (guess - low) as f64;
            (low, tokens, best) = (guess, counted, prompt);
        }
    }
    Ok(best)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Prompts of `head` and then `unit` times the size bytes.
    struct Line {
        head: usize,
        unit: usize,
        most: usize,
    }

    impl Recipe for Line {
        fn sizes(&self) -> RangeInclusive<usize> {
            1..=self.most
        }
        fn prompt(&self, size: usize) -> String {
            "x".repeat(self.head + self.unit * size)
        }
        fn answers(&self) -> Vec<String> {
            Vec::new()
        }
    }

    #[test]
    fn it_fits_and_nothing_larger_does() {
        for (head, unit) in [(0, 1), (500, 25), (60, 170), (3, 2)] {
            for budget in [700, 1999, 7_552, 131_000] {
                let mut calls = 0;
                let recipe = Line { head, unit, most: 1_000_000 };
                let mut count = |text: &str| {
                    calls += 1;
                    text.len()
                };
                let found = longest(&recipe, budget, &mut count).unwrap().len();
                assert!(
                    found <= budget && found + unit.max(budget / 256) >= budget,
                    "{head} {unit} {budget} {found}"
                );
                assert!(calls <= 8, "{calls} calls for {head} {unit} {budget}");
            }
        }
    }

    #[test]
    fn bent_and_broken_counts_still_fit() {
        let recipe = Line { head: 0, unit: 1, most: 100_000 };
        let mut square = |text: &str| text.len() * text.len() / 1000;
        let found = longest(&recipe, 5000, &mut square).unwrap();
        assert!((4900..=5000).contains(&square(&found)), "{}", square(&found));
        let mut jumps = |text: &str| text.len() / 900 * 900;
        let found = longest(&recipe, 5000, &mut jumps).unwrap();
        assert_eq!(jumps(&found), 4500);
        assert_eq!(longest(&recipe, 5000, &mut |_| 0).unwrap().len(), 100_000);
        assert_eq!(longest(&recipe, 5000, &mut |_| 6000), Err(6000));
    }

    #[test]
    fn the_largest_size_is_not_passed() {
        let recipe = Line { head: 0, unit: 1, most: 50 };
        assert_eq!(longest(&recipe, 5000, &mut |text| text.len()).unwrap().len(), 50);
    }
}
