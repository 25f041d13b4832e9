//! Which strategy did each segment get? Segments along the tokens, a row for each layer and KV head.
//!
//! Colour is the rate, pale where most was dropped; each segment says its element group and token block where there is
//! room, and a line along its foot is as long as its compression loss, its whole width being 1. Colours are those of the
//! needle maps: they survive colour blindness and grey.

use super::heat::colour;
use super::plot::{Area, GRID, drawing, text_style};
use mosaickv_kv::SegmentInfo;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};
use std::error::Error;

const WIDTH: i32 = 900;
const ROW: i32 = 9;
const LEFT: i32 = 70;
const RIGHT: i32 = 16;
const TOP: i32 = 44;
const LEGEND: i32 = 74;
const LOST: RGBColor = RGBColor(214, 39, 40);

/// An SVG file of the segments of a cache that holds `tokens` tokens of heads of `head_dim` channels.
pub fn svg(segments: &[SegmentInfo], tokens: usize, head_dim: usize) -> Result<String, String> {
    let heads = segments.iter().map(|s| s.head + 1).max().unwrap_or(1);
    let layers = segments.iter().map(|s| s.layer + 1).max().unwrap_or(1);
    let height = (heads * layers) as i32 * ROW;
    drawing((WIDTH as u32, (TOP + height + LEGEND) as u32), |area| {
        let title =
            format!("{} segments of {tokens} tokens, {layers} layers of {heads} KV heads", segments.len());
        area.draw(&Text::new(title, (WIDTH / 2, 14), text_style(16, HPos::Center, VPos::Top)))?;
        for segment in segments {
            draw_segment(area, segment, heads, (tokens, head_dim))?;
        }
        for layer in (0..layers).filter(|layer| layer % 5 == 0) {
            let at = (LEFT - 6, TOP + (layer * heads) as i32 * ROW + ROW / 2);
            area.draw(&Text::new(format!("layer {layer}"), at, text_style(12, HPos::Right, VPos::Center)))?;
        }
        draw_legend(area, segments, (TOP + height, head_dim))
    })
}

/// Where position `token` of `tokens` is.
fn x(token: usize, tokens: usize) -> i32 {
    LEFT + (i64::from(WIDTH - LEFT - RIGHT) * token as i64 / tokens.max(1) as i64) as i32
}

/// Of an eighth to three eighths of the elements: the range of the paper's rates.
fn shade(kept: usize, head_dim: usize) -> RGBColor {
    colour(1.0 - (kept as f64 / head_dim as f64 - 0.1) / 0.3)
}

fn draw_segment(
    area: &Area,
    segment: &SegmentInfo,
    heads: usize,
    (tokens, head_dim): (usize, usize),
) -> Result<(), Box<dyn Error>> {
    let top = TOP + (segment.layer * heads + segment.head) as i32 * ROW;
    let (from, to) = (x(segment.first, tokens), x(segment.first + segment.tokens, tokens));
    let fill = shade(segment.kept, head_dim);
    area.draw(&Rectangle::new([(from, top), (to, top + ROW)], fill.filled()))?;
    area.draw(&Rectangle::new([(from, top), (to, top + ROW)], GRID.stroke_width(1)))?;
    let lost = from + (f64::from(to - from) * f64::from(segment.loss.clamp(0.0, 1.0))) as i32;
    area.draw(&Rectangle::new([(from, top + ROW - 2), (lost, top + ROW)], LOST.filled()))?;
    if to - from > 44 {
        let dark = u32::from(fill.0) + u32::from(fill.1) + u32::from(fill.2) < 380;
        let ink = if dark { WHITE } else { BLACK };
        let name =
            format!("g{} b{}{}", segment.group, segment.block, if segment.temporary { " *" } else { "" });
        let style = text_style(8, HPos::Center, VPos::Center).color(&ink);
        area.draw(&Text::new(name, ((from + to) / 2, top + ROW / 2 + 1), style))?;
    }
    Ok(())
}

fn draw_legend(
    area: &Area,
    segments: &[SegmentInfo],
    (bottom, head_dim): (i32, usize),
) -> Result<(), Box<dyn Error>> {
    let mut kept: Vec<usize> = segments.iter().map(|segment| segment.kept).collect();
    kept.sort_unstable();
    kept.dedup();
    for (i, &kept) in kept.iter().enumerate() {
        let at = (LEFT + 130 * i as i32, bottom + 14);
        let box_ = [at, (at.0 + 14, at.1 + 14)];
        area.draw(&Rectangle::new(box_, shade(kept, head_dim).filled()))?;
        let name = format!("{kept} of {head_dim} elements");
        area.draw(&Text::new(name, (at.0 + 20, at.1 + 7), text_style(12, HPos::Left, VPos::Center)))?;
    }
    let note = "g: channels kept or dropped together; b: tokens of a block; *: borrowed strategy; left to right: tokens";
    area.draw(&Text::new(note, (LEFT, bottom + 46), text_style(12, HPos::Left, VPos::Center)))?;
    area.draw(&Rectangle::new([(LEFT, bottom + 62), (LEFT + 14, bottom + 64)], LOST.filled()))?;
    let lost = segments.iter().map(|segment| f64::from(segment.loss) * segment.tokens as f64).sum::<f64>();
    let tokens: usize = segments.iter().map(|segment| segment.tokens).sum();
    let mean = lost / tokens.max(1) as f64;
    let note = format!("compression loss, the segment's whole width being 1; mean {mean:.3}");
    area.draw(&Text::new(note, (LEFT + 20, bottom + 63), text_style(12, HPos::Left, VPos::Center)))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_segment_is_drawn_where_its_tokens_are() {
        let segment = |layer, head, first, kept| SegmentInfo {
            layer,
            head,
            first,
            tokens: 500,
            kept,
            channels: 48,
            group: 2,
            block: 16,
            loss: 0.1,
            bytes: 1000,
            temporary: first > 0,
            read: None,
        };
        let segments = [segment(0, 0, 0, 8), segment(0, 0, 500, 24), segment(1, 0, 0, 16)];
        let drawn = svg(&segments, 1000, 64).unwrap();
        let svg = roxmltree::Document::parse(&drawn).unwrap();
        let filled = |fill: &str, x: &str| {
            svg.descendants()
                .any(|node| node.attribute("fill") == Some(fill) && node.attribute("x") == Some(x))
        };
        let hex = |kept| {
            let RGBColor(r, g, b) = shade(kept, 64);
            format!("#{r:02X}{g:02X}{b:02X}")
        };
        assert!(filled(&hex(8), "70") && filled(&hex(16), "70"), "{drawn}");
        assert!(filled(&hex(24), &x(500, 1000).to_string()), "{drawn}");
        assert!(drawn.contains("g2 b16 *"), "{drawn}");
        let lost = svg.descendants().filter(|node| node.attribute("fill") == Some("#D62728"));
        // A tenth of half of the picture's width: 40 pixels of 407.
        let widths: Vec<&str> = lost.filter_map(|node| node.attribute("width")).collect();
        assert!(
            widths.len() == 4 && widths.iter().filter(|&&width| width == "40").count() >= 2,
            "{widths:?}"
        );
    }
}
