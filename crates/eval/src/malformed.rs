//! Which line of a data file could not be used, and why?

use std::fmt;
use std::path::{Path, PathBuf};

/// Longest reason kept, in characters: a reason may quote the line, and a line may be megabytes.
const LONGEST_REASON: usize = 240;

/// A line that was left out, for the reader of a report to judge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Malformed {
    /// The file.
    pub path: PathBuf,
    /// The line, from 1.
    pub line: usize,
    /// What is wrong with it, at most 240 characters.
    pub reason: String,
}

impl Malformed {
    /// A long `reason` is cut.
    pub fn new(path: &Path, line: usize, reason: impl fmt::Display) -> Malformed {
        let mut reason = reason.to_string();
        if let Some((end, _)) = reason.char_indices().nth(LONGEST_REASON) {
            reason.truncate(end);
        }
        Malformed { path: path.to_owned(), line, reason }
    }
}

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.path.display(), self.line, self.reason)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn says_where_and_why() {
        let bad = Malformed::new(Path::new("data/trec.jsonl"), 7, "no answers");
        assert_eq!(bad.to_string(), "data/trec.jsonl:7: no answers");
    }

    #[test]
    fn a_reason_is_cut_between_characters() {
        let bad = Malformed::new(Path::new("x"), 1, "é".repeat(1000));
        assert_eq!(bad.reason.chars().count(), LONGEST_REASON);
    }
}
