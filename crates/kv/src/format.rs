//! How are keys and values stored, and how is that written after `--kv`?

use crate::{
    Basis, Dropping, GgmlType, Kivi, KvError, Layered, Packed, Quantized, Quest, Select, SnapKv, Strawman,
    Target, Turn,
};
use std::fmt;
use std::str::FromStr;

/// Channels that quantized formats take together.
const QUANTIZED_STEP: usize = 32;

/// How keys and values are stored once they leave the update buffer. Written and read as a name, and after a colon
/// the parameters that are not to have their defaults: `exact`, `packed:kept=0.25,group=1,block=8,selected=0.1` (the first
/// three are `auto`, chosen segment by segment, unless given; also `segment`, `loss`, `grouping`, `spread`, `close`),
/// `quest:block=16,selected=0.1,dense=2`, `strawman:kept=0.25,block=8,selected=0.1`, `q8_0`, `q4_0`, `kivi4`, `kivi2`,
/// `snapkv:kept=0.25`, `layered:8` (the ratio) or `layered:24MB` (bytes for the prompt), and `drop=any`, and after an `@` what a step reads:
/// `layered:8@mass=0.99`, `@relative=0.001`, `@all`. `packed`, `strawman`, `q8_0` and `q4_0` also take `rotation=none`, for the
/// model's own channels.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum KvFormat {
    /// f16, all of it.
    Exact,
    /// The paper's two-dimensional compression, a strategy for each segment.
    Packed(Packed),
    /// Our own: all elements at few bits, most where they matter.
    Layered(Layered),
    /// All in f16; a step reads the blocks whose keys could match best.
    Quest(Quest),
    /// Leading channels of rotated vectors, and selected blocks.
    Strawman(Strawman),
    /// llama.cpp's types for keys and values, after its rotation.
    Quantized(Quantized),
    /// Keys quantized by channel, values by token.
    Kivi(Kivi),
    /// f16, of the prompt only what its last queries looked at.
    SnapKv(SnapKv),
}

