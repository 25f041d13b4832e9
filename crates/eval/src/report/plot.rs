//! How does one quantity follow another? Lines with marks, as SVG, with the legend below the axes.
//!
//! Colours are those of Okabe and Ito (2008, "Color Universal Design"), which survive colour blindness, without the
//! yellow that a white page swallows; marks differ too.

use super::page::shorten;
use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};
use std::error::Error;

const COLOURS: [RGBColor; 7] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(230, 159, 0),
    RGBColor(86, 180, 233),
    RGBColor(0, 0, 0),
];
/// Of text and axes, on white.
pub(super) const INK: RGBColor = RGBColor(40, 40, 40);
/// Of lines behind the data.
pub(super) const GRID: RGBColor = RGBColor(225, 225, 225);

const WIDTH: u32 = 760;
const HEIGHT: u32 = 430;
const LEGEND_LINE: i32 = 22;
const LEGEND_TOP: i32 = 18;

pub(super) type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// What the axes are.
pub(super) struct Axes<'a> {
    pub(super) title: &'a str,
    pub(super) x: &'a str,
    pub(super) y: &'a str,
    /// Of y; x is linear.
    pub(super) scale: Scale,
    /// A dashed line at a height, with its name.
    pub(super) reference: Option<(&'a str, f64)>,
}

#[derive(Clone, Copy, PartialEq)]
pub(super) enum Scale {
    Linear,
    /// Only what is above 0 is drawn.
    Logarithmic,
}

/// A line: its points are joined from left to right.
pub(super) struct Series {
    name: String,
    pub(super) points: Vec<SeriesPoint>,
}

/// A mark, perhaps with a bar from low to high.
pub(super) struct SeriesPoint {
    pub(super) x: f64,
    pub(super) y: f64,
    pub(super) bar: Option<(f64, f64)>,
}

impl Series {
    /// Adds a point to the line of that name.
    pub(super) fn add(series: &mut Vec<Series>, name: &str, point: SeriesPoint) {
        match series.iter_mut().find(|series| series.name == name) {
            Some(series) => series.points.push(point),
            None => series.push(Series { name: name.to_owned(), points: vec![point] }),
        }
    }
}

/// Draws; or says why there is nothing to draw.
pub(super) fn lines(axes: &Axes, series: &[Series]) -> Result<String, String> {
    let legend = Legend::new(axes, series);
    let size = (WIDTH, HEIGHT + legend.height() as u32);
    let points = || series.iter().flat_map(|series| &series.points);
    let place = |y: f64| match axes.scale {
        Scale::Linear => Some(y),
        Scale::Logarithmic => (y > 0.0).then(|| y.log10()),
    };
    let xs = points().filter(|point| place(point.y).is_some()).map(|point| point.x);
    let ys = points().flat_map(|point| {
        let (low, high) = point.bar.unwrap_or((point.y, point.y));
        [place(point.y), place(low), place(high)]
    });
    let ys = ys.chain(axes.reference.map(|(_, y)| place(y))).flatten();
    let (Some(xs), Some(ys)) = (Range::around(xs), Range::around(ys)) else {
        return Err(match axes.scale {
            Scale::Linear => "there are no points".into(),
            Scale::Logarithmic => "no format changed anything".into(),
        });
    };
    drawing(size, |root| {
        let (upper, lower) = root.split_vertically(HEIGHT);
        draw_chart(&upper, axes, series, (xs, ys))?;
        legend.draw(&lower)
    })
}

/// An SVG file of `size` pixels on white, whatever the page behind is.
pub(super) fn drawing(
    size: (u32, u32),
    draw: impl FnOnce(&Area) -> Result<(), Box<dyn Error>>,
) -> Result<String, String> {
    let mut svg = String::new();
    {
        let root = SVGBackend::with_string(&mut svg, size).into_drawing_area();
        let drawn = root.fill(&WHITE).map_err(Box::from).and_then(|()| draw(&root));
        drawn.and_then(|()| root.present().map_err(Box::from)).map_err(|error| error.to_string())?;
    }
    Ok(svg)
}

/// Sans-serif text of about `size` pixels, anchored.
pub(super) fn text_style(size: u32, horizontal: HPos, vertical: VPos) -> TextStyle<'static> {
    TextStyle::from(("sans-serif", size).into_font()).color(&INK).pos(Pos::new(horizontal, vertical))
}

/// What an axis shows, in its own units (decades if logarithmic).
#[derive(Clone, Copy, Debug, PartialEq)]
struct Range {
    low: f64,
    high: f64,
}

