//! The pages of the layered format: which bits keys and values got, and what was dropped.

use mosaickv_kv::{HalfInfo, HeadInfo, PageInfo};
use serde_json::json;
use std::io::{self, Write};

/// Bits a scalar from which on a row of the table counts, up to the next one's.
const STEPS: [f64; 8] = [0.0, 0.001, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0];

type Half = fn(&PageInfo) -> HalfInfo;

const HALVES: [Half; 2] = [|page| page.keys, |page| page.values];

/// Every page as a JSON line, and what is in no page of a head as another.
pub fn lines(heads: &[HeadInfo], out: &mut impl Write) -> io::Result<()> {
    for head in heads {
        for (part, pages) in [("prompt", &head.prompt), ("tail", &head.tail)] {
            for (i, page) in pages.iter().enumerate() {
                let half = |half: HalfInfo| {
                    let [eight, four, two] = half.channels;
                    json!({
                        "channels_8_bits": eight, "channels_4_bits": four, "channels_2_bits": two,
                        "escapes": half.escapes, "bytes": half.bytes,
                    })
                };
                let line = json!({
                    "layer": head.layer, "head": head.head, "part": part, "page": i, "tokens": page.tokens,
                    "keys": half(page.keys), "values": half(page.values), "bytes": page.bytes,
                });
                writeln!(out, "{line}")?;
            }
        }
        let line = json!({
            "layer": head.layer, "head": head.head, "part": "rest", "sinks": head.sinks, "dropped": head.dropped,
            "buffer": head.buffer, "bytes": head.other_bytes, "fell_back": head.fell_back(),
            "keys_error_over_planned": head.distortion[0], "values_error_over_planned": head.distortion[1],
        });
        writeln!(out, "{line}")?;
    }
    Ok(())
}

/// How many tokens have how many bits, and the means by layer: of the prompt, without its first four tokens and the newest, which
/// are in the window and the buffer.
pub fn print(heads: &[HeadInfo], head_dim: usize, out: &mut impl Write) -> io::Result<()> {
    print_bits(heads, head_dim, out)?;
    print_layers(heads, head_dim, out)?;
    print_fallbacks(heads, out)?;
    let head_mb = |of: &dyn Fn(&HeadInfo) -> usize| heads.iter().map(of).sum::<usize>() as f64 / 1e6;
    let of_pages = |pages: &[PageInfo]| pages.iter().map(|page| page.bytes).sum::<usize>();
    writeln!(
        out,
        "\npages {:.2} MB, of which headers {:.2}; newest tokens and what came after {:.2} MB; sinks, means, spreads and lists {:.2} MB",
        head_mb(&|head| of_pages(&head.prompt)),
        head_mb(&|head| head
            .prompt
            .iter()
            .map(|page| page.bytes - page.keys.bytes - page.values.bytes)
            .sum()),
        head_mb(&|head| of_pages(&head.tail)),
        head_mb(&|head| head.other_bytes)
    )
}

/// Tokens of a head that the plan was for.
fn planned(head: &HeadInfo) -> usize {
    head.prompt.iter().map(|page| page.tokens).sum::<usize>() + head.dropped
}

fn print_bits(heads: &[HeadInfo], head_dim: usize, out: &mut impl Write) -> io::Result<()> {
    let all = heads.iter().map(planned).sum::<usize>().max(1) as f64;
    writeln!(out, "{:>14}{:>28}{:>28}", "", "keys", "values")?;
    write!(out, "{:>14}", "bits a scalar")?;
    (0..2).try_for_each(|_| write!(out, "{:>10}{:>9}{:>9}", "pages", "tokens", "MB"))?;
    for (i, step) in STEPS.iter().enumerate() {
        let next = STEPS.get(i + 1).copied().unwrap_or(f64::INFINITY);
        let name = match (i, STEPS.get(i + 1)) {
            (0, _) => "none".to_owned(),
            (1, Some(next)) => format!("below {next}"),
            (_, Some(next)) => format!("{step} to {next}"),
            (_, None) => format!("{step} to 8"),
        };
        write!(out, "\n{name:>14}")?;
        for half in HALVES {
            let is_here =
                |page: &&PageInfo| (*step..next).contains(&(half(page).bits() as f64 / head_dim as f64));
            let here: Vec<&PageInfo> = heads.iter().flat_map(|head| &head.prompt).filter(is_here).collect();
            let tokens: usize = here.iter().map(|page| page.tokens).sum();
            let bytes: usize = here.iter().map(|page| half(page).bytes).sum();
            let share = 100.0 * tokens as f64 / all;
            write!(out, "{:>10}{share:>8.1}%{:>9.2}", here.len(), bytes as f64 / 1e6)?;
        }
    }
    let dropped = 100.0 * heads.iter().map(|head| head.dropped).sum::<usize>() as f64 / all;
    writeln!(out, "\n{:>14}{:>10}{dropped:>8.1}%{:>9}{:>10}{dropped:>8.1}%", "dropped", "", "", "")
}

fn print_layers(heads: &[HeadInfo], head_dim: usize, out: &mut impl Write) -> io::Result<()> {
    writeln!(
        out,
        "\n{:>8}{:>11}{:>13}{:>10}{:>10}{:>9}",
        "layer", "key bits", "value bits", "dropped", "escapes", "MB"
    )?;
    for heads in heads.chunk_by(|a, b| a.layer == b.layer) {
        write!(out, "{:>8}", heads[0].layer)?;
        print_means(heads, head_dim, out)?;
    }
    write!(out, "{:>8}", "all")?;
    print_means(heads, head_dim, out)
}

/// The heads that were stored worse than planned.
fn print_fallbacks(heads: &[HeadInfo], out: &mut impl Write) -> io::Result<()> {
    for head in heads.iter().filter(|head| head.fell_back()) {
        let [keys, values] = head.distortion;
        writeln!(
            out,
            "layer {}, KV head {} fell back to safer profiles: errors {keys:.1} (keys) and {values:.1} (values) times those planned",
            head.layer, head.head
        )?;
    }
    Ok(())
}

/// Means over tokens and heads; bits and escapes are those of the tokens that are kept.
fn print_means(heads: &[HeadInfo], head_dim: usize, out: &mut impl Write) -> io::Result<()> {
    let pages = || heads.iter().flat_map(|head| &head.prompt);
    let kept = pages().map(|page| page.tokens).sum::<usize>().max(1);
    let scalars = (kept * head_dim) as f64;
    let [keys, values] = HALVES
        .map(|half| pages().map(|page| half(page).bits() * page.tokens).sum::<usize>() as f64 / scalars);
    let escapes: usize = pages().map(|page| page.keys.escapes + page.values.escapes).sum();
    let (dropped, planned) =
        heads.iter().fold((0, 0), |(d, all), head| (d + head.dropped, all + planned(head)));
    let all_pages = heads.iter().flat_map(|head| head.prompt.iter().chain(&head.tail));
    let bytes = all_pages.map(|page| page.bytes).sum::<usize>()
        + heads.iter().map(|head| head.other_bytes).sum::<usize>();
    writeln!(
        out,
        "{keys:>11.2}{values:>13.2}{:>9.1}%{:>9.2}%{:>9.2}",
        100.0 * dropped as f64 / planned.max(1) as f64,
        100.0 * escapes as f64 / (2.0 * scalars),
        bytes as f64 / 1e6
    )
}
