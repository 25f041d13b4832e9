//! What was measured, one JSON object a line.
//!
//! A results file begins with a [`Settings`] line; every further line is a [`Row`]. Rows hold nothing that differs
//! from run to run (no times), so that a run that was killed and went on later gives the same bytes: [`Results`]
//! cuts off what was written last if it is not whole. Files are of untrusted origin: what is malformed or out of
//! its range is refused with its line.

use crate::malformed::unreadable;
use serde::{Deserialize, Serialize};
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

/// Bytes that a line may have; predictions are a few thousand.
const LONGEST_LINE: usize = 1 << 24;

/// The first line of a results file: what was run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Settings {
    /// `kl`, `ruler` or `longbench`.
    pub suite: String,
    /// The model's name.
    pub model: String,
    /// KV formats as `--kv` takes them, in order.
    pub kv: Vec<String>,
    /// Everything else that the rows depend on, such as the seed, as `name = value`.
    pub options: std::collections::BTreeMap<String, String>,
}

/// What a format's cache held and read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Cost {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Bytes allocated for keys and values when the prompt was in.
    pub kv_bytes: usize,
    /// Exact f16 bytes to stored bytes.
    pub ratio: f64,
    /// The same of all tokens, after the last decode step; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end_ratio: Option<f64>,
    /// Stored bits to scalars held.
    pub bits_per_scalar: f64,
    /// Mean over the decode steps; absent if there was none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_read_per_step: Option<f64>,
}

/// One measurement of one format.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "row", rename_all = "lowercase")]
pub enum Row {
    /// An answer to a sample, judged (suites `ruler` and `longbench`).
    Answer(AnswerRow),
    /// Next-token distributions beside the exact cache's (suite `kl`).
    Kl(KlRow),
}

/// An answer to a sample, judged.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct AnswerRow {
    /// Task.
    pub task: String,
    /// Tokens asked for; 0 where the data has the length it has.
    pub length: usize,
    /// Which sample of its task and length.
    pub sample: usize,
    /// KV format, as `--kv` takes it.
    pub kv: String,
    /// What it held and read.
    #[serde(flatten)]
    pub cost: Cost,
    /// Where the needle is, from 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
    /// What the model said.
    pub prediction: String,
    /// What it should have said.
    pub answers: Vec<String>,
    /// In [0, 1].
    pub score: f64,
}

/// Next-token distributions of one text, beside those of the exact cache; means over the predicted tokens.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct KlRow {
    /// The text's name; needles hidden in it are named `NAME ask N`.
    pub text: String,
    /// KV format, as `--kv` takes it.
    pub kv: String,
    /// The only layer that was compressed, if it was one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// What it held and read.
    #[serde(flatten)]
    pub cost: Cost,
    /// Predicted tokens.
    pub tokens: usize,
    /// KL(exact || this), nats.
    pub kl: f64,
    /// Share of tokens whose most probable next token is the exact cache's.
    pub top1: f64,
    /// Negative log-likelihood of the text's own tokens, nats.
    pub nll: f64,
    /// That minus the exact cache's.
    pub dnll: f64,
    /// exp(nll)
    pub perplexity: f64,
    /// Where the needle is, from 0 to 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub depth: Option<f64>,
}

/// Why a results file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ResultsError {
    /// The system said no.
    #[error("cannot use the results file {}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// Another run writes to the file.
    #[error("{}: another run is writing to this file; wait for it, or write to another with -o", path.display())]
    InUse {
        /// The file.
        path: PathBuf,
    },
    /// The file's rows were measured with other settings.
    #[error(
        "{}: its rows were measured with {setting} = {got}, this run has {setting} = {wanted}; \
         run with the same settings to go on, or write to another file with -o",
        path.display()
    )]
    OtherSettings {
        /// The file.
        path: PathBuf,
        /// The first setting that differs.
        setting: String,
        /// The file's.
        got: String,
        /// This run's.
        wanted: String,
    },
    /// A line is not what was written.
    #[error("{}:{line}: {what}; {remedy}", path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// From 1.
        line: usize,
        /// What is wrong with it.
        what: String,
        /// What to do.
        remedy: &'static str,
    },
    /// A measurement cannot be right, and was not written.
    #[error("{}: not written: {what}; the sample was measured wrongly", path.display())]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What is wrong with the row.
        what: String,
    },
}

const NOT_RESULTS: &str = "is it a results file? write to another with -o";
const EDITED: &str = "repair or delete the file, or write to another with -o";
const UNFINISHED: &str = "if the run was killed, start it again: it goes on where the file is whole";

/// A results file that rows are added to, a *unit* at a time: the rows of all formats for one sample.
///
/// No other process can open it as `Results` for as long as this lives.
#[derive(Debug)]
pub struct Results {
    path: PathBuf,
    file: File,
    /// Bytes of the settings line and of whole units.
    end: u64,
    /// Bytes that were behind the last whole unit.
    cut: u64,
    rows: Vec<Row>,
    rows_per_unit: usize,
}

