//! Where in the prompt are needles lost? A map of depth and length for each format.
//!
//! Colours are those of cividis (Nuñez, Anderton, Renslow 2018, arXiv 1712.01662): dark blue to yellow, in an order
//! that survives colour blindness and grey.

use super::page::{Plot, shorten, slug};
use super::plot::{Area, GRID, INK, drawing, text_style};
use crate::results::AnswerRow;
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, VPos};
use std::error::Error;

/// What the tasks with needles are called.
const TASKS: &str = "niah";

const CIVIDIS: [RGBColor; 5] = [
    RGBColor(0, 34, 78),
    RGBColor(65, 77, 107),
    RGBColor(125, 124, 120),
    RGBColor(187, 175, 113),
    RGBColor(254, 232, 56),
];

const LEFT: i32 = 86;
const TOP: i32 = 52;
const CELL_HEIGHT: i32 = 30;
/// Of the colour bar and what is left and right of it.
const BAR: i32 = 96;
const BOTTOM: i32 = 84;

/// Sum of scores and count, by depth and length.
#[derive(Clone, Debug, PartialEq)]
struct Map {
    bins: usize,
    /// `[bins, lengths]`
    cells: Vec<(f64, usize)>,
}

impl Map {
    fn new(rows: &[&AnswerRow], lengths: &[usize], bins: usize) -> Map {
        let mut cells = vec![(0.0, 0); bins * lengths.len()];
        for row in rows {
            let (Some(depth), Ok(length)) = (row.depth, lengths.binary_search(&row.length)) else { continue };
            // A depth of 1 belongs to the last bin.
            let bin = ((depth * bins as f64) as usize).min(bins - 1);
            let cell = &mut cells[bin * lengths.len() + length];
            *cell = (cell.0 + row.score, cell.1 + 1);
        }
        Map { bins, cells }
    }

    fn filled(&self) -> usize {
        self.cells.iter().filter(|cell| cell.1 > 0).count()
    }
}

/// A map for each format that has answers to needle tasks. `lengths` ascend. Ten bins of depth where at least four
/// fifths of their cells have samples, else five.
pub(super) fn maps(
    formats: &[(String, Vec<&AnswerRow>)],
    lengths: &[usize],
    name: &str,
) -> Vec<Result<Plot, String>> {
    let needle = |row: &&&AnswerRow| row.task.starts_with(TASKS) && row.depth.is_some();
    let needles: Vec<(&str, Vec<&AnswerRow>)> = formats
        .iter()
        .map(|(kv, rows)| (kv.as_str(), rows.iter().filter(needle).copied().collect::<Vec<_>>()))
        .filter(|(_, rows)| !rows.is_empty())
        .collect();
    let mut lengths = lengths.to_vec();
    lengths.retain(|length| needles.iter().any(|(_, rows)| rows.iter().any(|row| row.length == *length)));
    let fine =
        needles.iter().all(|(_, rows)| Map::new(rows, &lengths, 10).filled() * 5 >= lengths.len() * 40);
    let bins = if fine { 10 } else { 5 };
    let mut plots = vec![];
    for (at, (kv, rows)) in needles.iter().enumerate() {
        let map = Map::new(rows, &lengths, bins);
        let plot = draw(&map, &lengths, kv).map(|svg| Plot {
            name: format!("{name}-needles-{}-{}.svg", at + 1, slug(kv)),
            alt: format!("Mean score of needle tasks by depth and length, {kv}"),
            svg,
        });
        plots.push(plot);
    }
    plots
}

/// The colour of a score in [0, 1].
pub(super) fn colour(score: f64) -> RGBColor {
    let place = score.clamp(0.0, 1.0) * (CIVIDIS.len() - 1) as f64;
    let (below, part) = (place as usize, place.fract());
    let (a, b) = (CIVIDIS[below], CIVIDIS[(below + 1).min(CIVIDIS.len() - 1)]);
    let between = |a: u8, b: u8| (f64::from(a) + part * (f64::from(b) - f64::from(a))).round() as u8;
    RGBColor(between(a.0, b.0), between(a.1, b.1), between(a.2, b.2))
}

