//! How many long contexts fit into a budget of bytes, and how fast are they answered? Requests to the engine itself, without HTTP.

use super::reach;
use crate::answer::bar;
use crate::bill::peak_rss;
use crate::demo::DOCUMENT;
use crate::device::{DeviceArgs, ensure_room};
use crate::{ModelArgs, read_document};
use anyhow::{Result, bail, ensure};
use clap::Args;
use mosaickv_engine::{End, Event, Figures, Request, Service, Settings};
use mosaickv_kv::{ByteCount, KvFormat, KvFormats};
use mosaickv_model::{Model, Text};
use serde::Serialize;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::time::{Duration, Instant};

/// How often it is looked at what the engine does.
const WATCHED_EVERY: Duration = Duration::from_millis(20);

#[derive(Args)]
#[command(
    after_help = "All requests come at once. Columns: contexts, the most that had a cache at a time; TBT, the time between \
    two tokens of a request, prompts of others included; decode tok/s, tokens sampled a second while nothing else was done: no prompt read or compressed, no lost \
    cache made up for; full tok/s, the same while requests waited.\n\nExamples:\n  \
    mosaickv bench serve --model smollm2-135m --kv-memory 1GiB --context 6000 --requests 64\n  \
    mosaickv bench serve --model smollm2-135m --kv-memory 300MB --context 3000 --requests 8 --kv exact,packed,layered"
)]
pub struct ServeArgs {
    #[command(flatten)]
    model: ModelArgs,
    #[command(flatten)]
    device: DeviceArgs,
    /// Bytes that all caches may take together
    #[arg(long, default_value = "1GiB")]
    kv_memory: ByteCount,
    /// Tokens of a request, prompt and answer
    #[arg(long, default_value_t = 6000)]
    context: usize,
    /// Tokens of an answer
    #[arg(long, default_value_t = 128, value_parser = clap::value_parser!(u16).range(2..))]
    output: u16,
    /// Requests, all at once
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u16).range(1..))]
    requests: u16,
    /// Requests that have a cache at a time
    #[arg(long, default_value_t = 256, value_parser = clap::value_parser!(u16).range(1..))]
    max_num_seqs: u16,
    /// KV formats, one or several, as for run
    #[arg(long, default_value = "exact,layered")]
    kv: KvFormats,
    /// Texts to cut prompts from, each from a place of its own [default: the demo's document]
    #[arg(long, num_args = 1.., value_name = "FILE")]
    text: Vec<PathBuf>,
    /// Go beyond the model's context, for speed alone: what it says there means nothing
    #[arg(long)]
    stretch: bool,
    /// Print JSON instead of a table
    #[arg(long)]
    json: bool,
}

#[derive(Debug, Serialize)]
struct Report {
    model: String,
    threads: usize,
    kv_memory: usize,
    prompt_tokens: usize,
    output_tokens: usize,
    requests: usize,
    rows: Vec<Row>,
    peak_rss_bytes: Option<u64>,
}

#[derive(Debug, Serialize)]
struct Row {
    kv: String,
    /// The most requests that had a cache at a time.
    contexts: usize,
    seconds: f64,
    requests_per_s: f64,
    output_tokens_per_s: f64,
    /// Of the time in which no prompt was read or compressed, and nothing read again.
    decode_tokens_per_s: f64,
    /// The same while requests waited; nothing if none did.
    full_tokens_per_s: Option<f64>,
    ttft_s: Quantiles,
    tbt_ms: Quantiles,
    preemptions: u64,
    /// The most bytes reserved and allocated.
    kv_reserved: usize,
    kv_allocated: usize,
    /// Of a request at its end, mean.
    kv_bytes: usize,
}

#[derive(Clone, Copy, Debug, Serialize)]
struct Quantiles {
    p50: f64,
    p99: f64,
}

