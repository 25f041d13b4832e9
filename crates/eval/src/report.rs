//! What do the results say? Tables with paired differences, and plots, in one file.
//!
//! Results files are grouped by what makes their rows comparable: model, suite and options. Names in them are of
//! untrusted origin; `page` escapes them.

mod answers;
mod bootstrap;
mod heat;
mod kl;
pub mod mosaic;
mod number;
mod page;
pub mod pixels;
mod plot;
pub mod profiles;

use crate::results::{AnswerRow, KlRow, Row, Settings};
use answers::Answers;
use kl::Divergences;
use page::{Block, Columns, Plot, Table, clean, shorten, slug};
use std::collections::{HashMap, HashSet};
use std::hash::Hash;

/// The option of [`Settings`] that holds the command line.
pub const COMMAND: &str = "command";

/// What a results file holds, as [`crate::results::read`] gives it.
pub type File = (Settings, Vec<Row>);

/// Everything that some results files say, ready to be written.
pub struct Report {
    blocks: Vec<Block>,
}

impl Report {
    /// Compares every format with `exact` among the files of the same model, suite and options (the command line
    /// apart). 50,000 answers take about a second.
    pub fn new(files: Vec<File>) -> Report {
        let mut groups: Vec<(Key, Vec<&File>)> = vec![];
        for file in &files {
            let key = Key::of(&file.0);
            match groups.iter_mut().find(|group| group.0 == key) {
                Some(group) => group.1.push(file),
                None => groups.push((key, vec![file])),
            }
        }
        let mut blocks = vec![Block::Heading(1, "What compression cost".into())];
        if files.is_empty() {
            blocks.push(Block::Text("There are no results.".into()));
        }
        for (at, (key, files)) in groups.iter().enumerate() {
            blocks.push(Block::Heading(2, format!("{}: {}", clean(key.model), clean(key.suite))));
            blocks.extend(settings(files));
            let rows = files.iter().flat_map(|file| &file.1);
            let name = format!("{}-{}-{}", at + 1, slug(key.suite), slug(key.model));
            let (answers, divergences) = apart(rows);
            if answers.is_empty() && divergences.is_empty() {
                blocks.push(Block::Text("There are no rows.".into()));
            }
            if !answers.is_empty() {
                blocks.extend(Answers::new(&answers).blocks(&name));
            }
            if !divergences.is_empty() {
                blocks.extend(Divergences::new(&divergences).blocks(&name));
            }
        }
        Report { blocks }
    }

    /// GitHub's Markdown. It refers to [`Report::plots`] in `plot_folder`, as seen from the Markdown file: empty for
    /// beside it, or such as `report-plots/`.
    pub fn markdown(&self, plot_folder: &str) -> String {
        page::markdown(&self.blocks, plot_folder)
    }

    /// One page with its plots, which needs nothing from elsewhere and runs no scripts.
    pub fn html(&self) -> String {
        page::html(&self.blocks)
    }

    /// File names (lower-case letters, digits, hyphens and `.svg`; each once) and SVG of the plots, in order.
    pub fn plots(&self) -> Vec<(String, String)> {
        let plots = self.blocks.iter().flat_map(|block| match block {
            Block::Plots(plots) => plots.as_slice(),
            _ => &[],
        });
        plots.map(|plot| (plot.name.clone(), plot.svg.clone())).collect()
    }
}

/// The tables for a terminal, about 120 columns wide: rows of one run.
pub fn table(rows: &[Row]) -> String {
    let (answers, divergences) = apart(rows.iter());
    let mut blocks = vec![];
    if answers.is_empty() && divergences.is_empty() {
        blocks.push(Block::Text("There are no rows.".into()));
    }
    if !answers.is_empty() {
        blocks.extend(Answers::new(&answers).text_blocks());
    }
    if !divergences.is_empty() {
        blocks.extend(Divergences::new(&divergences).text_blocks());
    }
    page::text(&blocks)
}

/// What rows must share to be compared.
#[derive(PartialEq)]
struct Key<'a> {
    model: &'a str,
    suite: &'a str,
    options: Vec<(&'a String, &'a String)>,
}

impl Key<'_> {
    fn of(settings: &Settings) -> Key<'_> {
        let options = settings.options.iter().filter(|(name, _)| *name != COMMAND).collect();
        Key { model: &settings.model, suite: &settings.suite, options }
    }
}

fn apart<'a>(rows: impl Iterator<Item = &'a Row>) -> (Vec<&'a AnswerRow>, Vec<&'a KlRow>) {
    let (mut answers, mut divergences) = (vec![], vec![]);
    for row in rows {
        match row {
            Row::Answer(row) => answers.push(row),
            Row::Kl(row) => divergences.push(row),
        }
    }
    (answers, divergences)
}

/// What was run, and how to run it again.
fn settings(files: &[&File]) -> Vec<Block> {
    let (first, _) = files[0];
    let mut rows = vec![];
    let mut row = |name: &str, value: String| rows.push(vec![vec![clean(name)], vec![value]]);
    row("model", clean(&first.model));
    row("suite", clean(&first.suite));
    for (at, (settings, measured)) in files.iter().enumerate() {
        let name =
            if files.len() > 1 { format!("KV formats of file {}", at + 1) } else { "KV formats".into() };
        row(&name, shorten(&settings.kv.join(", "), 1000));
        row(&name.replace("KV formats", "rows"), measured.len().to_string());
    }
    for (name, value) in first.options.iter().filter(|(name, _)| *name != COMMAND) {
        row(name, clean(value));
    }
    let header = ["setting", "value"].map(String::from).to_vec();
    let mut blocks = vec![Block::Table(Table { columns: Columns::Words, header, rows })];
    for (settings, _) in files {
        if let Some(command) = settings.options.get(COMMAND) {
            blocks.push(Block::Code(shorten(command, 4000)));
        }
    }
    blocks
}

/// A format's name without its parameters.
fn family(kv: &str) -> &str {
    kv.split(':').next().unwrap_or(kv)
}

/// Plots side by side, and why others are not there.
fn drawn(plots: Vec<Result<Plot, String>>) -> Vec<Block> {
    let (mut drawn, mut blocks) = (vec![], vec![]);
    for plot in plots {
        match plot {
            Ok(plot) => drawn.push(plot),
            Err(why) => blocks.push(Block::Text(format!("A plot could not be drawn: {why}."))),
        }
    }
    blocks.insert(0, Block::Plots(drawn));
    blocks
}

/// Distinct names in the order they are met; not more than a table can hold, whatever a file says.
struct Axis<T> {
    names: Vec<T>,
    left_out: usize,
}

impl<T: Copy + Eq + Hash> Axis<T> {
    fn new(names: impl Iterator<Item = T>, limit: usize) -> Axis<T> {
        let mut seen = HashSet::new();
        let mut names: Vec<T> = names.filter(|&name| seen.insert(name)).collect();
        let left_out = names.len().saturating_sub(limit);
        names.truncate(limit);
        Axis { names, left_out }
    }

    fn places(&self) -> HashMap<T, usize> {
        self.names.iter().enumerate().map(|(at, &name)| (name, at)).collect()
    }

    fn place(&self, wanted: T) -> Option<usize> {
        self.names.iter().position(|&name| name == wanted)
    }

    /// A sentence, if names were left out.
    fn left_out(&self, what: &str) -> Option<String> {
        (self.left_out > 0).then(|| {
            format!(
                "{} {what} and their rows are left out; the first {} are shown.",
                self.left_out,
                self.names.len()
            )
        })
    }
}
