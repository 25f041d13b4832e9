//! The segments of a packed format: which strategies were chosen, and what they lose.

use mosaickv_kv::SegmentInfo;
use serde_json::json;
use std::collections::BTreeMap;
use std::io::{self, Write};

pub fn line(s: &SegmentInfo) -> serde_json::Value {
    json!({
        "layer": s.layer, "head": s.head, "first": s.first, "tokens": s.tokens, "kept": s.kept,
        "channels": s.channels, "group": s.group, "block": s.block, "loss": s.loss, "bytes": s.bytes,
        "temporary": s.temporary,
    })
}

/// How often each strategy was chosen, and the mean of what was chosen by layer.
pub fn print(segments: &[SegmentInfo], head_dim: usize, out: &mut impl Write) -> io::Result<()> {
    let rate = |s: &SegmentInfo| 100.0 * (1.0 - s.kept as f64 / head_dim as f64);
    let mut strategies: BTreeMap<(usize, usize, usize), Vec<&SegmentInfo>> = BTreeMap::new();
    let mut layers: BTreeMap<usize, Vec<&SegmentInfo>> = BTreeMap::new();
    for segment in segments {
        strategies.entry((segment.kept, segment.group, segment.block)).or_default().push(segment);
        layers.entry(segment.layer).or_default().push(segment);
    }
    let mean = |of: &[&SegmentInfo], what: &dyn Fn(&SegmentInfo) -> f64| {
        let tokens: usize = of.iter().map(|s| s.tokens).sum();
        of.iter().map(|s| what(s) * s.tokens as f64).sum::<f64>() / tokens as f64
    };
    let bytes = |of: &[&SegmentInfo]| of.iter().map(|s| s.bytes).sum::<usize>() as f64 / 1e6;
    writeln!(out, "{:>8}{:>8}{:>8}{:>11}{:>9}{:>10}", "rate", "group", "block", "segments", "loss", "MB")?;
    for ((_, group, block), of) in &strategies {
        writeln!(
            out,
            "{:>7.1}%{group:>8}{block:>8}{:>11}{:>9.3}{:>10.2}",
            rate(of[0]),
            of.len(),
            mean(of, &|s| f64::from(s.loss)),
            bytes(of)
        )?;
    }
    writeln!(
        out,
        "\n{:>8}{:>8}{:>8}{:>8}{:>11}{:>9}{:>10}",
        "layer", "rate", "group", "block", "segments", "loss", "MB"
    )?;
    for (layer, of) in &layers {
        writeln!(
            out,
            "{layer:>8}{:>7.1}%{:>8.2}{:>8.2}{:>11}{:>9.3}{:>10.2}",
            mean(of, &rate),
            mean(of, &|s| s.group as f64),
            mean(of, &|s| s.block as f64),
            of.len(),
            mean(of, &|s| f64::from(s.loss)),
            bytes(of)
        )?;
    }
    Ok(())
}