impl Range {
    /// With a margin. None for no values.
    fn around(values: impl Iterator<Item = f64>) -> Option<Range> {
        let finite = values.filter(|value| value.is_finite());
        let (low, high) = finite
            .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| (low.min(value), high.max(value)));
        let margin = match high - low {
            ..0.0 => return None,
            0.0 => 0.1 * high.abs().max(1.0),
            width => 0.06 * width,
        };
        Some(Range { low: low - margin, high: high + margin })
    }

    /// Round values inside, at most nine.
    fn ticks(self) -> Vec<f64> {
        let rough = (self.high - self.low) / 8.0;
        let power = 10f64.powf(rough.log10().floor());
        let step = [1.0, 2.0, 5.0, 10.0].map(|step| step * power).into_iter().find(|&step| step >= rough);
        let step = step.unwrap_or(10.0 * power);
        let first = (self.low / step).ceil();
        (0..9).map(|i| (first + f64::from(i)) * step).take_while(|&tick| tick <= self.high).collect()
    }

    /// Powers of ten inside, with 2 and 5 between if that is not much.
    fn decades(self) -> Vec<f64> {
        let span = self.high - self.low;
        let between: &[f64] = match span {
            ..0.7 => &[1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
            ..3.0 => &[1.0, 2.0, 5.0],
            _ => &[1.0],
        };
        let step = (span / 8.0).ceil().max(1.0);
        let first = self.low.floor();
        let decades = (0..10).map(|i| first + f64::from(i) * step);
        let ticks = decades.flat_map(|decade| between.iter().map(move |digit| decade + digit.log10()));
        ticks.filter(|tick| (self.low..=self.high).contains(tick)).collect()
    }
}

/// An axis with its own ticks, as the plotting library wants it.
struct Ticked {
    range: Range,
    ticks: Vec<f64>,
}

impl Ranged for Ticked {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, (start, end): (i32, i32)) -> i32 {
        let place = (value - self.range.low) / (self.range.high - self.range.low);
        start + (place * f64::from(end - start)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, hint: Hint) -> Vec<f64> {
        if hint.weight().allow_light_points() { vec![] } else { self.ticks.clone() }
    }

    fn range(&self) -> std::ops::Range<f64> {
        self.range.low..self.range.high
    }
}

/// A tick's number without what rounding left of it.
fn plain(value: f64) -> String {
    let text = match value.abs() {
        0.0 => return "0".into(),
        1e-3..1e6 => format!("{value:.6}"),
        _ => return format!("{value:.0e}"),
    };
    let text = text.trim_end_matches('0').trim_end_matches('.');
    if text == "-0" { "0".into() } else { text.into() }
}

fn draw_chart(
    area: &Area,
    axes: &Axes,
    series: &[Series],
    (xs, ys): (Range, Range),
) -> Result<(), Box<dyn Error>> {
    let centre = (WIDTH as i32 / 2, 12);
    area.draw(&Text::new(shorten(axes.title, 90), centre, text_style(19, HPos::Center, VPos::Top)))?;
    let (y_ticks, place): (_, fn(f64) -> f64) = match axes.scale {
        Scale::Linear => (ys.ticks(), |y| y),
        Scale::Logarithmic => (ys.decades(), f64::log10),
    };
    let mut x_ticks = xs.ticks();
    if series.iter().flat_map(|series| &series.points).all(|point| point.x.fract() == 0.0) {
        // Layers: there is none between two.
        x_ticks.retain(|tick| tick.fract() == 0.0);
    }
    let mut chart = ChartBuilder::on(area)
        .margin_top(46)
        .margin_right(24)
        .margin_left(14)
        .x_label_area_size(52)
        .y_label_area_size(72)
        .build_cartesian_2d(Ticked { range: xs, ticks: xs.ticks() }, Ticked { range: ys, ticks: y_ticks })?;
    let label = match axes.scale {
        Scale::Linear => |y: &f64| plain(*y),
        Scale::Logarithmic => |y: &f64| plain(10f64.powf(*y)),
    };
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .bold_line_style(GRID)
        .axis_style(INK)
        .x_desc(axes.x)
        .y_desc(axes.y)
        .label_style(TextStyle::from(("sans-serif", 16).into_font()).color(&INK))
        .axis_desc_style(TextStyle::from(("sans-serif", 17).into_font()).color(&INK))
        .x_label_formatter(&|x| plain(*x))
        .y_label_formatter(&label)
        .draw()?;
    if let Some((_, y)) = axes.reference {
        let (dash, gap) = ((xs.high - xs.low) / 100.0, (xs.high - xs.low) / 150.0);
        let starts = (0..60).map(|i| xs.low + f64::from(i) * (dash + gap));
        let dashes = starts.map(|x| vec![(x, place(y)), ((x + dash).min(xs.high), place(y))]);
        chart.draw_series(dashes.map(|dash| PathElement::new(dash, INK.stroke_width(1))))?;
    }
    let mut marks = vec![];
    for (number, series) in series.iter().enumerate() {
        let colour = COLOURS[number % COLOURS.len()];
        let mut points: Vec<&SeriesPoint> = series.points.iter().collect();
        points.retain(|point| place(point.y).is_finite() && point.x.is_finite());
        points.sort_by(|a, b| a.x.total_cmp(&b.x));
        let path: Vec<(f64, f64)> = points.iter().map(|point| (point.x, place(point.y))).collect();
        let bars = points.iter().filter_map(|point| {
            let (low, high) = point.bar?;
            let ends = vec![(point.x, place(low)), (point.x, place(high))];
            Some(PathElement::new(ends, colour.stroke_width(1)))
        });
        chart.draw_series(bars)?;
        if path.len() > 1 {
            chart.draw_series([PathElement::new(path.clone(), colour.stroke_width(2))])?;
        }
        marks.extend(path.iter().map(|at| (chart.backend_coord(at), number)));
    }
    marks.into_iter().try_for_each(|(at, number)| draw_mark(area, at, number))
}