/// A parameter of a format, to be read or written.
#[derive(PartialEq)]
enum Parameter<'a> {
    Share(&'a mut f32),
    Count(&'a mut usize),
    /// A share or `auto`.
    AutoShare(&'a mut Option<f32>),
    /// A count or `auto`.
    AutoCount(&'a mut Option<usize>),
    /// A number above 0.
    Positive(&'a mut f32),
    /// `svd` or `none`.
    Rotation(&'a mut Basis),
    /// `hadamard` or `none`.
    Turn(&'a mut Turn),
    /// A ratio or bytes.
    Target(&'a mut Target),
    /// `guarded` or `any`.
    Dropping(&'a mut Dropping),
}

/// The parameter whose name need not be written.
const BUDGET: &str = "budget";

impl KvFormat {
    /// Every format, with its default parameters.
    fn all() -> [KvFormat; 10] {
        [
            KvFormat::Exact,
            KvFormat::Packed(Packed::default()),
            KvFormat::Layered(Layered::default()),
            KvFormat::Quest(Quest::default()),
            KvFormat::Strawman(Strawman::default()),
            KvFormat::Quantized(Quantized::new(GgmlType::Q8_0)),
            KvFormat::Quantized(Quantized::new(GgmlType::Q4_0)),
            KvFormat::Kivi(Kivi::Bits4),
            KvFormat::Kivi(Kivi::Bits2),
            KvFormat::SnapKv(SnapKv::default()),
        ]
    }

    /// The names of all formats.
    pub fn names() -> impl Iterator<Item = &'static str> {
        KvFormat::all().into_iter().map(KvFormat::name)
    }

    /// The name without parameters.
    pub fn name(self) -> &'static str {
        match self {
            KvFormat::Exact => "exact",
            KvFormat::Packed(_) => "packed",
            KvFormat::Layered(_) => "layered",
            KvFormat::Quest(_) => "quest",
            KvFormat::Strawman(_) => "strawman",
            KvFormat::Quantized(Quantized { kind: GgmlType::Q8_0, .. }) => "q8_0",
            KvFormat::Quantized(Quantized { kind: GgmlType::Q4_0, .. }) => "q4_0",
            KvFormat::Kivi(Kivi::Bits4) => "kivi4",
            KvFormat::Kivi(Kivi::Bits2) => "kivi2",
            KvFormat::SnapKv(_) => "snapkv",
        }
    }

    /// The parameters in the order in which they are written.
    fn parameters(&mut self) -> Vec<(&'static str, Parameter<'_>)> {
        use Parameter::{AutoCount, AutoShare, Count, Positive, Rotation, Share};
        match self {
            KvFormat::Exact | KvFormat::Kivi(_) => vec![],
            KvFormat::Quantized(p) => vec![("rotation", Parameter::Turn(&mut p.rotation))],
            KvFormat::Packed(p) => vec![
                ("kept", AutoShare(&mut p.kept)),
                ("group", AutoCount(&mut p.group)),
                ("block", AutoCount(&mut p.block)),
                ("selected", Share(&mut p.selected)),
                ("rotation", Rotation(&mut p.rotation)),
                ("segment", Count(&mut p.segment)),
                ("loss", Share(&mut p.loss)),
                ("grouping", Share(&mut p.grouping)),
                ("spread", Share(&mut p.spread)),
                ("close", Positive(&mut p.close)),
            ],
            KvFormat::Layered(p) => {
                vec![(BUDGET, Parameter::Target(&mut p.target)), ("drop", Parameter::Dropping(&mut p.drop))]
            }
            KvFormat::Quest(p) => vec![
                ("block", Count(&mut p.block)),
                ("selected", Share(&mut p.selected)),
                ("dense", Count(&mut p.dense)),
            ],
            KvFormat::Strawman(p) => vec![
                ("kept", Share(&mut p.kept)),
                ("block", Count(&mut p.block)),
                ("selected", Share(&mut p.selected)),
                ("rotation", Rotation(&mut p.rotation)),
            ],
            KvFormat::SnapKv(p) => vec![("kept", Share(&mut p.kept))],
        }
    }

    /// Whether every parameter is what it may be for some model.
    fn check(mut self) -> Result<(), String> {
        let (blocks, most_kept): (&[usize], f32) = match self {
            KvFormat::Packed(_) => (&[4, 8, 16], 0.75),
            KvFormat::Strawman(_) => (&[4, 8, 16, 32], 1.0),
            _ => (&[4, 8, 16, 32, 64], 1.0),
        };
        let listed = |x: usize, list: &[usize], unit: &str| match list.split_last() {
            Some((last, others)) if !list.contains(&x) => {
                let others: Vec<String> = others.iter().map(usize::to_string).collect();
                Err(format!("{x}; wanted {} or {last} {unit}", others.join(", ")))
            }
            _ => Ok(()),
        };
        let share = |key: &str, x: f32| {
            let most = if key == "kept" { most_kept } else { 1.0 };
            if x > 0.0 && x <= most { Ok(()) } else { Err(format!("{x} is not a share in (0, {most}]")) }
        };
        if let KvFormat::Layered(Layered { select, .. }) = self {
            select.check()?;
        }
        for (key, parameter) in self.parameters() {
            let fits = match parameter {
                Parameter::Share(x) => share(key, *x),
                Parameter::AutoShare(x) => x.map_or(Ok(()), |x| share(key, x)),
                Parameter::Target(x) => x.check(),
                Parameter::Positive(x) if x.is_nan() || *x <= 0.0 => Err(format!("{x}; wanted more than 0")),
                Parameter::AutoCount(Some(x)) if key == "block" => listed(*x, blocks, "tokens"),
                Parameter::AutoCount(Some(x)) => listed(*x, &[1, 2, 4], "channels"),
                Parameter::Count(x) if key == "segment" && (*x == 0 || !x.is_multiple_of(32)) => {
                    Err(format!("{x}; wanted a multiple of 32 tokens"))
                }
                Parameter::Count(x) if key == "block" => listed(*x, blocks, "tokens"),
                // First layers that stay dense: any number.
                _ => Ok(()),
            };
            fits.map_err(|why| format!("{key}={why}"))?;
        }
        Ok(())
    }

    /// Whether this format can be had for heads of `head_dim` channels.
    pub(crate) fn fits(self, head_dim: usize) -> Result<(), KvError> {
        let refuse = |why| Err(KvError::Format { format: self.to_string(), why });
        self.check().or_else(refuse)?;
        match self {
            KvFormat::Packed(settings) => Ok(settings.fits(head_dim)?),
            KvFormat::Layered(_) if head_dim > 256 => {
                refuse(format!("head_dim {head_dim}; wanted at most 256"))
            }
            KvFormat::Quantized(_) | KvFormat::Kivi(_) if !head_dim.is_multiple_of(QUANTIZED_STEP) => {
                refuse(format!(
                    "it quantizes groups of {QUANTIZED_STEP} channels, and head_dim {head_dim} is no multiple"
                ))
            }
            _ => Ok(()),
        }
    }

    /// Bytes that the cache is to take at the end of a prompt, where the format was given a number of them.
    pub fn budget(self) -> Option<usize> {
        match self {
            KvFormat::Layered(Layered { target: Target::Bytes(bytes), .. }) => Some(bytes),
            _ => None,
        }
    }

    /// Whether a clone of a cache goes on to the bit as the cache itself does, whenever it is made. In the packed format that is so
    /// only right after the prompt: growing segments of a clone keep their borrowed strategies.
    pub fn clones_go_on(self) -> bool {
        !matches!(self, KvFormat::Packed(_))
    }

    /// Whether a prompt of so many tokens is compressed at its end, in some layer at least.
    pub fn compresses_prompt_of(self, tokens: usize) -> bool {
        match self {
            KvFormat::Exact => false,
            KvFormat::Layered(_) => tokens >= Layered::LEAST_TOKENS,
            _ => true,
        }
    }

    /// Whether the prompt of this layer is compressed at its end.
    pub(crate) fn compresses(self, layer: usize) -> bool {
        match self {
            KvFormat::Exact => false,
            KvFormat::Quest(quest) => layer >= quest.dense,
            _ => true,
        }
    }

    /// Whether it is made from the newest queries of a prompt as well as from keys and values.
    pub(crate) fn observes_queries(self) -> bool {
        matches!(self, KvFormat::SnapKv(_))
    }
}

/// The name, and what is not as by default.
impl fmt::Display for KvFormat {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(self.name())?;
        let (mut copy, same) = (*self, |format: &KvFormat| format.name() == self.name());
        let mut default = KvFormat::all().into_iter().find(same).expect("every format is among all");
        let mut separator = ':';
        for ((key, here), (_, default)) in copy.parameters().into_iter().zip(default.parameters()) {
            if here != default {
                let key = if key == BUDGET { String::new() } else { format!("{key}=") };
                write!(f, "{separator}{key}{here}")?;
                separator = ',';
            }
        }
        match self {
            KvFormat::Layered(Layered { select, .. }) if *select != Select::default() => {
                write!(f, "@{select}")
            }
            _ => Ok(()),
        }
    }
}

impl fmt::Display for Parameter<'_> {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        match self {
            Parameter::Share(x) | Parameter::Positive(x) => x.fmt(f),
            Parameter::Count(x) => x.fmt(f),
            Parameter::AutoShare(Some(x)) => x.fmt(f),
            Parameter::AutoCount(Some(x)) => x.fmt(f),
            Parameter::Target(x) => x.fmt(f),
            Parameter::Dropping(Dropping::Guarded) => f.write_str("guarded"),
            Parameter::Dropping(Dropping::Any) => f.write_str("any"),
            Parameter::AutoShare(None) | Parameter::AutoCount(None) => f.write_str("auto"),
            Parameter::Rotation(Basis::Svd) => f.write_str("svd"),
            Parameter::Turn(Turn::Hadamard) => f.write_str("hadamard"),
            Parameter::Rotation(Basis::Model) | Parameter::Turn(Turn::None) => f.write_str("none"),
        }
    }
}

impl FromStr for KvFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<KvFormat, String> {
        let (text, select) = text.split_once('@').map_or((text, None), |(text, select)| (text, Some(select)));
        let (name, parameters) = text.split_once(':').unwrap_or((text, ""));
        let Some(mut format) = KvFormat::all().into_iter().find(|format| format.name() == name) else {
            let names = KvFormat::all().map(KvFormat::name);
            return Err(format!("unknown KV format {name}; wanted one of {}", names.join(", ")));
        };
        for parameter in parameters.split(',').filter(|p| !p.is_empty()) {
            let is_budget = matches!(format, KvFormat::Layered(_)) && !parameter.contains('=');
            let bare = if is_budget { (BUDGET, parameter) } else { (parameter, "") };
            let (key, value) = parameter.split_once('=').unwrap_or(bare);
            let mut known = format.parameters();
            let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
            match known.iter_mut().find(|(name, _)| *name == key) {
                Some((_, Parameter::Share(x) | Parameter::Positive(x))) => **x = number(key, value)?,
                Some((_, Parameter::AutoShare(x))) => **x = auto(key, value)?,
                Some((_, Parameter::AutoCount(x))) => **x = auto(key, value)?,
                Some((_, Parameter::Count(x))) => **x = number(key, value)?,
                Some((_, Parameter::Target(x))) => {
                    **x = value.parse().map_err(|why| format!("{key}={why}"))?;
                }
                Some((_, Parameter::Dropping(x))) => {
                    **x = match value {
                        "guarded" => Dropping::Guarded,
                        "any" => Dropping::Any,
                        _ => return Err(format!("{key}={value}; wanted guarded or any")),
                    }
                }
                Some((_, Parameter::Rotation(x))) => {
                    **x = match value {
                        "svd" => Basis::Svd,
                        "none" => Basis::Model,
                        _ => return Err(format!("{key}={value}; wanted svd or none")),
                    }
                }
                Some((_, Parameter::Turn(x))) => {
                    **x = match value {
                        "hadamard" => Turn::Hadamard,
                        "none" => Turn::None,
                        _ => return Err(format!("{key}={value}; wanted hadamard or none")),
                    }
                }
                None if names.is_empty() => {
                    return Err(format!("{name} takes no parameters, got {parameter}"));
                }
                None => return Err(format!("unknown parameter {key}; {name} has {}", names.join(", "))),
            }
        }
        match (&mut format, select) {
            (_, None) => {}
            (KvFormat::Layered(layered), Some(select)) => layered.select = select.parse()?,
            (_, Some(select)) => return Err(format!("@{select}: {name} has nothing to select, layered has")),
        }
        format.check()?;
        Ok(format)
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
                Some(last) if piece.contains('=') && !piece.contains([':', '@']) => {
                    *last += &format!(",{piece}")
                }
                _ => formats.push(piece.to_owned()),
            }
        }
        let formats: Vec<KvFormat> = formats.iter().map(|format| format.parse()).collect::<Result<_, _>>()?;
        match formats.iter().enumerate().find(|(i, format)| formats[..*i].contains(format)) {
            Some((_, format)) => Err(format!("{format} is there twice")),
            None => Ok(KvFormats(formats)),
        }
    }
}

