//! How many answers did compression cost? Each method's scores beside those of the exact cache for the same samples.

use super::bootstrap::{interval, resampled_means, seed};
use super::number::{MeanCost, NONE, change, mean, points};
use super::page::{Block, Columns, Plot, Table, clean};
use super::plot::{Axes, Scale, Series, SeriesPoint, lines};
use super::{Axis, drawn, family, heat};
use crate::results::AnswerRow;
use std::collections::{BTreeMap, HashMap};

/// The format that others are compared with.
const EXACT: &str = "exact";

pub(super) const EXPLANATION: &str = "Scores are means, 0 to 100. The difference to exact is that of the same \
    samples, in points, with the 95 % interval of a paired bootstrap (percentile, 10,000 resamples, over all tasks \
    stratified by task; fixed seed); the loss is the difference in percent of exact's mean. An interval says what \
    other samples of these tasks could have given; one of no width, where all samples differ alike, or one of few \
    samples, is too narrow. Ratio (exact f16 bytes to stored), bits and MB are means over the samples.";

/// Answers by format, length and task.
pub(super) struct Answers<'a> {
    kv: Axis<&'a str>,
    lengths: Axis<usize>,
    tasks: Axis<&'a str>,
    /// Places in those, to samples.
    cells: HashMap<(usize, usize, usize), BTreeMap<usize, &'a AnswerRow>>,
    exact: Option<usize>,
    repeated: usize,
}

/// A format at one length.
struct Line {
    cost: MeanCost,
    tasks: Vec<Option<Measured>>,
    /// Mean of the tasks' means.
    all: Measured,
}

/// A mean score.
#[derive(Clone, Default)]
struct Measured {
    score: f64,
    /// Samples in the mean.
    samples: usize,
    /// Samples that this format or exact has.
    of: usize,
    beside: Option<Beside>,
}

/// What exact scored on the same samples.
#[derive(Clone)]
struct Beside {
    exact: f64,
    interval: Option<(f64, f64)>,
}