pub fn serve(args: &ServeArgs) -> Result<()> {
    let pool = args.model.threads.pool();
    let (mut model, text) = args.model.load(&pool, &args.kv.0)?;
    args.device.place(&mut model, &args.kv.0)?;
    ensure_room(&model, args.kv_memory)?;
    reach(&mut model, (args.stretch, args.context), "--context")?;
    let (threads, model) = (pool.threads(), Arc::new(model));
    drop(pool);
    let prompts = prompts(args, &text)?;
    let progress = bar("answering", "requests");
    progress.set_length((prompts.len() * args.kv.0.len()) as u64);
    let mut report = Report {
        model: model.config.name.clone(),
        threads,
        kv_memory: args.kv_memory.0,
        prompt_tokens: prompts[0].len(),
        output_tokens: args.output.into(),
        requests: prompts.len(),
        rows: vec![],
        peak_rss_bytes: None,
    };
    // A row takes minutes, and is printed when it is there: who interrupts the next one keeps it.
    let say = |text: String| match args.json {
        true => Ok(()),
        false => progress.suspend(|| writeln!(io::stdout(), "{text}")),
    };
    say(report.head())?;
    for kv in &args.kv.0 {
        let row = run((&model, threads), *kv, args, &prompts, &mut || progress.inc(1))?;
        say(row.line())?;
        report.rows.push(row);
    }
    progress.finish_and_clear();
    report.peak_rss_bytes = peak_rss();
    if args.json {
        writeln!(io::stdout(), "{}", serde_json::to_string_pretty(&report)?)?;
    } else if let Some(rss) = report.peak_rss_bytes {
        writeln!(io::stdout(), "\nprocess: {:.0} MB at its peak", rss as f64 / 1e6)?;
    }
    Ok(())
}

/// As many different prompts as there are requests, each cut from the texts at a place of its own.
fn prompts(args: &ServeArgs, text: &Text) -> Result<Vec<Vec<u32>>> {
    let Some(length) = args.context.checked_sub(args.output.into()).filter(|length| *length > 0) else {
        bail!("--context {} leaves no token for the prompt beside --output {}", args.context, args.output);
    };
    let mut tokens = vec![];
    for path in &args.text {
        tokens.extend(text.encode_plain(&read_document(path)?)?);
    }
    if args.text.is_empty() {
        tokens = text.encode_plain(DOCUMENT)?;
    }
    ensure!(!tokens.is_empty(), "the texts are empty; give files with text in them");
    let cut = |i: usize| {
        let start = i * tokens.len() / usize::from(args.requests);
        tokens.iter().cycle().skip(start).take(length).copied().collect()
    };
    Ok((0..args.requests.into()).map(cut).collect())
}

/// When what happened to one request.
struct Told {
    sent: Instant,
    sampled: Vec<Instant>,
    kv_bytes: usize,
}

fn run(
    (model, threads): (&Arc<Model>, usize),
    kv: KvFormat,
    args: &ServeArgs,
    prompts: &[Vec<u32>],
    done: &mut dyn FnMut(),
) -> Result<Row> {
    let settings = Settings {
        kv_memory: args.kv_memory.0,
        most_sequences: args.max_num_seqs.into(),
        most_waiting: prompts.len(),
        ..Settings::default()
    };
    let service = Service::start(model.clone(), threads, settings);
    let (tell, heard) = mpsc::channel();
    let begun = Instant::now();
    let (mut tickets, mut told) = (vec![], vec![]);
    for (i, prompt) in prompts.iter().enumerate() {
        let request = Request::new(prompt.clone(), kv, args.output.into());
        let tell = tell.clone();
        // Nobody listens any more once a request has failed.
        let emit = move |event| drop(tell.send((i, Instant::now(), event)));
        tickets.push(service.submit(request, emit)?);
        told.push(Told { sent: Instant::now(), sampled: vec![], kv_bytes: 0 });
    }
    let watched = listen(&service, &heard, &mut told, done)?;
    let seconds = begun.elapsed().as_secs_f64();
    service.stop();
    Ok(row(kv, (seconds, &watched), &told))
}

/// Listens until every request has ended, and looks at what the engine does meanwhile.
fn listen(
    service: &Service,
    heard: &Receiver<(usize, Instant, Event)>,
    told: &mut [Told],
    done: &mut dyn FnMut(),
) -> Result<Vec<(Instant, Figures)>> {
    let (mut left, mut watched) = (told.len(), vec![]);
    while left > 0 {
        let figures = service.figures();
        if watched.last().is_none_or(|(_, last)| *last != figures) {
            watched.push((Instant::now(), figures));
        }
        let until = Instant::now() + WATCHED_EVERY;
        while let Ok((i, at, event)) = heard.recv_timeout(until.saturating_duration_since(Instant::now())) {
            match event {
                Event::Sampled(_) => told[i].sampled.push(at),
                Event::Ended(End::Length, bill) => {
                    told[i].kv_bytes = bill.kv_bytes;
                    left -= 1;
                    done();
                }
                Event::Ended(End::Failed(why) | End::NoRoom(why), _) => bail!("a request failed: {why}"),
                other => bail!("a request ended before its time: {other:?}"),
            }
        }
    }
    Ok(watched)
}