fn draw(map: &Map, lengths: &[usize], kv: &str) -> Result<String, String> {
    let columns = lengths.len().max(1) as i32;
    let cell_width = (360 / columns).clamp(26, 220);
    let (width, height) = (cell_width * columns, CELL_HEIGHT * map.bins as i32);
    let size = (LEFT + width + BAR, TOP + height + BOTTOM);
    drawing((size.0 as u32, size.1 as u32), |area| {
        let limit = ((size.0 - 24) / 7) as usize;
        let title = Text::new(shorten(kv, limit), (size.0 / 2, 14), text_style(16, HPos::Center, VPos::Top));
        area.draw(&title)?;
        for (at, &(sum, count)) in map.cells.iter().enumerate() {
            let (bin, length) = ((at / lengths.len()) as i32, (at % lengths.len()) as i32);
            let corner = (LEFT + length * cell_width, TOP + bin * CELL_HEIGHT);
            let mean = (count > 0).then(|| sum / count as f64);
            draw_cell(area, (corner, (corner.0 + cell_width, corner.1 + CELL_HEIGHT)), mean)?;
        }
        draw_axes(area, map.bins, lengths, cell_width)?;
        draw_bar(area, (LEFT + width + 22, height))
    })
}

/// White with a stroke through it where there are no samples.
fn draw_cell(
    area: &Area,
    (corner, opposite): ((i32, i32), (i32, i32)),
    mean: Option<f64>,
) -> Result<(), Box<dyn Error>> {
    match mean {
        None => {
            let stroke = [(corner.0, opposite.1), (opposite.0, corner.1)];
            area.draw(&PathElement::new(stroke, GRID.stroke_width(1)))?;
        }
        Some(mean) => {
            area.draw(&Rectangle::new([corner, opposite], colour(mean).filled()))?;
            let ink = if mean < 0.5 { WHITE } else { BLACK };
            let style = text_style(14, HPos::Center, VPos::Center).color(&ink);
            let centre = ((corner.0 + opposite.0) / 2, (corner.1 + opposite.1) / 2);
            area.draw(&Text::new(format!("{:.0}", 100.0 * mean), centre, style))?;
        }
    }
    area.draw(&Rectangle::new([corner, opposite], GRID.stroke_width(1)))?;
    Ok(())
}

fn draw_axes(area: &Area, bins: usize, lengths: &[usize], cell_width: i32) -> Result<(), Box<dyn Error>> {
    let (width, height) = (cell_width * lengths.len() as i32, CELL_HEIGHT * bins as i32);
    for bin in 0..=bins {
        let at = (LEFT - 8, TOP + bin as i32 * CELL_HEIGHT);
        let percent = format!("{}", 100 * bin / bins);
        area.draw(&Text::new(percent, at, text_style(14, HPos::Right, VPos::Center)))?;
    }
    // Labels of six digits need 50 pixels.
    let every = (50 / cell_width + i32::from(50 % cell_width > 0)).max(1) as usize;
    for (at, length) in lengths.iter().enumerate().step_by(every) {
        let centre = (LEFT + at as i32 * cell_width + cell_width / 2, TOP + height + 8);
        let label = if *length == 0 { "as it is".into() } else { length.to_string() };
        area.draw(&Text::new(label, centre, text_style(14, HPos::Center, VPos::Top)))?;
    }
    let below = (LEFT + width / 2, TOP + height + 32);
    area.draw(&Text::new("length (tokens)", below, text_style(16, HPos::Center, VPos::Top)))?;
    let empty = [(LEFT, TOP + height + 60), (LEFT + 20, TOP + height + 74)];
    area.draw(&Rectangle::new(empty, GRID.stroke_width(1)))?;
    area.draw(&PathElement::new([(empty[0].0, empty[1].1), (empty[1].0, empty[0].1)], GRID.stroke_width(1)))?;
    let legend = (LEFT + 28, TOP + height + 67);
    area.draw(&Text::new("no samples", legend, text_style(14, HPos::Left, VPos::Center)))?;
    let beside = text_style(16, HPos::Center, VPos::Top).transform(FontTransform::Rotate270);
    area.draw(&Text::new("needle's depth (% of the prompt)", (14, TOP + height / 2), beside))?;
    Ok(())
}