fn auto<T: FromStr>(key: &str, value: &str) -> Result<Option<T>, String> {
    if value == "auto" { Ok(None) } else { number(key, value).map(Some) }
}

fn number<T: FromStr>(key: &str, value: &str) -> Result<T, String> {
    value.parse().map_err(|_| format!("{key}={value} is not a number of the right kind"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        for text in [
            "packed:kept=0.375,group=2,block=16,selected=0.5",
            "quest:block=64,selected=1,dense=0",
            "strawman:kept=1,block=32,selected=0.05,rotation=none",
            "snapkv:kept=0.5",
            "layered:4",
            "layered:4@mass=0.9",
            "layered@all",
            "layered@relative=0.001",
            "layered:24MB",
            "layered:drop=any",
            "layered:12,drop=any",
            "layered:1.5GB",
            "q8_0:rotation=none",
            "q4_0:rotation=none",
        ] {
            assert_eq!(text.parse::<KvFormat>().unwrap().to_string(), text);
        }
        for format in KvFormat::all() {
            assert_eq!(format.to_string(), format.name());
            assert_eq!(format.name().parse(), Ok(format));
        }
        assert_eq!("q4_0:rotation=hadamard".parse::<KvFormat>().unwrap().to_string(), "q4_0");
        let partial: KvFormat = "packed:group=4".parse().unwrap();
        assert_eq!(partial.to_string(), "packed:group=4");
    }

    #[test]
    fn a_list_keeps_each_format_whole() {
        let text = "exact,packed:kept=0.375,group=2,packed,layered@mass=0.5,layered:4@relative=0.01";
        assert!("exact,packed,exact".parse::<KvFormats>().unwrap_err().contains("exact is there twice"));
        let list: KvFormats = text.parse().unwrap();
        assert_eq!((list.0.len(), list.to_string().as_str()), (5, text));
        assert!("exact,,packed".parse::<KvFormats>().is_err());
        let text = "layered,layered:24MB,drop=any,layered:drop=any";
        let list: KvFormats = text.parse().unwrap();
        assert_eq!((list.0.len(), list.to_string().as_str()), (3, text));
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
            "quest:block=24",
            "quest:dense=-1",
            "strawman:block=64",
            "strawman:kept=1.5",
            "q8_0:block=32",
            "q8_0:rotation=svd",
            "packed:rotation=hadamard",
            "kivi3",
            "layered:8@mass=1",
            "layered@most",
            "exact@all",
            "snapkv:kept=0",
            "layered:0",
            "layered:-3MB",
            "layered:1e30GB",
            "layered:abc",
            "layered:8,abc=1",
            "layered:8,drop=all",
        ] {
            assert!(text.parse::<KvFormat>().is_err(), "{text} was taken");
        }
    }

    #[test]
    fn an_unknown_name_is_told_all_the_known_ones() {
        let error = "exakt".parse::<KvFormat>().unwrap_err();
        for format in KvFormat::all() {
            assert!(error.contains(format.name()), "{error}");
        }
    }

    #[test]
    fn quantized_formats_refuse_heads_that_they_cannot_group() {
        for name in ["q8_0", "q4_0", "kivi4", "kivi2"] {
            let format: KvFormat = name.parse().unwrap();
            assert_eq!(format.fits(64), Ok(()));
            assert!(matches!(format.fits(80), Err(KvError::Format { .. })), "{name}");
        }
    }
}
