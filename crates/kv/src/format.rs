//! How are keys and values stored, and how is that written after `--kv`?

use crate::PackedStrategy;
use std::fmt;
use std::str::FromStr;

/// How keys and values are stored once they leave the update buffer. Written and read as `exact` or
/// `packed:kept=0.25,group=1,block=8,selected=0.1`; parameters that are left out have their defaults.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvFormat {
    /// f16, all of it.
    Exact,
    /// The paper's two-dimensional compression, with one static strategy.
    Packed(PackedStrategy),
}

impl KvFormat {
    /// The name without parameters.
    pub fn name(self) -> &'static str {
        match self {
            KvFormat::Exact => "exact",
            KvFormat::Packed(_) => "packed",
        }
    }
}

impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            KvFormat::Exact => write!(f, "exact"),
            KvFormat::Packed(s) if *s == PackedStrategy::default() => write!(f, "packed"),
            KvFormat::Packed(s) => {
                write!(
                    f,
                    "packed:kept={},group={},block={},selected={}",
                    s.kept, s.group, s.block, s.selected
                )
            }
        }
    }
}

impl FromStr for KvFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<KvFormat, String> {
        let (name, parameters) = text.split_once(':').unwrap_or((text, ""));
        let parameters: Vec<&str> = parameters.split(',').filter(|p| !p.is_empty()).collect();
        match name {
            "exact" if parameters.is_empty() => Ok(KvFormat::Exact),
            "exact" => Err("exact takes no parameters".into()),
            "packed" => packed(&parameters),
            _ => Err(format!("unknown KV format {name}; wanted exact or packed")),
        }
    }
}

/// Several formats, separated by commas; a piece like `group=2` goes on with the format before it.
#[derive(Clone, Debug, PartialEq)]
pub struct KvFormats(pub Vec<KvFormat>);

impl fmt::Display for KvFormats {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        let names: Vec<String> = self.0.iter().map(KvFormat::to_string).collect();
        f.write_str(&names.join(","))
    }
}

impl FromStr for KvFormats {
    type Err = String;

    fn from_str(text: &str) -> Result<KvFormats, String> {
        let mut formats: Vec<String> = vec![];
        for piece in text.split(',') {
            match formats.last_mut() {
                Some(last) if piece.contains('=') && !piece.contains(':') => *last += &format!(",{piece}"),
                _ => formats.push(piece.to_owned()),
            }
        }
        formats.iter().map(|format| format.parse()).collect::<Result<_, _>>().map(KvFormats)
    }
}

fn packed(parameters: &[&str]) -> Result<KvFormat, String> {
    let mut strategy = PackedStrategy::default();
    for parameter in parameters {
        let (key, value) = parameter.split_once('=').unwrap_or((parameter, ""));
        match key {
            "kept" => strategy.kept = number(key, value)?,
            "group" => strategy.group = number(key, value)?,
            "block" => strategy.block = number(key, value)?,
            "selected" => strategy.selected = number(key, value)?,
            _ => return Err(format!("unknown parameter {key}; packed has kept, group, block and selected")),
        }
    }
    // What depends on the model's head_dim is checked when the model is known.
    if !(strategy.kept > 0.0 && strategy.kept <= 0.75) {
        return Err(format!("kept={} is not a share in (0, 0.75]: a quarter is truncated", strategy.kept));
    }
    if ![1, 2, 4].contains(&strategy.group) {
        return Err(format!("group={}; wanted 1, 2 or 4 channels", strategy.group));
    }
    if ![4, 8, 16].contains(&strategy.block) {
        return Err(format!("block={}; wanted 4, 8 or 16 tokens", strategy.block));
    }
    if !(strategy.selected > 0.0 && strategy.selected <= 1.0) {
        return Err(format!("selected={} is not a share in (0, 1]", strategy.selected));
    }
    Ok(KvFormat::Packed(strategy))
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{key}={value} is not a number of the right kind"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for text in ["exact", "packed", "packed:kept=0.375,group=2,block=16,selected=0.5"] {
            assert_eq!(text.parse::<KvFormat>().unwrap().to_string(), text);
        }
        let partial: KvFormat = "packed:group=4".parse().unwrap();
        assert_eq!(partial.to_string(), "packed:kept=0.25,group=4,block=8,selected=0.1");
    }

    #[test]
    fn a_list_keeps_each_format_whole() {
        let text = "exact,packed:kept=0.375,group=2,block=8,selected=0.1,packed";
        let list: KvFormats = text.parse().unwrap();
        assert_eq!((list.0.len(), list.to_string().as_str()), (3, text));
        assert!("exact,,packed".parse::<KvFormats>().is_err());
    }

    #[test]
    fn refuses_what_cannot_be() {
        for text in [
            "",
            "exakt",
            "exact:kept=1",
            "packed:kept",
            "packed:kept=2",
            "packed:kept=NaN",
            "packed:group=3",
            "packed:block=5",
            "packed:selected=0",
            "packed:selected=1.1",
            "packed:colour=red",
        ] {
            assert!(text.parse::<KvFormat>().is_err(), "{text} was taken");
        }
    }
}
