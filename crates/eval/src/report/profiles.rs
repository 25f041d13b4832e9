//! Which bits did the pages of the layered format get? Pages in the plan's order, a row for each layer and KV head.
//!
//! A row has two bands, keys above values. Its whole length are the tokens of the prompt that the plan is for, the most
//! important first; colour is the bits a scalar, dark where there are many, and what is blank at the end was dropped. Colours are
//! those of the needle maps: they survive colour blindness and grey.

use super::heat::colour;
use super::plot::{Area, GRID, drawing, text_style};
use mosaickv_kv::{HalfInfo, HeadInfo, PageInfo};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};
use std::error::Error;

const WIDTH: i32 = 900;
const BAND: i32 = 5;
/// Two bands and what is between two rows.
const ROW: i32 = 2 * BAND + 2;
const LEFT: i32 = 70;
const RIGHT: i32 = 16;
const TOP: i32 = 44;
const LEGEND: i32 = 84;

/// Bits a scalar that the legend shows the colours of, and counts from one to the next.
const STEPS: [f64; 7] = [0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0];

/// Keys or values of a page.
type Half = fn(&PageInfo) -> HalfInfo;

const HALVES: [(&str, Half); 2] = [("keys", |page| page.keys), ("values", |page| page.values)];

/// An SVG file of the prompt's pages of heads of `head_dim` channels, by layer and head.
pub fn svg(heads: &[HeadInfo], head_dim: usize) -> Result<String, String> {
    let height = heads.len() as i32 * ROW;
    let planned = heads.iter().map(tokens).max().unwrap_or(0);
    let pages: usize = heads.iter().map(|head| head.prompt.len()).sum();
    drawing((WIDTH as u32, (TOP + height + LEGEND) as u32), |area| {
        let title = format!("{pages} pages of {} heads, {planned} tokens to plan for", heads.len());
        area.draw(&Text::new(title, (WIDTH / 2, 14), text_style(16, HPos::Center, VPos::Top)))?;
        for (row, head) in heads.iter().enumerate() {
            let top = TOP + row as i32 * ROW;
            draw_head(area, head, (top, head_dim))?;
            if head.head == 0 && head.layer % 5 == 0 {
                let at = (LEFT - 6, top + ROW / 2);
                let name = format!("layer {}", head.layer);
                area.draw(&Text::new(name, at, text_style(12, HPos::Right, VPos::Center)))?;
            }
        }
        draw_legend(area, heads, (TOP + height, head_dim))
    })
}

/// Tokens that the head's plan was for.
fn tokens(head: &HeadInfo) -> usize {
    head.prompt.iter().map(|page| page.tokens).sum::<usize>() + head.dropped
}

fn shade(bits: f64) -> RGBColor {
    // Two bits more matter most where there are few.
    colour(1.0 - (1.0 + bits).log2() / 9f64.log2())
}

fn draw_head(area: &Area, head: &HeadInfo, (top, head_dim): (i32, usize)) -> Result<(), Box<dyn Error>> {
    let all = tokens(head).max(1) as i64;
    let x = |token: usize| LEFT + (i64::from(WIDTH - LEFT - RIGHT) * token as i64 / all) as i32;
    for (band, (_, half)) in HALVES.iter().enumerate() {
        let top = top + band as i32 * BAND;
        let mut first = 0;
        for run in head.prompt.chunk_by(|a, b| half(a).bits() == half(b).bits()) {
            let after = first + run.iter().map(|page| page.tokens).sum::<usize>();
            let corners = [(x(first), top), (x(after), top + BAND)];
            let bits = half(&run[0]).bits() as f64 / head_dim as f64;
            area.draw(&Rectangle::new(corners, shade(bits).filled()))?;
            first = after;
        }
    }
    let outline = [(LEFT, top), (x(all as usize), top + 2 * BAND)];
    area.draw(&Rectangle::new(outline, GRID.stroke_width(1)))?;
    Ok(())
}

/// Bits a scalar of the tokens that are kept, and the shares of the tokens that have as many as each of the steps and
/// fewer than the next.
fn shares(heads: &[HeadInfo], half: Half, head_dim: usize) -> (f64, [f64; STEPS.len()]) {
    let (mut bits, mut kept, mut counts) = (0.0, 0usize, [0usize; STEPS.len()]);
    for page in heads.iter().flat_map(|head| &head.prompt) {
        let of_page = half(page).bits() as f64 / head_dim as f64;
        bits += of_page * page.tokens as f64;
        kept += page.tokens;
        counts[STEPS.partition_point(|step| *step <= of_page) - 1] += page.tokens;
    }
    let all = heads.iter().map(tokens).sum::<usize>().max(1) as f64;
    (bits / kept.max(1) as f64, counts.map(|count| count as f64 / all))
}