impl<'a> Answers<'a> {
    pub(super) fn new(rows: &[&'a AnswerRow]) -> Answers<'a> {
        let mut lengths = Axis::new(rows.iter().map(|row| row.length), 50);
        lengths.names.sort_unstable();
        let mut answers = Answers {
            kv: Axis::new(rows.iter().map(|row| row.kv.as_str()), 100),
            lengths,
            tasks: Axis::new(rows.iter().map(|row| row.task.as_str()), 200),
            cells: HashMap::new(),
            exact: None,
            repeated: 0,
        };
        answers.exact = answers.kv.place(EXACT);
        let (kv, lengths, tasks) = (answers.kv.places(), answers.lengths.places(), answers.tasks.places());
        for row in rows {
            let at = (kv.get(row.kv.as_str()), lengths.get(&row.length), tasks.get(row.task.as_str()));
            let (Some(&kv), Some(&length), Some(&task)) = at else { continue };
            let cell = answers.cells.entry((kv, length, task)).or_default();
            answers.repeated += usize::from(cell.contains_key(&row.sample));
            cell.entry(row.sample).or_insert(row);
        }
        answers
    }

    /// Tables, then plots; names of plots begin with `name`.
    pub(super) fn blocks(&self, name: &str) -> Vec<Block> {
        let lines: Vec<Vec<Option<Line>>> = (0..self.lengths.names.len())
            .map(|length| (0..self.kv.names.len()).map(|kv| self.line(kv, length)).collect())
            .collect();
        let mut blocks = vec![Block::Text(EXPLANATION.into())];
        blocks.extend(self.remarks().into_iter().map(Block::Text));
        if lines.len() > 1 {
            blocks.push(Block::Heading(3, "By length".into()));
            blocks.push(Block::Table(self.by_length(&lines)));
        }
        for (length, lines) in lines.iter().enumerate() {
            blocks.push(Block::Heading(3, self.title(length)));
            blocks.push(Block::Table(self.by_task(lines, length)));
            blocks.extend(self.impossible(length).map(Block::Text));
            let plot_name = format!("{name}-{}-ratio.svg", self.lengths.names[length]);
            blocks.push(self.rate_quality(lines, length, plot_name));
        }
        let maps: Vec<(String, Vec<&AnswerRow>)> = (0..self.kv.names.len())
            .map(|kv| (clean(self.kv.names[kv]), self.rows(|cell| cell.0 == kv)))
            .collect();
        let maps = heat::maps(&maps, &self.lengths.names, name);
        if !maps.is_empty() {
            blocks.push(Block::Heading(3, "Needles by depth and length".into()));
            blocks.push(Block::Text(
                "Mean score of the needle tasks (niah), 0 to 100, by where the needle is and how long the prompt is."
                    .into(),
            ));
            blocks.extend(drawn(maps));
        }
        blocks
    }

    /// What fits a terminal: over all tasks with differences, then each task's score.
    pub(super) fn text_blocks(&self) -> Vec<Block> {
        let mut blocks: Vec<Block> = self.remarks().into_iter().map(Block::Text).collect();
        for length in 0..self.lengths.names.len() {
            let lines: Vec<(usize, Line)> =
                (0..self.kv.names.len()).filter_map(|kv| Some((kv, self.line(kv, length)?))).collect();
            let names = ["score", "to exact", "95 % interval", "loss", "samples"];
            let mut header = vec!["KV format".to_owned()];
            header.extend(MeanCost::HEADER.into_iter().chain(names).map(String::from));
            let row = |(at, (kv, line)): (usize, &(usize, Line))| {
                let mut row = vec![format!("{} {}", at + 1, clean(self.kv.names[*kv]))];
                row.extend(line.cost.cells());
                row.push(points(line.all.score));
                row.extend(line.all.difference());
                row.push(line.all.count());
                row.into_iter().map(|cell| vec![cell]).collect()
            };
            let rows = lines.iter().enumerate().map(row).collect();
            blocks.push(Block::Heading(3, self.title(length)));
            blocks.push(Block::Table(Table { columns: Columns::Numbers, header, rows }));
            if self.tasks.names.len() > 1 {
                let mut header = vec!["score by task".to_owned()];
                header.extend((1..=lines.len()).map(|at| at.to_string()));
                let score = |measured: &Option<Measured>| match measured {
                    Some(measured) => points(measured.score),
                    None => NONE.into(),
                };
                let row = |task: usize| {
                    let mut row = vec![vec![clean(self.tasks.names[task])]];
                    row.extend(lines.iter().map(|(_, line)| vec![score(&line.tasks[task])]));
                    row
                };
                let rows = (0..self.tasks.names.len()).map(row).collect();
                blocks.push(Block::Table(Table { columns: Columns::Numbers, header, rows }));
            }
            blocks.extend(self.impossible(length).map(Block::Text));
        }
        blocks
    }

    /// What a reader must know before comparing.
    fn remarks(&self) -> Vec<String> {
        let mut remarks = vec![];
        if self.exact.is_none() {
            remarks.push("There are no rows of exact: nothing to compare with, no differences.".into());
        }
        if self.repeated > 0 {
            remarks.push(format!(
                "{} rows repeat a sample of the same format; the first of each counts.",
                self.repeated
            ));
        }
        remarks.extend(self.kv.left_out("KV formats"));
        remarks.extend(self.lengths.left_out("lengths"));
        remarks.extend(self.tasks.left_out("tasks"));
        remarks
    }

    fn title(&self, length: usize) -> String {
        match self.lengths.names[length] {
            0 => "At the length the data has".into(),
            tokens => format!("At {tokens} tokens"),
        }
    }

    fn rows(&self, wanted: impl Fn(&(usize, usize, usize)) -> bool) -> Vec<&'a AnswerRow> {
        let mut cells: Vec<_> = self.cells.iter().filter(|(at, _)| wanted(at)).collect();
        // In an order that does not depend on the hash, for sums that are the same to the bit.
        cells.sort_unstable_by_key(|(at, _)| **at);
        cells.into_iter().flat_map(|(_, cell)| cell.values().copied()).collect()
    }

    /// None if the format has no rows at that length.
    fn line(&self, kv: usize, length: usize) -> Option<Line> {
        let rows = self.rows(|&(a, b, _)| (a, b) == (kv, length));
        let cost = MeanCost::of(rows.iter().map(|row| &row.cost))?;
        let (mut tasks, mut draws) = (vec![], vec![]);
        for task in 0..self.tasks.names.len() {
            let (measured, draw) = self.measure(kv, length, task).unzip();
            tasks.push(measured);
            draws.push(draw);
        }
        let counted = |measured: &&Measured| measured.beside.is_some();
        let paired = tasks.iter().flatten().any(|measured| counted(&measured));
        let counted: Vec<&Measured> =
            tasks.iter().flatten().filter(|measured| !paired || counted(measured)).collect();
        let beside = paired.then(|| {
            let draws: Vec<Vec<f64>> =
                draws.into_iter().flatten().filter(|draws| !draws.is_empty()).collect();
            let mean_of = |i: usize| mean(draws.iter().map(|draws| draws[i])).unwrap_or_default();
            let means = (0..draws.first().map_or(0, Vec::len)).map(mean_of).collect();
            let exact = counted.iter().flat_map(|measured| &measured.beside).map(|beside| beside.exact);
            let samples: usize = counted.iter().map(|measured| measured.samples).sum();
            let interval = if samples > 1 { interval(means) } else { None };
            Beside { exact: mean(exact).unwrap_or_default(), interval }
        });
        let missing = |task: &usize| tasks[*task].is_none();
        let absent = (0..tasks.len()).filter(missing).map(|task| self.exact_samples(length, task));
        let all = Measured {
            score: mean(counted.iter().map(|measured| measured.score)).unwrap_or_default(),
            samples: counted.iter().map(|measured| measured.samples).sum(),
            of: tasks.iter().flatten().map(|measured| measured.of).sum::<usize>() + absent.sum::<usize>(),
            beside,
        };
        Some(Line { cost, tasks, all })
    }

    fn exact_samples(&self, length: usize, task: usize) -> usize {
        self.exact.and_then(|exact| self.cells.get(&(exact, length, task))).map_or(0, BTreeMap::len)
    }

    /// A format's mean at a task, and the resampled differences to exact (none without pairs).
    fn measure(&self, kv: usize, length: usize, task: usize) -> Option<(Measured, Vec<f64>)> {
        let ours = self.cells.get(&(kv, length, task))?;
        let exact = self.exact.filter(|&exact| exact != kv);
        let exact = exact.and_then(|exact| self.cells.get(&(exact, length, task)));
        let both = |(sample, row): (&usize, &&AnswerRow)| Some((exact?.get(sample)?.score, row.score));
        let pairs: Vec<(f64, f64)> = ours.iter().filter_map(both).collect();
        let of = ours.len() + exact.map_or(0, |exact| exact.len() - pairs.len());
        if pairs.is_empty() {
            let score = mean(ours.values().map(|row| row.score))?;
            return Some((Measured { score, samples: ours.len(), of, beside: None }, vec![]));
        }
        let differences: Vec<f64> = pairs.iter().map(|(exact, ours)| ours - exact).collect();
        let draws = resampled_means(&differences, seed(self.tasks.names[task], self.lengths.names[length]));
        let beside = Beside {
            exact: mean(pairs.iter().map(|pair| pair.0))?,
            interval: if pairs.len() > 1 { interval(draws.clone()) } else { None },
        };
        let score = mean(pairs.iter().map(|pair| pair.1))?;
        Some((Measured { score, samples: pairs.len(), of, beside: Some(beside) }, draws))
    }

    /// Formats by lengths, over all tasks.
    fn by_length(&self, lines: &[Vec<Option<Line>>]) -> Table {
        let mut header = vec!["KV format".to_owned()];
        let tokens =
            |&length: &usize| if length == 0 { "as it is".into() } else { format!("{length} tokens") };
        header.extend(self.lengths.names.iter().map(tokens));
        let row = |kv: usize| {
            let mut row = vec![vec![clean(self.kv.names[kv])]];
            row.extend(lines.iter().map(|lines| match &lines[kv] {
                Some(line) => line.all.cell(),
                None => vec![NONE.into()],
            }));
            row
        };
        Table { columns: Columns::Numbers, header, rows: (0..self.kv.names.len()).map(row).collect() }
    }

    /// Formats by tasks, at one length.
    fn by_task(&self, lines: &[Option<Line>], length: usize) -> Table {
        let used = |task: &usize| self.cells.keys().any(|at| (at.1, at.2) == (length, *task));
        let tasks: Vec<usize> = (0..self.tasks.names.len()).filter(used).collect();
        let mut header = vec!["KV format".to_owned()];
        header.extend(MeanCost::HEADER.into_iter().chain(["samples"]).map(String::from));
        header.extend((tasks.len() > 1).then(|| format!("mean of {} tasks", tasks.len())));
        header.extend(tasks.iter().map(|&task| clean(self.tasks.names[task])));
        let rows = lines.iter().enumerate().filter_map(|(kv, line)| {
            let line = line.as_ref()?;
            let mut row = vec![vec![clean(self.kv.names[kv])]];
            row.extend(line.cost.cells().map(|cell| vec![cell]));
            row.push(vec![line.all.count()]);
            row.extend((tasks.len() > 1).then(|| line.all.cell()));
            row.extend(tasks.iter().map(|&task| match &line.tasks[task] {
                Some(measured) => measured.cell_with_count(),
                None => vec![NONE.into()],
            }));
            Some(row)
        });
        Table { columns: Columns::Numbers, header, rows: rows.collect() }
    }

    /// Tasks that exact scores nothing on, at a length.
    fn impossible(&self, length: usize) -> Option<String> {
        let exact = self.exact?;
        let nothing = |task: &usize| {
            let cell = self.cells.get(&(exact, length, *task));
            cell.is_some_and(|cell| cell.values().all(|row| row.score == 0.0))
        };
        let tasks: Vec<String> =
            (0..self.tasks.names.len()).filter(nothing).map(|task| clean(self.tasks.names[task])).collect();
        (!tasks.is_empty()).then(|| {
            format!(
                "Exact itself scores 0 on {}: the model cannot do this here, so nothing can be lost ('-').",
                tasks.join(", ")
            )
        })
    }

    fn rate_quality(&self, formats: &[Option<Line>], length: usize, name: String) -> Block {
        let mut series: Vec<Series> = vec![];
        let mut reference = None;
        for (kv, line) in formats.iter().enumerate() {
            let Some(line) = line else { continue };
            if self.exact == Some(kv) {
                reference = Some(100.0 * line.all.score);
                continue;
            }
            let bar = line.all.beside.as_ref().and_then(|beside| {
                let (low, high) = beside.interval?;
                Some((100.0 * (beside.exact + low), 100.0 * (beside.exact + high)))
            });
            let point = SeriesPoint { x: line.cost.ratio, y: 100.0 * line.all.score, bar };
            Series::add(&mut series, &clean(family(self.kv.names[kv])), point);
        }
        let title = format!("Score and ratio, {}", self.title(length).to_lowercase());
        let axes = Axes {
            title: &title,
            x: "ratio: exact f16 bytes / stored bytes",
            y: "mean score over tasks (0 to 100)",
            scale: Scale::Linear,
            reference: reference.map(|score| ("exact", score)),
        };
        let alt =
            format!("{title}: a line a family of methods; bars are 95 % intervals of the paired difference");
        match lines(&axes, &series) {
            Ok(svg) => Block::Plots(vec![Plot { name, alt, svg }]),
            Err(why) => Block::Text(format!("No plot of score and ratio: {why}.")),
        }
    }
}

impl Measured {
    /// Difference, interval and loss.
    fn difference(&self) -> [String; 3] {
        let Some(beside) = &self.beside else { return [NONE; 3].map(String::from) };
        let interval = match beside.interval {
            Some((low, high)) => format!("[{}, {}]", change(low), change(high)),
            None => NONE.into(),
        };
        let loss = match beside.exact > 0.0 {
            true => format!("{} %", points((beside.exact - self.score) / beside.exact)),
            false => NONE.into(),
        };
        [change(self.score - beside.exact), interval, loss]
    }

    /// `18 of 20` where samples have no partner.
    fn count(&self) -> String {
        match self.samples == self.of {
            true => self.samples.to_string(),
            false => format!("{} of {}", self.samples, self.of),
        }
    }

    fn cell(&self) -> Vec<String> {
        let mut cell = vec![points(self.score)];
        if self.beside.is_some() {
            let [difference, interval, loss] = self.difference();
            cell.push(format!("{difference} {interval}"));
            cell.push(format!("loss {loss}"));
        }
        cell
    }

    fn cell_with_count(&self) -> Vec<String> {
        let mut cell = self.cell();
        if self.samples != self.of {
            cell.push(format!("{} samples", self.count()));
        }
        cell
    }
}
