//! `--prefill-kv`: how much of a prompt is read before it is compressed?

use mosaickv_kv::Layered;
use std::fmt;
use std::str::FromStr;

/// Tokens of a prompt that are read exactly where `compressed` alone is asked for.
const DEFAULT_TOKENS: usize = 4096;

/// What later tokens of a prompt attend to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PrefillKv {
    /// All tokens before them, exactly; the prompt is compressed when it is complete.
    #[default]
    Exact,
    /// The first so many tokens compressed, and those after them as generated ones are kept.
    Compressed(usize),
}

impl PrefillKv {
    /// Tokens that are read exactly at most; `None`: all.
    pub fn tokens(self) -> Option<usize> {
        match self {
            PrefillKv::Exact => None,
            PrefillKv::Compressed(tokens) => Some(tokens),
        }
    }
}

impl fmt::Display for PrefillKv {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            PrefillKv::Exact => write!(f, "exact"),
            PrefillKv::Compressed(tokens) => write!(f, "compressed:{tokens}"),
        }
    }
}

impl FromStr for PrefillKv {
    type Err = String;

    fn from_str(text: &str) -> Result<PrefillKv, String> {
        let wanted =
            || format!("{text:?}; wanted exact, compressed or compressed:TOKENS, such as compressed:4096");
        match text.split_once(':') {
            None if text == "exact" => Ok(PrefillKv::Exact),
            None if text == "compressed" => Ok(PrefillKv::Compressed(DEFAULT_TOKENS)),
            Some(("compressed", tokens)) => match tokens.parse() {
                Ok(tokens) if tokens >= Layered::LEAST_TOKENS => Ok(PrefillKv::Compressed(tokens)),
                Ok(tokens) => Err(format!(
                    "{tokens} tokens; wanted at least {}: fewer are not compressed",
                    Layered::LEAST_TOKENS
                )),
                Err(_) => Err(wanted()),
            },
            _ => Err(wanted()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_reads_what_it_writes() {
        for text in ["exact", "compressed:4096", "compressed:2048"] {
            assert_eq!(text.parse::<PrefillKv>().unwrap().to_string(), text);
        }
        assert_eq!("compressed".parse(), Ok(PrefillKv::Compressed(4096)));
        for (text, why) in
            [("compressed:100", "at least 2048"), ("compressed:x", "TOKENS"), ("zip", "wanted exact")]
        {
            assert!(text.parse::<PrefillKv>().unwrap_err().contains(why), "{text}");
        }
    }
}