fn draw_legend(
    area: &Area,
    heads: &[HeadInfo],
    (bottom, head_dim): (i32, usize),
) -> Result<(), Box<dyn Error>> {
    let text = |text: String, at: (i32, i32)| {
        area.draw(&Text::new(text, at, text_style(12, HPos::Left, VPos::Center)))
    };
    let found = HALVES.map(|(name, half)| (name, shares(heads, half, head_dim)));
    let width = (WIDTH - LEFT - RIGHT - 60) / (STEPS.len() + 1) as i32;
    for (row, (name, (_, shares))) in found.iter().enumerate() {
        let y = bottom + 36 + row as i32 * 16;
        text((*name).to_owned(), (LEFT, y))?;
        for (i, share) in shares.iter().enumerate() {
            text(format!("{:.1} %", 100.0 * share), (LEFT + 60 + i as i32 * width, y))?;
        }
    }
    for (i, step) in STEPS.iter().enumerate() {
        let at = (LEFT + 60 + i as i32 * width, bottom + 12);
        area.draw(&Rectangle::new([at, (at.0 + 14, at.1 + 14)], shade(*step).filled()))?;
        let name = match STEPS.get(i + 1) {
            Some(next) => format!("{step} to {next}"),
            None => format!("{step} to 8 bits"),
        };
        text(name, (at.0 + 18, at.1 + 7))?;
    }
    let (dropped, all) = heads.iter().fold((0, 0), |(d, all), head| (d + head.dropped, all + tokens(head)));
    let at = (LEFT + 60 + STEPS.len() as i32 * width, bottom + 12);
    area.draw(&Rectangle::new([at, (at.0 + 14, at.1 + 14)], GRID.stroke_width(1)))?;
    text("dropped".to_owned(), (at.0 + 18, at.1 + 7))?;
    text(format!("{:.1} %", 100.0 * dropped as f64 / all.max(1) as f64), (at.0, bottom + 36))?;
    let note = format!(
        "bits a scalar of the tokens kept: keys {:.2}, values {:.2}; left to right: the prompt's tokens, most important \
         first; above: keys",
        found[0].1.0, found[1].1.0
    );
    Ok(text(note, (LEFT, bottom + 72))?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn half(eight: usize, four: usize, two: usize) -> HalfInfo {
        HalfInfo { channels: [eight, four, two], escapes: 0, bytes: 8 * (8 * eight + 4 * four + 2 * two) }
    }

    fn head(layer: usize, pages: &[(HalfInfo, HalfInfo)], dropped: usize) -> HeadInfo {
        let page = |&(keys, values): &(HalfInfo, HalfInfo)| PageInfo {
            tokens: 64,
            keys,
            values,
            bytes: 0,
            read: None,
        };
        HeadInfo {
            layer,
            head: 0,
            sinks: 4,
            prompt: pages.iter().map(page).collect(),
            dropped,
            tail: vec![],
            buffer: 0,
            other_bytes: 0,
            distortion: [1.0; 2],
        }
    }

    #[test]
    fn pages_are_as_long_as_their_tokens_and_what_was_dropped_is_blank() {
        let (fine, coarse, none) = (half(64, 0, 0), half(0, 0, 64), half(0, 0, 0));
        let heads = [
            head(0, &[(fine, coarse), (coarse, coarse)], 128),
            head(5, &[(coarse, none), (coarse, none)], 0),
        ];
        let drawn = svg(&heads, 64).unwrap();
        let svg = roxmltree::Document::parse(&drawn).unwrap();
        let widths = |bits: f64| -> Vec<&str> {
            let RGBColor(r, g, b) = shade(bits);
            let fill = format!("#{r:02X}{g:02X}{b:02X}");
            let filled = svg.descendants().filter(|node| node.attribute("fill") == Some(&fill));
            filled.filter_map(|node| node.attribute("width")).filter(|width| *width != "14").collect()
        };
        // Of 814 pixels: 64 of 256 tokens; one run of two pages; all of them.
        assert_eq!(widths(8.0), ["203"], "{drawn}");
        assert_eq!(widths(2.0), ["204", "407", "814"], "{drawn}");
        assert_eq!(widths(0.0), ["814"], "{drawn}");
        let texts: Vec<&str> = svg.descendants().filter_map(|node| node.text()).map(str::trim).collect();
        for wanted in ["layer 0", "layer 5", "33.3 %", "16.7 %", "4 pages of 2 heads, 256 tokens to plan for"]
        {
            assert!(texts.contains(&wanted), "no {wanted} in {texts:?}");
        }
        assert!(texts.iter().any(|text| text.contains("keys 3.50, values 1.00")), "{texts:?}");
    }
}