fn draw_bar(area: &Area, (x, height): (i32, i32)) -> Result<(), Box<dyn Error>> {
    const STEPS: i32 = 50;
    for step in 0..STEPS {
        let edge = |step: i32| TOP + height - height * step / STEPS;
        let colour = colour((f64::from(step) + 0.5) / f64::from(STEPS));
        // Down to the bottom, and the next one over it: no seams.
        area.draw(&Rectangle::new([(x, edge(step + 1)), (x + 14, edge(0))], colour.filled()))?;
    }
    for percent in [0, 50, 100] {
        let at = (x + 20, TOP + height - height * percent / 100);
        area.draw(&Text::new(percent.to_string(), at, text_style(14, HPos::Left, VPos::Center)))?;
    }
    let style = text_style(16, HPos::Center, VPos::Top).transform(FontTransform::Rotate270);
    area.draw(&Text::new("mean score", (x + 48, TOP + height / 2), style.color(&INK)))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::Cost;

    fn row(length: usize, depth: Option<f64>, score: f64) -> AnswerRow {
        let cost = Cost {
            prompt_tokens: 1,
            kv_bytes: 1,
            ratio: 1.0,
            end_ratio: None,
            bits_per_scalar: 16.0,
            bytes_read_per_step: None,
        };
        AnswerRow {
            task: "niah_single_1".into(),
            length,
            sample: 0,
            kv: "exact".into(),
            cost,
            depth,
            prediction: String::new(),
            answers: vec![],
            score,
        }
    }

    #[test]
    fn depths_fall_into_bins_ends_included() {
        let rows = [
            row(4096, Some(0.0), 1.0),
            row(4096, Some(0.19), 0.5),
            row(4096, Some(0.2), 0.25),
            row(8192, Some(1.0), 1.0),
            row(8192, Some(0.99), 0.0),
            row(8192, None, 1.0),
            row(5, Some(0.5), 1.0),
        ];
        let rows: Vec<&AnswerRow> = rows.iter().collect();
        let map = Map::new(&rows, &[4096, 8192], 5);
        let mut wanted = vec![(0.0, 0); 10];
        (wanted[0], wanted[2], wanted[9]) = ((1.5, 2), (0.25, 1), (1.0, 2));
        assert_eq!(map, Map { bins: 5, cells: wanted });
        assert_eq!(map.filled(), 3);
    }

    #[test]
    fn colours_go_from_blue_to_yellow() {
        assert_eq!([colour(0.0), colour(0.5), colour(1.0)], [CIVIDIS[0], CIVIDIS[2], CIVIDIS[4]]);
        assert_eq!([colour(-1.0), colour(9.0)], [CIVIDIS[0], CIVIDIS[4]]);
    }

    #[test]
    fn bins_are_ten_where_samples_suffice_and_empty_cells_show() {
        let deep: Vec<AnswerRow> = (0..10).map(|i| row(4096, Some(f64::from(i) / 10.0), 1.0)).collect();
        let count = |rows: &[AnswerRow]| {
            let formats = vec![("exact".to_owned(), rows.iter().collect())];
            let maps = maps(&formats, &[4096, 8192], "x");
            assert_eq!(maps.len(), 1);
            let svg = maps[0].as_ref().unwrap().svg.clone();
            let document = roxmltree::Document::parse(&svg).unwrap();
            let strokes = document.descendants().filter(|node| node.has_tag_name("polyline")).count();
            let text = |node: &roxmltree::Node| {
                node.is_text() && node.text().is_some_and(|text| text.trim() == "100")
            };
            let texts = document.descendants().filter(text);
            (strokes, texts.count())
        };
        // Ten cells of 100, the bar's 100 and the axis's; one stroke for the legend.
        assert_eq!(count(&deep), (1, 12));
        // Seven of ten: five bins, of which one is empty (depths 0.6 and 0.7 are gone, and 0.8).
        let few: Vec<AnswerRow> = [0, 1, 2, 3, 4, 5, 9].map(|i| deep[i].clone()).to_vec();
        assert_eq!(count(&few), (2, 6));
    }
}