fn row(kv: KvFormat, (seconds, watched): (f64, &[(Instant, Figures)]), told: &[Told]) -> Row {
    let tokens: usize = told.iter().map(|told| told.sampled.len()).sum();
    let ttft = told.iter().filter_map(|told| Some((*told.sampled.first()? - told.sent).as_secs_f64()));
    let pairs = told.iter().flat_map(|told| told.sampled.windows(2));
    let tbt = pairs.map(|pair| (pair[1] - pair[0]).as_secs_f64() * 1e3);
    let most = |of: fn(&Figures) -> usize| watched.iter().map(|(_, figures)| of(figures)).max().unwrap_or(0);
    // Between two looks without a token read that was known, and without a prompt being compressed, all that was done was decode.
    let read = |figures: &Figures| figures.prompt_tokens + figures.known_tokens;
    let is_decode = |before: &Figures, after: &Figures| {
        read(before) == read(after) && before.compressing + after.compressing == 0
    };
    let is_full = |before: &Figures, after: &Figures| before.waiting.min(after.waiting) > 0;
    let rate = |counts: &dyn Fn(&Figures, &Figures) -> bool| {
        let (mut tokens, mut seconds) = (0, 0.0);
        for pair in watched.windows(2).filter(|pair| counts(&pair[0].1, &pair[1].1)) {
            tokens += pair[1].1.output_tokens - pair[0].1.output_tokens;
            seconds += (pair[1].0 - pair[0].0).as_secs_f64();
        }
        (seconds > 0.0).then(|| tokens as f64 / seconds)
    };
    Row {
        kv: kv.to_string(),
        contexts: most(|figures| figures.running),
        seconds,
        requests_per_s: told.len() as f64 / seconds,
        output_tokens_per_s: tokens as f64 / seconds,
        decode_tokens_per_s: rate(&is_decode).unwrap_or(0.0),
        full_tokens_per_s: rate(&|before, after| is_decode(before, after) && is_full(before, after)),
        ttft_s: quantiles(ttft.collect()),
        tbt_ms: quantiles(tbt.collect()),
        preemptions: watched.last().map_or(0, |(_, figures)| figures.preemptions),
        kv_reserved: most(|figures| figures.kv_reserved),
        kv_allocated: most(|figures| figures.kv_allocated),
        kv_bytes: told.iter().map(|told| told.kv_bytes).sum::<usize>() / told.len(),
    }
}

fn quantiles(mut x: Vec<f64>) -> Quantiles {
    x.sort_by(f64::total_cmp);
    let at = |share: f64| x.get(((x.len() as f64 * share) as usize).min(x.len().saturating_sub(1)));
    Quantiles { p50: at(0.5).copied().unwrap_or(0.0), p99: at(0.99).copied().unwrap_or(0.0) }
}

impl Report {
    /// What is above the rows.
    fn head(&self) -> String {
        let Report { model, requests, prompt_tokens, output_tokens, kv_memory, threads, .. } = self;
        let memory = *kv_memory as f64 / 1e6;
        let columns = format!(
            "{:<24}{:>9}{:>10}{:>9}{:>9}{:>14}{:>12}{:>16}{:>16}{:>14}{:>12}",
            "kv",
            "contexts",
            "seconds",
            "req/s",
            "tok/s",
            "decode tok/s",
            "full tok/s",
            "TTFT s p50/99",
            "TBT ms p50/99",
            "MB a request",
            "preempted"
        );
        format!(
            "{model}; {requests} requests of {prompt_tokens} + {output_tokens} tokens, {memory:.0} MB for keys and values, {threads} threads\n\n{columns}"
        )
    }
}

impl Row {
    fn line(&self) -> String {
        format!(
            "{:<24}{:>9}{:>10.1}{:>9.3}{:>9.1}{:>14.1}{:>12}{:>16}{:>16}{:>14.2}{:>12}",
            self.kv,
            self.contexts,
            self.seconds,
            self.requests_per_s,
            self.output_tokens_per_s,
            self.decode_tokens_per_s,
            self.full_tokens_per_s.map_or("-".to_owned(), |rate| format!("{rate:.1}")),
            format!("{:.1} / {:.1}", self.ttft_s.p50, self.ttft_s.p99),
            format!("{:.0} / {:.0}", self.tbt_ms.p50, self.tbt_ms.p99),
            self.kv_bytes as f64 / 1e6,
            self.preemptions
        )
    }
}
