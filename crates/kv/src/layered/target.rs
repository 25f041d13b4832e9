//! How many bytes may a prompt take? As a ratio or as a number of bytes, and how both are written.

use std::fmt;
use std::str::FromStr;

/// The largest ratio that can be asked for.
const RATIOS: f32 = 64.0;

/// The most bytes that can be asked for: above them a number of bytes is none that f64 has.
const MOST: f64 = 1e15;

/// Units and their bytes; the powers of ten, from large to small, are those that are written.
const WRITTEN: [(&str, f64); 4] = [("GB", 1e9), ("MB", 1e6), ("kB", 1e3), ("B", 1.0)];
const READ: [(&str, f64); 3] = [("GiB", 1073741824.0), ("MiB", 1048576.0), ("KiB", 1024.0)];

/// What a plan's budget follows from. Written `8` or `24MB`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Target {
    /// f16 bytes of the compressed layers' prompt over those it is to take, all of them counted, 1 to 64.
    Ratio(f32),
    /// Bytes that the whole cache is to take at the end of the prompt, as [`KvCache::bytes`](crate::KvCache::bytes) counts
    /// them: what is not compressed (windows, lists) among them. At least 1.
    Bytes(usize),
}

impl Target {
    /// Bytes for the heads to be compressed, which are `exact` bytes now, in a cache that holds `others` besides. Less
    /// than 0 where the others alone are too many.
    pub(crate) fn budget(self, exact: usize, others: usize) -> f32 {
        match self {
            Target::Ratio(ratio) => exact as f32 / ratio,
            Target::Bytes(bytes) => bytes as f32 - others as f32,
        }
    }

    /// The same for one layer alone of a prompt of `exact` bytes: its share.
    pub(crate) fn of_one_layer(self, exact: usize) -> Target {
        match self {
            Target::Bytes(bytes) => Target::Ratio((exact as f32 / bytes as f32).clamp(1.0, RATIOS)),
            ratio => ratio,
        }
    }

    pub(crate) fn check(self) -> Result<(), String> {
        match self {
            Target::Ratio(ratio) if !(1.0..=RATIOS).contains(&ratio) => {
                Err(format!("{ratio}; wanted a ratio of 1 to {RATIOS}, or bytes such as 24MB"))
            }
            Target::Bytes(bytes) => ByteCount(bytes).check(),
            Target::Ratio(_) => Ok(()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Target::Ratio(ratio) => ratio.fmt(f),
            Target::Bytes(bytes) => ByteCount(*bytes).fmt(f),
        }
    }
}

impl FromStr for Target {
    type Err = String;

    fn from_str(text: &str) -> Result<Target, String> {
        let target = match text.parse() {
            Ok(ratio) => Target::Ratio(ratio),
            Err(_) if !text.starts_with(|c: char| c.is_ascii_digit() || "+-.".contains(c)) => {
                return Err(format!("{text}; wanted a ratio of 1 to {RATIOS}, or bytes such as 24MB"));
            }
            Err(_) => Target::Bytes(text.parse::<ByteCount>()?.0),
        };
        target.check()?;
        Ok(target)
    }
}

/// A number of bytes, at least 1: written `24MB`, read in B, kB, MB, GB, KiB, MiB and GiB too, or as a plain number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ByteCount(pub usize);

impl ByteCount {
    fn check(self) -> Result<(), String> {
        if self.0 == 0 || self.0 as f64 > MOST {
            return Err(format!("{self}; wanted 1B to {}", ByteCount(MOST as usize)));
        }
        Ok(())
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let bytes = self.0 as f64;
        let (unit, size) = WRITTEN.into_iter().find(|(_, size)| *size <= bytes).unwrap_or(("B", 1.0));
        write!(f, "{}{unit}", bytes / size)
    }
}

impl FromStr for ByteCount {
    type Err = String;

    fn from_str(text: &str) -> Result<ByteCount, String> {
        let number = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
        let unit = &text[number.len()..];
        let known = WRITTEN.into_iter().chain(READ).find(|(name, _)| name.eq_ignore_ascii_case(unit));
        let size = match known {
            Some((_, size)) => size,
            None if unit.is_empty() => 1.0,
            None => {
                return Err(format!("{text}: {unit} is no unit; wanted B, kB, MB, GB, KiB, MiB or GiB"));
            }
        };
        let number: f64 = number.trim().parse().map_err(|_| format!("{text}; wanted bytes such as 24MB"))?;
        let bytes = (number * size).round();
        if !(1.0..=MOST).contains(&bytes) {
            return Err(format!("{text}; wanted 1B to {}", ByteCount(MOST as usize)));
        }
        Ok(ByteCount(bytes as usize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_read_as_they_are_written() {
        for bytes in [1, 999, 1000, 1001, 24_000_000, 25_165_824, 123_456_789_012_345, MOST as usize] {
            let text = ByteCount(bytes).to_string();
            assert_eq!(text.parse(), Ok(ByteCount(bytes)), "{text}");
            assert_eq!(text.parse(), Ok(Target::Bytes(bytes)), "{text}");
        }
        for (text, bytes) in
            [("24MB", 24_000_000), ("1.5GiB", 1_610_612_736), ("2kib", 2048), ("3 kB", 3000), ("77", 77)]
        {
            assert_eq!(text.parse(), Ok(ByteCount(bytes)), "{text}");
        }
        assert_eq!(ByteCount(24_500_000).to_string(), "24.5MB");
        assert_eq!("8".parse(), Ok(Target::Ratio(8.0)));
    }

    #[test]
    fn what_is_no_budget_is_told_what_would_be() {
        for (text, says) in [
            ("0", "0; wanted a ratio of 1 to 64, or bytes"),
            ("65", "65; wanted a ratio"),
            ("NaN", "NaN; wanted a ratio"),
            ("abc", "abc; wanted a ratio"),
            ("", "; wanted a ratio"),
            ("0MB", "0MB; wanted 1B to 1000000GB"),
            ("-3MB", "-3MB; wanted 1B to"),
            ("1e30GB", "1e30GB; wanted 1B to"),
            ("1e999MB", "1e999MB; wanted 1B to"),
            ("8xMB", "8xMB: xMB is no unit"),
            ("24MBit", "MBit is no unit; wanted B, kB, MB"),
            ("1.2.3MB", "1.2.3MB; wanted bytes such as 24MB"),
        ] {
            let error = text.parse::<Target>().unwrap_err();
            assert!(error.contains(says), "{text}: {error}");
        }
    }
}