impl Results {
    /// Creates the file, or goes on with one of the same settings: what is behind its last whole unit of
    /// `rows_per_unit` rows is cut off.
    pub fn open(path: &Path, settings: &Settings, rows_per_unit: usize) -> Result<Results, ResultsError> {
        assert!(rows_per_unit > 0, "a unit of no rows");
        let io = |source| ResultsError::Io { path: path.to_owned(), source };
        let file =
            OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path).map_err(io)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(ResultsError::InUse { path: path.to_owned() }),
            // A file system without locks: two runs on one file are the user's to avoid.
            Err(TryLockError::Error(error)) if error.kind() == io::ErrorKind::Unsupported => {}
            Err(TryLockError::Error(error)) => return Err(io(error)),
        }
        let mut results =
            Results { path: path.to_owned(), file, end: 0, cut: 0, rows: vec![], rows_per_unit };
        let length = results.file.metadata().map_err(io)?.len();
        if !results.resume(settings)? {
            let line = to_line(settings).map_err(io)?;
            results.write(&line)?;
        }
        results.cut = length.saturating_sub(results.end);
        results.file.set_len(results.end).map_err(io)?;
        Ok(results)
    }

    /// Units present.
    pub fn done(&self) -> usize {
        self.rows.len() / self.rows_per_unit
    }

    /// The rows of those units, in order.
    pub fn rows(&self) -> &[Row] {
        &self.rows
    }

    /// Bytes cut off when the file was opened: of a unit that a killed run had not finished.
    pub fn cut_bytes(&self) -> u64 {
        self.cut
    }

    /// Adds a unit: all of it in one write, or an error and none of it.
    pub fn append(&mut self, rows: &[Row]) -> Result<(), ResultsError> {
        let wanted = self.rows_per_unit;
        assert_eq!(rows.len(), wanted, "rows of one unit");
        let (mut lines, mut written) = (vec![], vec![]);
        for row in rows {
            let line = to_line(row).map_err(|source| ResultsError::Io { path: self.path.clone(), source })?;
            // What is kept is what a later run will read, to the bit; and what it could not read is not written.
            let row = parse_row(&line);
            written.push(row.map_err(|what| ResultsError::Unwritable { path: self.path.clone(), what })?);
            lines.extend(line);
        }
        self.write(&lines)?;
        self.rows.extend(written);
        Ok(())
    }

    /// Reads what an earlier run wrote; false if it had not finished the settings line.
    fn resume(&mut self, settings: &Settings) -> Result<bool, ResultsError> {
        let mut lines = Lines::new(&self.path, &self.file);
        let Some(first) = lines.next()? else { return Ok(false) };
        let whole = first.ends_with(b"\n");
        let ours =
            to_line(settings).map_err(|source| ResultsError::Io { path: self.path.clone(), source })?;
        if !whole && ours.starts_with(first) {
            return Ok(false);
        }
        let got = parse_settings(first).map_err(|what| lines.broken(what, NOT_RESULTS))?;
        same_settings(&self.path, &got, settings)?;
        if !whole {
            return Err(lines.broken("the settings are not followed by a new line".into(), EDITED));
        }
        self.end = lines.offset;
        let mut broken = None;
        while let Some(line) = lines.next()? {
            if let Some(broken) = broken {
                return Err(broken);
            }
            let row = if line.ends_with(b"\n") { parse_row(line) } else { Err(String::new()) };
            match row {
                Ok(row) => {
                    self.rows.push(row);
                    if self.rows.len().is_multiple_of(self.rows_per_unit) {
                        self.end = lines.offset;
                    }
                }
                // The last line may be: the run was killed while it wrote.
                Err(what) => broken = Some(lines.broken(what, EDITED)),
            }
        }
        self.rows.truncate(self.done() * self.rows_per_unit);
        Ok(true)
    }

    /// Writes behind the last whole unit.
    fn write(&mut self, bytes: &[u8]) -> Result<(), ResultsError> {
        let file = &mut self.file;
        let written = file.seek(SeekFrom::Start(self.end)).and_then(|_| file.write_all(bytes));
        if let Err(source) = written {
            // A full disk: better no unit than a part of one. The next run would cut it off as well.
            let _ = file.set_len(self.end);
            return Err(ResultsError::Io { path: self.path.clone(), source });
        }
        self.end += bytes.len() as u64;
        Ok(())
    }
}

impl Drop for Results {
    fn drop(&mut self) {
        // Rows are written already; a power cut after this loses none. Nobody is left to tell if it fails.
        let _ = self.file.sync_all();
    }
}