/// A mark for a series' number: numbers of the same colour have different shapes.
fn draw_mark(area: &Area, at: (i32, i32), number: usize) -> Result<(), Box<dyn Error>> {
    let colour = COLOURS[number % COLOURS.len()];
    let shape: &[(i32, i32)] = match (number + number / COLOURS.len()) % 5 {
        0 => return Ok(area.draw(&Circle::new(at, 5, colour.filled()))?),
        1 => &[(-5, -5), (5, -5), (5, 5), (-5, 5)],
        2 => &[(0, -7), (6, 5), (-6, 5)],
        3 => &[(0, -7), (7, 0), (0, 7), (-7, 0)],
        _ => &[(0, 7), (6, -5), (-6, -5)],
    };
    let corners: Vec<(i32, i32)> = shape.iter().map(|corner| (at.0 + corner.0, at.1 + corner.1)).collect();
    Ok(area.draw(&Polygon::new(corners, colour.filled()))?)
}

/// Names below the axes, in two columns where they are short.
struct Legend {
    /// With the series' number; none for the reference.
    entries: Vec<(Option<usize>, String)>,
    columns: usize,
}

impl Legend {
    fn new(axes: &Axes, series: &[Series]) -> Legend {
        let reference = axes.reference.map(|(name, _)| (None, shorten(name, 90)));
        let names = series.iter().enumerate().map(|(at, series)| (Some(at), shorten(&series.name, 90)));
        let entries: Vec<(Option<usize>, String)> = names.chain(reference).collect();
        let longest = entries.iter().map(|(_, name)| name.chars().count()).max().unwrap_or(0);
        let columns = match longest {
            ..=16 => 4,
            17..=40 => 2,
            _ => 1,
        };
        Legend { entries, columns }
    }

    fn height(&self) -> i32 {
        self.entries.len().div_ceil(self.columns) as i32 * LEGEND_LINE + LEGEND_TOP
    }

    fn draw(&self, area: &Area) -> Result<(), Box<dyn Error>> {
        let width = (WIDTH as i32 - 100) / self.columns as i32;
        for (at, (number, name)) in self.entries.iter().enumerate() {
            let x = 80 + (at % self.columns) as i32 * width;
            let y = LEGEND_TOP + (at / self.columns) as i32 * LEGEND_LINE;
            let text = text_style(16, HPos::Left, VPos::Center);
            area.draw(&Text::new(name.clone(), (x + 38, y), text))?;
            match number {
                Some(number) => {
                    let colour = COLOURS[number % COLOURS.len()];
                    area.draw(&PathElement::new([(x, y), (x + 30, y)], colour.stroke_width(2)))?;
                    draw_mark(area, (x + 15, y), *number)?;
                }
                None => {
                    for dash in [0, 12, 24] {
                        let ends = [(x + dash, y), (x + dash + 7, y)];
                        area.draw(&PathElement::new(ends, INK.stroke_width(1)))?;
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_inside() {
        let range = Range { low: 0.7, high: 8.3 };
        assert_eq!(range.ticks(), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]);
        let range = Range { low: 62.0, high: 91.0 };
        assert_eq!(range.ticks(), [65.0, 70.0, 75.0, 80.0, 85.0, 90.0]);
        let decades = Range { low: -3.4, high: -0.2 }.decades();
        assert_eq!(decades, [-3.0, -2.0, -1.0]);
        assert_eq!(Range { low: -300.0, high: 300.0 }.decades().len(), 9);
        for value in [0.3, 1.0, 1e-300, 1e300] {
            let range = Range::around([value, value].into_iter()).unwrap();
            assert!(range.low < value && value < range.high, "{range:?}");
            assert!(range.ticks().len() < 10);
        }
        assert_eq!(Range::around([f64::NAN, f64::INFINITY].into_iter()), None);
        assert_eq!(
            [0.1 + 0.2, 2.0, 0.0, -0.5, 1e-9, 5e7].map(plain),
            ["0.3", "2", "0", "-0.5", "1e-9", "5e7"]
        );
    }
}
