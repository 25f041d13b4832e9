//! Benchmarks: commands that print what they measured, beside what the machine can do.

mod attention;
mod decode;
mod gpu;
mod serve;

use anyhow::{Result, ensure};
use clap::Subcommand;
use mosaickv_kernels::stream::Stream;
use mosaickv_kernels::{Isa, Pool};
use mosaickv_model::Model;
use serde::Serialize;
use std::io::{self, StdoutLock, Write};

#[derive(Subcommand)]
pub enum BenchCommand {
    /// Decode attention on synthetic keys and values, checked against the oracle before it is timed
    Attention(attention::AttentionArgs),
    /// Prefill and time between tokens of a real model at several depths
    Decode(decode::DecodeArgs),
    /// Time between tokens of an 8B model's shape on a GPU, up to a million tokens
    Gpu(gpu::GpuArgs),
    /// Many long contexts at once under one budget of bytes
    Serve(serve::ServeArgs),
}

pub fn bench(command: &BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Attention(args) => attention::attention(args),
        BenchCommand::Decode(args) => decode::decode(args),
        BenchCommand::Gpu(args) => gpu::gpu(args),
        BenchCommand::Serve(args) => serve::serve(args),
    }
}

/// What was measured of the machine in the same run.
#[derive(Debug, Serialize)]
struct Machine {
    /// Memory read by all threads, median of the run, 10^9 bytes a second.
    stream_gb_s: f64,
    threads: usize,
    isa: &'static str,
}

impl Machine {
    fn new(pool: &Pool, mut stream: Vec<f64>) -> Machine {
        Machine {
            stream_gb_s: median(&mut stream) / 1e9,
            threads: pool.threads(),
            isa: Isa::current().name(),
        }
    }
}

/// Has the model take `tokens` tokens, as `flag` says: within its context, or beyond it where that is allowed.
fn reach(model: &mut Model, (stretch, tokens): (bool, usize), flag: &str) -> Result<()> {
    let context = model.context();
    ensure!(
        stretch || tokens <= context,
        "{flag} {tokens} is over the model's maximum context length of {context} tokens; --stretch goes beyond it, for speed alone"
    );
    model.config.context = context.max(tokens);
    Ok(())
}

/// Prints a report to stdout: as JSON, or as `table` writes it.
fn show<R: Serialize>(
    report: &R,
    json: bool,
    table: impl FnOnce(&R, &mut StdoutLock) -> io::Result<()>,
) -> Result<()> {
    let mut out = io::stdout().lock();
    if json {
        writeln!(out, "{}", serde_json::to_string_pretty(report)?)?;
    } else {
        table(report, &mut out)?;
    }
    Ok(())
}

/// Stream bandwidth readings, to be interleaved with what they are compared to.
struct StreamMeter<'a> {
    stream: Stream,
    pool: &'a Pool,
    readings: Vec<f64>,
}

impl<'a> StreamMeter<'a> {
    fn new(pool: &'a Pool) -> StreamMeter<'a> {
        StreamMeter { stream: Stream::default(), pool, readings: Vec::new() }
    }

    fn read(&mut self) {
        self.readings.push(self.stream.read(Isa::current(), self.pool));
    }
}

/// The middle of some numbers, at least one; sorts them.
fn median(x: &mut [f64]) -> f64 {
    x.sort_by(f64::total_cmp);
    x[x.len() / 2]
}