/// All of a results file, for a report.
pub fn read(path: &Path) -> Result<(Settings, Vec<Row>), ResultsError> {
    let file = File::open(path).map_err(|source| ResultsError::Io { path: path.to_owned(), source })?;
    let mut lines = Lines::new(path, &file);
    let first = lines.next()?.unwrap_or_default();
    let settings = parse_settings(first).map_err(|what| lines.broken(what, "is it a results file?"))?;
    let mut rows = vec![];
    while let Some(line) = lines.next()? {
        let whole = line.ends_with(b"\n");
        match parse_row(line) {
            Ok(row) => rows.push(row),
            Err(what) if whole => return Err(lines.broken(what, "repair or delete the file")),
            Err(what) => return Err(lines.broken(what, UNFINISHED)),
        }
    }
    Ok((settings, rows))
}

/// Lines with their numbers and ends.
struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<&'a File>,
    /// The line that was read last.
    line: Vec<u8>,
    /// Its number, from 1.
    number: usize,
    /// Where it ends.
    offset: u64,
}

impl<'a> Lines<'a> {
    fn new(path: &'a Path, file: &'a File) -> Lines<'a> {
        Lines { path, reader: BufReader::new(file), line: vec![], number: 0, offset: 0 }
    }

    /// The next line and its `\n`, which the last one may lack.
    fn next(&mut self) -> Result<Option<&[u8]>, ResultsError> {
        self.line.clear();
        self.number += 1;
        let read = (&mut self.reader).take(LONGEST_LINE as u64).read_until(b'\n', &mut self.line);
        let read = read.map_err(|source| ResultsError::Io { path: self.path.to_owned(), source })?;
        self.offset += read as u64;
        if read == LONGEST_LINE && !self.line.ends_with(b"\n") {
            return Err(self.broken(format!("a line of more than {LONGEST_LINE} bytes"), NOT_RESULTS));
        }
        Ok((read > 0).then_some(&self.line))
    }

    fn broken(&self, what: String, remedy: &'static str) -> ResultsError {
        ResultsError::Broken { path: self.path.to_owned(), line: self.number, what, remedy }
    }
}

fn to_line<T: Serialize>(value: &T) -> Result<Vec<u8>, io::Error> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    Ok(line)
}

fn parse_settings(line: &[u8]) -> Result<Settings, String> {
    serde_json::from_slice(line).map_err(|error| format!("no settings here: {}", unreadable(&error)))
}

/// A row whose numbers are in their ranges.
fn parse_row(line: &[u8]) -> Result<Row, String> {
    let row: Row =
        serde_json::from_slice(line).map_err(|error| format!("not a row: {}", unreadable(&error)))?;
    let (cost, depth) = match &row {
        Row::Answer(row) => {
            within("score", row.score, 0.0, 1.0)?;
            (&row.cost, row.depth)
        }
        Row::Kl(row) => {
            within("top1", row.top1, 0.0, 1.0)?;
            // Rounding can make a divergence of nothing slightly negative.
            within("kl", row.kl, -1e-3, 1e6)?;
            within("nll", row.nll, -1e-3, 1e6)?;
            within("dnll", row.dnll, -1e6, 1e6)?;
            within("perplexity", row.perplexity, 0.0, f64::MAX)?;
            within("tokens", row.tokens as f64, 1.0, 1e12)?;
            (&row.cost, row.depth)
        }
    };
    within("ratio", cost.ratio, 1e-9, 1e9)?;
    within("end_ratio", cost.end_ratio.unwrap_or(1.0), 1e-9, 1e9)?;
    within("bits_per_scalar", cost.bits_per_scalar, 0.0, 1e9)?;
    within("bytes_read_per_step", cost.bytes_read_per_step.unwrap_or(0.0), 0.0, 1e18)?;
    within("depth", depth.unwrap_or(0.0), 0.0, 1.0)?;
    Ok(row)
}

fn within(name: &str, value: f64, low: f64, high: f64) -> Result<(), String> {
    match (low..=high).contains(&value) {
        true => Ok(()),
        false => Err(format!("{name} is {value}; wanted {low} to {high}")),
    }
}
fn same_settings(path: &Path, got: &Settings, wanted: &Settings) -> Result<(), ResultsError> {
    let differ = |setting: &str, got: String, wanted: String| match got == wanted {
        true => Ok(()),
        false => {
            Err(ResultsError::OtherSettings { path: path.to_owned(), setting: setting.into(), got, wanted })
        }
    };
    differ("suite", got.suite.clone(), wanted.suite.clone())?;
    differ("model", got.model.clone(), wanted.model.clone())?;
    differ("kv", got.kv.join(","), wanted.kv.join(","))?;
    let name = |options: &Settings, key: &str| match options.options.get(key) {
        Some(value) => value.clone(),
        None => "(none)".into(),
    };
    for key in wanted.options.keys().chain(got.options.keys()) {
        differ(key, name(got, key), name(wanted, key))?;
    }
    Ok(())
}
