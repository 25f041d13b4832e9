//! Where does an answer end, if it is to end at a text? What could be the beginning of such a text is held back.

/// Whether an answer has the text that ends it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Keep {
    /// It ends before it.
    #[default]
    Before,
    /// It ends after it.
    After,
}

/// Watches an answer for the texts that end it.
#[derive(Debug, Clone, Default)]
pub struct StopTexts {
    stops: Vec<String>,
    keep: Keep,
    held: String,
}

/// What may be given out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Released {
    /// The answer goes on after it.
    Open(String),
    /// The answer ends with it.
    Ended(String),
}

impl StopTexts {
    /// For answers that end at one of these, none of them empty.
    pub fn new(stops: Vec<String>, keep: Keep) -> StopTexts {
        StopTexts { stops, keep, held: String::new() }
    }

    /// More text: what of it, and of that held back before, may be given out.
    pub fn push(&mut self, text: &str) -> Released {
        self.held += text;
        let found = self.stops.iter().filter_map(|stop| Some((self.held.find(stop)?, stop.len())));
        if let Some((at, length)) = found.min_by_key(|&(at, length)| (at, usize::MAX - length)) {
            self.held.truncate(match self.keep {
                Keep::Before => at,
                Keep::After => at + length,
            });
            return Released::Ended(std::mem::take(&mut self.held));
        }
        let rest = self.held.split_off(self.held.len() - self.beginning());
        Released::Open(std::mem::replace(&mut self.held, rest))
    }

    /// What was held back, when no more comes.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }

    /// Bytes at the end of what is held that could be the beginning of a stop.
    fn beginning(&self) -> usize {
        let could_be = |stop: &String| {
            let most = self.held.len().min(stop.len() - 1);
            let is_prefix =
                |&length: &usize| stop.is_char_boundary(length) && self.held.ends_with(&stop[..length]);
            (1..=most).rev().find(is_prefix).unwrap_or(0)
        };
        self.stops.iter().map(could_be).max().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What comes out of `pieces`, and whether a stop ended it.
    fn through(stops: &[&str], keep: Keep, pieces: &[&str]) -> (Vec<String>, bool) {
        let mut watch = StopTexts::new(stops.iter().map(|&stop| stop.to_owned()).collect(), keep);
        let mut out = vec![];
        for piece in pieces {
            match watch.push(piece) {
                Released::Open(text) => out.push(text),
                Released::Ended(text) => {
                    out.push(text);
                    return (out, true);
                }
            }
        }
        out.push(watch.finish());
        (out, false)
    }

    #[test]
    fn a_stop_is_found_across_pieces_and_its_beginning_held_back() {
        let (out, ended) = through(&["END"], Keep::Before, &["abE", "N", "x", "yEN", "Dz"]);
        assert_eq!((out, ended), (["ab", "", "ENx", "y", ""].map(str::to_owned).to_vec(), true));
        let (out, ended) = through(&["END"], Keep::After, &["yEN", "Dz"]);
        assert_eq!((out.concat(), ended), ("yEND".to_owned(), true));
        let (out, ended) = through(&["END"], Keep::Before, &["yEN"]);
        assert_eq!((out.concat(), ended), ("yEN".to_owned(), false));
    }

    #[test]
    fn the_first_of_several_counts_and_of_those_the_longest() {
        assert_eq!(through(&["c", "b"], Keep::Before, &["abc"]).0.concat(), "a");
        assert_eq!(through(&["b", "bc"], Keep::After, &["abcd"]).0.concat(), "abc");
        let (out, ended) = through(&["é!", "日本"], Keep::Before, &["é", "日", "本"]);
        assert_eq!((out.concat(), ended), ("é".to_owned(), true));
    }

    #[test]
    fn any_split_of_a_text_gives_the_same_answer() {
        let text = "aababcabcdab";
        for stops in [&["abcd"][..], &["bcda", "cab"], &["zz"], &[]] {
            let whole = through(stops, Keep::Before, &[text]).0.concat();
            for first in 0..text.len() {
                for second in first..text.len() {
                    let pieces = [&text[..first], &text[first..second], &text[second..]];
                    assert_eq!(
                        through(stops, Keep::Before, &pieces).0.concat(),
                        whole,
                        "{stops:?} {pieces:?}"
                    );
                }
            }
        }
    }
}
