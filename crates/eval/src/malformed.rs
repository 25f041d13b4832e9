//! What is in a file of JSON lines, and which of them could not be used?
//!
//! Such files are anybody's: a line that cannot be used is reported and left out, and none is held that is larger than
//! any real one by far.

use std::fmt;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

/// Longest line read, in bytes: a prompt of a million tokens has about five million.
pub(crate) const LONGEST_LINE: usize = 32 << 20;

/// A file with this many malformed lines is some other file; the rest of it is not read.
pub(crate) const MOST_MALFORMED: usize = 1000;

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

/// What `parse` makes of each line that is not blank, and the lines that it refuses. `parse` gets the line's number, from
/// 1, as well. Errors name the file.
pub(crate) fn read_lines<T>(
    path: &Path,
    mut parse: impl FnMut(&[u8], usize) -> Result<T, String>,
) -> io::Result<(Vec<T>, Vec<Malformed>)> {
    let named = |error: io::Error| io::Error::new(error.kind(), format!("{}: {error}", path.display()));
    let mut file = BufReader::new(File::open(path).map_err(named)?);
    let (mut made, mut malformed) = (Vec::new(), Vec::new());
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let read = (&mut file).take(LONGEST_LINE as u64 + 1).read_until(b'\n', &mut line).map_err(named)?;
        let too_long = read > LONGEST_LINE && !line.ends_with(b"\n");
        if read == 0 {
            break;
        } else if too_long {
            file.skip_until(b'\n').map_err(named)?;
        } else if line.trim_ascii().is_empty() {
            continue;
        }
        let one = match too_long {
            true => Err(format!("more than {} MiB in a line", LONGEST_LINE >> 20)),
            false => parse(&line, number),
        };
        match one {
            Ok(one) => made.push(one),
            Err(reason) => malformed.push(Malformed::new(path, number, reason)),
        }
        if malformed.len() == MOST_MALFORMED {
            malformed.push(Malformed::new(path, number + 1, "not read: too many malformed lines before"));
            break;
        }
    }
    Ok((made, malformed))
}

/// What serde has against a line, without its line number, which would be that within the line.
pub(crate) fn unreadable(error: &serde_json::Error) -> String {
    let whole = error.to_string();
    let what = whole.rsplit_once(" at line ").map_or(whole.as_str(), |(what, _)| what);
    format!("{what} (column {})", error.column())
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
