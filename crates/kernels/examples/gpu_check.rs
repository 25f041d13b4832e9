//! Are the CUDA kernels right on this machine's GPU, and how fast are they?
//!
//! `gpu_check FOLDER [MINUTES]` runs each check and each timing in a process of its own, so that one that fails hides no other, writes
//! all numbers to `FOLDER/kernels.jsonl` and prints a table. `scripts/gpu-check` runs it beside PyTorch.
//!
//! Timed is a step of decode attention of one layer: 32 query heads, 8 KV heads, head_dim 128. Several steps over different memory
//! follow each other in one CUDA graph, as the layers of a model do; times are medians of its launches, by CUDA events.

#[path = "gpu_check/packed.rs"]
mod packed;

use half::f16;
use mosaickv_kernels::cuda::check::dense::Size;
use mosaickv_kernels::cuda::check::{self, Case, Outcome, Random, profile, profiles, storable};
use mosaickv_kernels::cuda::driver::{Driver, resources};
use mosaickv_kernels::cuda::exact::{Exact, LEAST_PART, PAGE_TOKENS, Pool};
use mosaickv_kernels::cuda::layered::{self, Choice, Head, Layered, Rotations, Scales, Stage};
use mosaickv_kernels::cuda::{Buffer, Device, PARTS, Shape};
use mosaickv_kernels::layered::{Needed, Pages, Profile};
use std::error::Error;
use std::fmt::Write as _;
use std::io::Write as _;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const CONTEXTS: [usize; 4] = [32 << 10, 128 << 10, 256 << 10, 1 << 20];
const BATCHES: [usize; 3] = [1, 4, 8];
/// Tokens that are attended to without pages: 4 sinks and an update buffer.
const KNOWN: usize = 68;
/// Pages that are made anew, at most; more are copies of them.
const DISTINCT: usize = 512;
const CHECKS: [&str; 13] = [
    "dense",
    "dense-small",
    "dense-overlapped",
    "exact",
    "exact-long",
    "layered-all",
    "layered-profiles",
    "layered-selected",
    "layered-long",
    "layered-lists",
    "layered-encode",
    "layered-selected-overlapped",
    "layered-long-overlapped",
];

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match words[..] {
        ["--check", name] => run_check(name),
        ["--copy"] => copy(),
        ["--time-packed", context, batch] => {
            number(context).and_then(|context| packed::time(context, number(batch)?))
        }
        ["--time", context, batch] => number(context).and_then(|context| time(context, number(batch)?)),
        ["--tune", context, batch] => number(context).and_then(|context| tune(context, number(batch)?)),
        ["--tune-layered", context, batch] => {
            number(context).and_then(|context| tune_layered(context, number(batch)?))
        }
        ["--resources"] => show_resources(),
        [folder] => all(folder, 6.0),
        [folder, minutes] => minutes.parse().map_err(Into::into).and_then(|minutes| all(folder, minutes)),
        _ => Err("usage: gpu_check FOLDER [MINUTES] | --check NAME | --copy | --time CONTEXT BATCH | --time-packed CONTEXT BATCH | --tune CONTEXT BATCH | --tune-layered CONTEXT BATCH | --resources".into()),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("gpu_check: {e}");
            ExitCode::FAILURE
        }
    }
}

fn number(text: &str) -> Result<usize> {
    text.parse().map_err(|_| format!("{text:?} is no number").into())
}

fn show_resources() -> Result<()> {
    for of in resources() {
        println!(
            "{:24} {:8} {:3} registers, {} bytes spilled",
            of.kernel, of.architecture, of.registers, of.spilled
        );
    }
    Ok(())
}

// ------------------------------------------------------------------ All of it, in processes.

/// One process; its lines of JSON, or why there are none.
fn child(arguments: &[&str], limit: Duration) -> std::result::Result<Vec<String>, String> {
    let program = std::env::current_exe().map_err(|e| e.to_string())?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .map_err(|e| e.to_string())?;
    let start = Instant::now();
    // What it prints fits in a pipe.
    let status = loop {
        if let Some(status) = child.try_wait().map_err(|e| e.to_string())? {
            break status;
        }
        if start.elapsed() > limit {
            // It may have ended meanwhile.
            let _ = child.kill();
            let _ = child.wait();
            return Err(format!("not done after {:.0} s", limit.as_secs_f64()));
        }
        std::thread::sleep(Duration::from_millis(20));
    };
    let mut text = String::new();
    if let Some(mut out) = child.stdout.take() {
        std::io::Read::read_to_string(&mut out, &mut text).map_err(|e| e.to_string())?;
    }
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    if !status.success() {
        lines.push(format!(
            "{{\"process\": {:?}, \"ok\": false, \"why\": \"{status}\"}}",
            arguments.join(" ")
        ));
    }
    Ok(lines)
}

/// The number after `"name": ` in a line of JSON.
fn field(line: &str, name: &str) -> Option<f64> {
    let (_, rest) = line.split_once(&format!("\"{name}\": "))?;
    rest.split([',', '}']).next()?.trim().parse().ok()
}

fn all(folder: &str, minutes: f64) -> Result<()> {
    let (start, budget) = (Instant::now(), Duration::from_secs_f64(minutes * 60.0));
    std::fs::create_dir_all(folder)?;
    let mut file = std::fs::File::create(format!("{folder}/kernels.jsonl"))?;
    let mut failures = 0;
    for name in CHECKS.into_iter().chain(packed::CHECKS) {
        match child(&["--check", name], Duration::from_secs(60)) {
            Ok(lines) => {
                for line in lines {
                    failures += usize::from(!line.contains("\"ok\": true"));
                    println!("{line}");
                    writeln!(file, "{line}")?;
                }
            }
            Err(e) => {
                failures += 1;
                let line = format!("{{\"check\": \"{name}\", \"ok\": false, \"why\": {e:?}}}");
                println!("{line}");
                writeln!(file, "{line}")?;
            }
        }
    }
    let (mut rows, mut rows_of_packed) = (vec![], vec![]);
    let mut run = |arguments: &[&str]| -> Result<Vec<String>> {
        let left = budget.saturating_sub(start.elapsed());
        if left < Duration::from_secs(5) {
            println!("skipped for time: {}", arguments.join(" "));
            return Ok(vec![]);
        }
        match child(arguments, left) {
            Ok(lines) => {
                for line in &lines {
                    writeln!(file, "{line}")?;
                }
                Ok(lines)
            }
            Err(e) => {
                println!("{}: {e}", arguments.join(" "));
                Ok(vec![])
            }
        }
    };
    let copy = run(&["--copy"])?.first().and_then(|line| field(line, "gb_s"));
    // What the bars are about first.
    let mut sizes: Vec<(usize, usize)> = CONTEXTS.iter().flat_map(|c| BATCHES.map(|b| (*c, b))).collect();
    sizes.sort_by_key(|size| ![(256 << 10, 4), (1 << 20, 1), (256 << 10, 1)].contains(size));
    for (context, batch) in sizes {
        rows.extend(run(&["--time", &context.to_string(), &batch.to_string()])?);
        rows_of_packed.extend(run(&["--time-packed", &context.to_string(), &batch.to_string()])?);
    }
    for (context, batch) in [("262144", "4"), ("1048576", "1")] {
        for line in run(&["--tune", context, batch])? {
            println!("{line}");
        }
    }
    rows.retain(|line| line.contains("\"context\""));
    print!("{}", table(&mut rows, copy));
    print!("{}", packed::table(&mut rows_of_packed));
    if failures > 0 {
        return Err(format!("{failures} checks failed").into());
    }
    Ok(())
}

fn table(rows: &mut [String], copy: Option<f64>) -> String {
    let mut out = String::new();
    let gb_s = copy.map_or("unknown".into(), |x| format!("{x:.0} GB/s"));
    let _ = writeln!(
        out,
        "\none layer, 32/8 heads, head_dim 128; copy bandwidth {gb_s}; us a step; x: times faster than exact"
    );
    let _ = writeln!(
        out,
        "layered: an eighth of the bytes, every token in every head; six of ten: so many tokens in a head, at more bits"
    );
    let _ = writeln!(
        out,
        "| context | batch | exact | of copy | layered, all | x | layered | x | tiles read | sketch | select | attend | six of ten | x |"
    );
    let _ = writeln!(out, "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|");
    rows.sort_by_key(|line| ["context", "batch"].map(|name| field(line, name).unwrap_or(0.0) as usize));
    for line in rows.iter() {
        let us = |name: &str| field(line, name).map(|x| x * 1e6);
        let show = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.0}"));
        let ratio =
            |name: &str| us("exact_s").zip(us(name)).map_or("-".into(), |(a, b)| format!("{:.1}", a / b));
        let share = field(line, "exact_gb_s")
            .zip(copy)
            .map_or("-".into(), |(x, copy)| format!("{:.0} %", x / copy * 100.0));
        let read = field(line, "tiles_share").map_or("-".into(), |x| format!("{:.2} %", x * 100.0));
        let _ = writeln!(
            out,
            "| {} | {} | {} | {share} | {} | {} | {} | {} | {read} | {} | {} | {} | {} | {} |",
            field(line, "context").unwrap_or(0.0),
            field(line, "batch").unwrap_or(0.0),
            show(us("exact_s")),
            show(us("layered_all_s")),
            ratio("layered_all_s"),
            show(us("layered_s")),
            ratio("layered_s"),
            show(us("sketch_s")),
            show(us("want_s").zip(us("list_s")).map(|(a, b)| a + b)),
            show(us("attend_s")),
            show(us("planned_layered_s")),
            ratio("planned_layered_s"),
        );
    }
    out
}

// ------------------------------------------------------------------ Checks.

fn shape(sequences: usize, kv_heads: usize, rows: usize, head_dim: usize) -> Shape {
    Shape { sequences, kv_heads, rows, head_dim }
}

fn report(name: &str, of: &str, error: f64, limit: f64, more: &str) {
    println!(
        "{{\"check\": \"{name}\", \"of\": \"{of}\", \"error\": {error:.2e}, \"ok\": {}{more}}}",
        error < limit
    );
}

fn report_failure(name: &str, of: &str, why: &impl std::fmt::Display) {
    let why = why.to_string();
    println!("{{\"check\": \"{name}\", \"of\": \"{of}\", \"ok\": false, \"why\": {why:?}}}");
}

/// Prints a line for each case.
fn run_check(name: &str) -> Result<()> {
    let driver = Driver::open(0)?;
    let gpu = driver.gpu();
    let name = match name.strip_suffix("-overlapped") {
        None => name,
        Some(name) => {
            driver.overlap(true);
            name
        }
    };
    // Fresh inputs each time.
    let seed = std::time::UNIX_EPOCH.elapsed()?.as_nanos() as u64;
    match name {
        "dense" | "dense-small" => {
            let size = if name == "dense" { Size::Large } else { Size::Small };
            for of in check::dense::checks(&gpu, seed, size)? {
                report(name, &of.of, of.error, 1.0, "");
            }
        }
        "exact" => {
            for (rows, d) in [(1, 64), (3, 128), (4, 128), (8, 64), (8, 128)] {
                let shape = shape(4, 2, rows, d);
                let outcome = check::exact(&gpu, seed, shape, &[1, 63, 777, 0], 5);
                show_exact(name, shape, outcome);
            }
        }
        "exact-long" => {
            for lengths in [[20_000, 1], [4096, 9999]] {
                let shape = shape(2, 8, 4, 128);
                show_exact(name, shape, check::exact(&gpu, seed, shape, &lengths, PARTS));
            }
        }
        "layered-encode" => {
            for d in [64, 128] {
                let case = Case { escapes: 30, ..Case::whole(shape(1, 1, 1, d), &[1, 63, 5000]) };
                let outcome = check::encode::encoding(&gpu, seed, &case).map(|()| 0.0);
                show_exact(name, case.shape, outcome);
            }
        }
        _ if name.starts_with("packed") => packed::check(&gpu, seed, name)?,
        _ => {
            for case in cases(name)? {
                let of =
                    format!("{} rows of {}, {:?} tokens", case.shape.rows, case.shape.head_dim, case.lengths);
                match check::layered(&gpu, seed, &case) {
                    Ok(Outcome { error, tiles }) => {
                        let more = format!(", \"read\": {}, \"tiles\": {}", tiles.0, tiles.1);
                        report(name, &of, error, 1e-3, &more);
                    }
                    Err(e) => report_failure(name, &of, &e),
                }
            }
        }
    }
    Ok(())
}

fn show_exact(name: &str, shape: Shape, outcome: std::result::Result<f64, impl std::fmt::Display>) {
    let of = format!("{} rows of {}", shape.rows, shape.head_dim);
    match outcome {
        Ok(error) => report(name, &of, error, 1e-3, ""),
        Err(e) => report_failure(name, &of, &e),
    }
}

fn cases(name: &str) -> Result<Vec<Case>> {
    Ok(match name {
        "layered-all" => {
            let sizes = [(4, 128), (1, 64), (3, 64), (8, 128)];
            sizes
                .into_iter()
                .map(|(rows, d)| Case { known: vec![70, 5], ..Case::whole(shape(2, 2, rows, d), &[1, 2500]) })
                .collect()
        }
        "layered-profiles" => profiles(128)
            .into_iter()
            .map(|of| Case { profiles: vec![of], ..Case::whole(shape(1, 1, 4, 128), &[1000]) })
            .collect(),
        "layered-selected" => {
            let choices = [Needed::Mass(0.9), Needed::Mass(0.9999), Needed::Relative(0.05)];
            let choice =
                |needed| Choice { needed: Some(needed), from_tokens: 200, least_tiles: 5, one_in: 4 };
            let of = |(i, needed)| {
                let shape = shape(3, 1, [4, 1, 8][i], [128, 64, 128][i]);
                Case {
                    choice: choice(needed),
                    always: i,
                    known: vec![10, 0, 90],
                    ..Case::whole(shape, &[3000, 130, 1401])
                }
            };
            choices.into_iter().enumerate().map(of).collect()
        }
        "layered-long" => {
            let long = Case::whole(shape(1, 2, 4, 128), &[24_000]);
            vec![Case { choice: Choice::default(), always: 3, known: vec![68], spread: 5.0, ..long }]
        }
        // Lists of up to 512 tiles, of more, and of so many that a 64th would be more than a part may have.
        "layered-lists" => {
            let whole = |tokens: usize| Case::whole(shape(1, 1, 4, 128), &[tokens]);
            [6_500, 8_200, 18_000, 33_000].map(whole).into()
        }
        _ => return Err(format!("no check {name}; there are {CHECKS:?}").into()),
    })
}

// ------------------------------------------------------------------ Times.

/// Median seconds of a launch of `work` captured as a graph, over `steps` that it contains.
fn seconds(
    driver: &Driver,
    steps: usize,
    work: impl Fn() -> std::result::Result<(), mosaickv_kernels::cuda::Error>,
) -> Result<f64> {
    // Loads the kernels: not in a capture.
    work()?;
    driver.synchronize()?;
    let graph = driver.capture(&work)?;
    let launch = || -> Result<f64> {
        let before = driver.event()?;
        // SAFETY: what `work` uses is borrowed by it.
        unsafe { graph.launch() }?;
        Ok(before.seconds_to(&driver.event()?)?)
    };
    for _ in 0..3 {
        launch()?;
    }
    let (start, mut times) = (Instant::now(), vec![]);
    while times.len() < 11 || (times.len() < 201 && start.elapsed() < Duration::from_millis(300)) {
        times.push(launch()?);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2] / steps as f64)
}

/// The same with launches that overlap; endless where that fails.
fn overlapped(driver: &Driver, time: impl FnOnce() -> Result<f64>) -> f64 {
    driver.overlap(true);
    let seconds = time().unwrap_or_else(|e| {
        eprintln!("launches that overlap: {e}");
        f64::INFINITY
    });
    driver.overlap(false);
    seconds
}

/// Bytes read and written a second by a copy on the device.
fn copy() -> Result<()> {
    let driver = Driver::open(0)?;
    let gpu = driver.gpu();
    let bytes = 2 << 30;
    let (a, b) = (gpu.alloc(bytes)?, gpu.alloc(bytes)?);
    fill(&a, 1)?;
    let seconds = seconds(&driver, 1, || b.copy_from(0, (&a, 0), bytes))?;
    println!(
        "{{\"device\": \"{}\", \"copy_s\": {seconds}, \"gb_s\": {}}}",
        driver.name(),
        2.0 * bytes as f64 / seconds / 1e9
    );
    Ok(())
}

/// Random numbers as f16, the first megabytes again and again.
fn fill(buffer: &Buffer, seed: u64) -> Result<()> {
    let part = (8 << 20).min(buffer.bytes() / 2 / 16 * 16);
    buffer.write(0, &Random::new(seed).halves(part / 2, 1.0))?;
    let mut done = part;
    while done < buffer.bytes() {
        let more = done.min(buffer.bytes() - done);
        buffer.copy_from(done, (buffer, 0), more)?;
        done += more;
    }
    Ok(())
}

/// Steps in a graph: as many as read several times what the second cache holds, at least 2.
fn steps(driver: &Driver, bytes: usize) -> usize {
    (4 * driver.cache().max(50 << 20)).div_ceil(bytes.max(1)).clamp(2, 16)
}

fn time(context: usize, batch: usize) -> Result<()> {
    let driver = Driver::open(0)?;
    let of = shape(batch, 8, 4, 128);
    let mut line = format!("{{\"context\": {context}, \"batch\": {batch}");
    match time_exact(&driver, of, context, &[PARTS]) {
        Ok(times) => {
            let (_, seconds, bytes) = times[0];
            write!(
                line,
                ", \"exact_s\": {seconds:.3e}, \"exact_gb_s\": {:.0}",
                bytes as f64 / seconds / 1e9
            )?;
        }
        Err(e) => eprintln!("exact, {context} x {batch}: skipped: {e}"),
    }
    for plan in [Plan::Every, Plan::SixOfTen] {
        match time_layered(&driver, of, context, plan) {
            Ok(more) => line.push_str(&more),
            Err(e) => eprintln!("layered, {context} x {batch}: skipped: {e}"),
        }
    }
    println!("{line}}}");
    Ok(())
}

/// Sequences whose pages follow each other from `first` on.
fn sequences(batch: usize, tokens: usize, first: usize) -> Vec<(usize, Vec<u32>)> {
    let pages = tokens.div_ceil(PAGE_TOKENS);
    (0..batch).map(|i| (tokens, (0..pages).map(|page| (first + i * pages + page) as u32).collect())).collect()
}

/// Exact steps cut into other numbers of parts.
fn tune(context: usize, batch: usize) -> Result<()> {
    let driver = Driver::open(0)?;
    for (parts, seconds, bytes) in
        time_exact(&driver, shape(batch, 8, 4, 128), context, &[66, 99, 132, 198, 264, 396, 512])?
    {
        let gb_s = bytes as f64 / seconds / 1e9;
        println!(
            "{{\"tuned\": {context}, \"batch\": {batch}, \"parts\": {parts}, \"exact_s\": {seconds:.3e}, \"gb_s\": {gb_s:.0}}}"
        );
    }
    Ok(())
}

/// Layered steps of both plans, cut into parts of other sizes.
fn tune_layered(context: usize, batch: usize) -> Result<()> {
    let driver = Driver::open(0)?;
    for plan in [Plan::Every, Plan::SixOfTen] {
        let all = LayeredSteps::new(&driver, shape(batch, 8, 4, 128), context, plan)?;
        let mut line =
            format!("{{\"tuned\": {context}, \"batch\": {batch}, \"planned\": {}", plan == Plan::SixOfTen);
        for part in [8, 16, 24, 32, 40] {
            let steps = all.steps(Choice::default(), part)?;
            let (apart, together) = all.time_both(&steps)?;
            write!(line, ", \"parts_of_{part}_s\": {:.3e}", apart.min(together))?;
            if part == layered::LEAST_PART {
                time_stages(&all, &steps, &mut line)?;
            }
        }
        println!("{line}}}");
    }
    Ok(())
}

/// For each number of parts the seconds of a step, the better of launches that overlap or not, and the bytes it reads.
fn time_exact(
    driver: &Driver,
    of: Shape,
    context: usize,
    parts: &[usize],
) -> Result<Vec<(usize, f64, usize)>> {
    let gpu = driver.gpu();
    let bytes = of.heads() * context * of.head_dim * 4;
    let pages = of.sequences * context.div_ceil(PAGE_TOKENS);
    let (free, _) = driver.memory()?;
    // Large inputs serve all steps: they do not stay in the cache.
    let wanted = steps(driver, bytes);
    let sets = if bytes > 1 << 30 { 1 } else { wanted };
    if sets * bytes + (2 << 30) > free {
        return Err(format!("{} GB wanted, {} GB are free", (sets * bytes) >> 30, free >> 30).into());
    }
    let pool = Pool::new(&gpu, pages * sets, (of.kv_heads, of.head_dim))?;
    fill(pool.data(), 3)?;
    let queries = gpu.upload(&Random::new(4).halves(of.queries() * of.head_dim, 1.0))?;
    let out = gpu.alloc(of.queries() * of.head_dim * 4)?;
    let scale = (of.head_dim as f32).sqrt().recip();
    let of_parts = |&parts: &usize| {
        let steps: Result<Vec<Exact>> = (0..sets)
            .map(|i| {
                let mut step = Exact::new(&gpu, of, context.div_ceil(PAGE_TOKENS), (parts, LEAST_PART))?;
                step.set(&sequences(of.sequences, context, i * pages))?;
                Ok(step)
            })
            .collect();
        let steps = steps?;
        let time = || {
            seconds(driver, wanted, || {
                (0..wanted).try_for_each(|i| {
                    let step = &steps[i % sets];
                    step.attend(&pool, &queries, scale)?;
                    step.finish(&out)
                })
            })
        };
        Ok((parts, time()?.min(overlapped(driver, time)), bytes))
    };
    parts.iter().map(of_parts).collect()
}

/// How an eighth of the bytes is shared out.
#[derive(Clone, Copy, PartialEq)]
enum Plan {
    /// Every head keeps every token, at 2 bits an element.
    Every,
    /// Six tokens of ten in a head, at more bits, as the cache's own plans do: a token that one head drops another keeps.
    SixOfTen,
}

/// Profiles of a plan: pages of few bits, and some of more where attention was. Pages of a profile follow each other.
fn typical(plan: Plan, page: usize, pages: usize) -> (Profile, Profile) {
    if plan == Plan::SixOfTen {
        let (keys, values) = match page * 20 / pages {
            0..=7 => (profile(0, 8, 8), profile(0, 2, 8)),
            8..=14 => (profile(1, 9, 6), profile(0, 4, 8)),
            15..=18 => (profile(2, 12, 2), profile(1, 8, 6)),
            _ => (profile(4, 10, 2), profile(2, 10, 4)),
        };
        return storable(128, keys, values);
    }
    let (keys, values) = match page * 20 / pages {
        0..=9 => (profile(0, 4, 8), profile(0, 0, 8)),
        10..=15 => (profile(0, 6, 8), profile(0, 2, 8)),
        16..=18 => (profile(1, 7, 8), profile(0, 8, 8)),
        _ => (profile(2, 10, 4), profile(2, 10, 4)),
    };
    storable(128, keys, values)
}

/// Pages whose tokens are noise to the queries, but for a few that one of them wants.
fn synthetic(random: &mut Random, queries: &[f16], plan: Plan, pages: usize) -> Pages {
    let d = 128;
    let mut out = Pages::new(d);
    for page in 0..pages {
        let (mut keys, values) = (random.normals(64 * d), random.normals(64 * d));
        if page % 64 == 17 {
            // Along a query, so that its score is 16 octaves over the others'.
            let query: Vec<f32> = queries[random.below(4) * d..][..d].iter().map(|q| q.to_f32()).collect();
            let square: f32 = query.iter().map(|q| q * q).sum();
            let token = random.below(64);
            let along = 16.0 / std::f32::consts::LOG2_E * (d as f32).sqrt() / square;
            keys[token * d..][..d].iter_mut().zip(&query).for_each(|(k, q)| *k = *k * 0.5 + q * along);
        }
        out.push((&keys, &values), typical(plan, page, pages));
    }
    out
}

/// Layered steps over heads of one plan, and all that they need.
struct LayeredSteps<'a> {
    driver: &'a Driver,
    of: Shape,
    /// Of each set, as many as there are heads in a step.
    heads: Vec<Head>,
    sets: usize,
    /// Steps in a graph.
    wanted: usize,
    /// Of a head.
    pages: usize,
    /// Of a head what lies apart, other lines and all else.
    bytes: [usize; 3],
    rotations: Rotations,
    pool: Pool,
    known: Exact,
    queries: Buffer,
    out: Buffer,
}

impl<'a> LayeredSteps<'a> {
    fn new(driver: &'a Driver, of: Shape, context: usize, plan: Plan) -> Result<LayeredSteps<'a>> {
        let gpu = driver.gpu();
        let (mut random, d) = (Random::new(5), of.head_dim);
        let kept = if plan == Plan::Every { context } else { context / 10 * 6 };
        let one: Vec<f16> = random.halves(of.rows * d, 1.0);
        let queries = gpu.upload(&one.repeat(of.heads()))?;
        let times = (kept / PAGE_TOKENS).div_ceil(DISTINCT);
        let distinct = synthetic(&mut random, &one, plan, kept / PAGE_TOKENS / times);
        let pages = times * distinct.pages().len();
        // Channels are those of the queries: rotations that change nothing.
        let identity: Vec<f16> =
            (0..d * d).map(|i| f16::from_f32(f32::from(u8::from(i / d == i % d)))).collect();
        let ones = vec![f16::ONE; d];
        let zeros = vec![f16::ZERO; d];
        let scales = Scales {
            key_mean: zeros.clone(),
            key_spread: ones.clone(),
            value_mean: zeros,
            value_spread: ones,
        };
        let upload = || Head::repeated(&gpu, (&distinct, times), pages, &scales);
        let bytes = upload()?.bytes();
        let (leading, stored) = (bytes[0] * of.heads(), bytes.iter().sum::<usize>() * of.heads());
        // Steps of chosen tiles read little more than what lies apart.
        let wanted = steps(driver, leading);
        let sets = if leading > 1 << 30 { 1 } else { wanted };
        let (free, _) = driver.memory()?;
        if sets * stored + (2 << 30) > free {
            return Err(format!("{} GB wanted, {} GB are free", (sets * stored) >> 30, free >> 30).into());
        }
        let heads: Result<Vec<Head>> = (0..sets * of.heads()).map(|_| Ok(upload()?)).collect();
        let pool = Pool::new(&gpu, of.sequences * 2, (of.kv_heads, d))?;
        fill(pool.data(), 6)?;
        let mut known = Exact::new(&gpu, of, 2, (2, LEAST_PART))?;
        known.set(&sequences(of.sequences, KNOWN, 0))?;
        let rotations = Rotations::new(&gpu, &identity, &identity, d)?;
        let out = gpu.alloc(of.queries() * d * 4)?;
        let heads = heads?;
        Ok(LayeredSteps {
            driver,
            of,
            heads,
            sets,
            wanted,
            pages,
            bytes,
            rotations,
            pool,
            known,
            queries,
            out,
        })
    }

    /// One for each set.
    fn steps(&self, choice: Choice, least_part: usize) -> Result<Vec<Layered>> {
        let of_set = |heads: &[Head]| -> Result<Layered> {
            let gpu = self.driver.gpu();
            let mut step = Layered::new(&gpu, self.of, (self.pages, 0), choice, (PARTS, least_part))?;
            step.set(&heads.iter().collect::<Vec<_>>(), &vec![&self.rotations; self.of.kv_heads])?;
            Ok(step)
        };
        self.heads.chunks(self.of.heads()).map(of_set).collect()
    }

    fn scale(&self) -> f32 {
        (self.of.head_dim as f32).sqrt().recip()
    }

    /// Seconds of a step.
    fn time(&self, steps: &[Layered]) -> Result<f64> {
        seconds(self.driver, self.wanted, || {
            (0..self.wanted).try_for_each(|i| {
                self.known.attend(&self.pool, &self.queries, self.scale())?;
                steps[i % self.sets].step(&self.queries, self.scale(), Some(&self.known), &self.out)
            })
        })
    }

    /// The same, and with launches that overlap.
    fn time_both(&self, steps: &[Layered]) -> Result<(f64, f64)> {
        Ok((self.time(steps)?, overlapped(self.driver, || self.time(steps))))
    }

    /// Seconds of one of its launches.
    fn time_stage(&self, steps: &[Layered], stage: Stage) -> Result<f64> {
        seconds(self.driver, self.wanted, || {
            (0..self.wanted).try_for_each(|i| {
                let step = &steps[i % self.sets];
                step.stage(stage, &self.queries, self.scale(), Some(&self.known), &self.out)
            })
        })
    }
}

fn time_layered(driver: &Driver, of: Shape, context: usize, plan: Plan) -> Result<String> {
    let all = LayeredSteps::new(driver, of, context, plan)?;
    let chosen = all.steps(Choice::default(), layered::LEAST_PART)?;
    let mut line = String::new();
    let prefix = if plan == Plan::Every { "" } else { "planned_" };
    let stored = all.bytes.iter().sum::<usize>();
    let a_token = |bytes: usize| bytes as f64 / context as f64;
    write!(line, ", \"{prefix}steps\": {}, \"{prefix}sets\": {}", all.wanted, all.sets)?;
    write!(line, ", \"{prefix}bytes_a_token\": {:.2}", a_token(stored))?;
    write!(line, ", \"{prefix}sketch_bytes_a_token\": {:.2}", a_token(all.bytes[0]))?;
    let (apart, overlapped) = all.time_both(&chosen)?;
    write!(line, ", \"{prefix}layered_apart_s\": {apart:.3e}")?;
    write!(line, ", \"{prefix}layered_s\": {:.3e}", apart.min(overlapped))?;
    if overlapped.is_finite() {
        write!(line, ", \"{prefix}layered_overlapped_s\": {overlapped:.3e}")?;
    }
    let tiles = all.pages * 4;
    let read: usize = chosen[0].read_tiles()?.iter().map(|list| list.as_ref().map_or(tiles, Vec::len)).sum();
    write!(line, ", \"{prefix}tiles_share\": {:.5}", read as f64 / (tiles * of.heads()) as f64)?;
    if plan == Plan::SixOfTen {
        return Ok(line);
    }
    time_stages(&all, &chosen, &mut line)?;
    drop(chosen);
    for least_part in [8, 16, 64] {
        let tried = all.steps(Choice::default(), least_part)?;
        let (apart, overlapped) = all.time_both(&tried)?;
        write!(line, ", \"layered_apart_{least_part}_s\": {apart:.3e}")?;
        write!(line, ", \"layered_overlapped_{least_part}_s\": {overlapped:.3e}")?;
    }
    let of_all = all.time(&all.steps(Choice::all(), layered::LEAST_PART)?)?;
    let gb_s = (stored * of.heads()) as f64 / of_all / 1e9;
    write!(line, ", \"layered_all_s\": {of_all:.3e}, \"layered_all_gb_s\": {gb_s:.0}")?;
    Ok(line)
}

/// Each launch of a step by itself.
fn time_stages(all: &LayeredSteps, steps: &[Layered], line: &mut String) -> Result<()> {
    for (name, stage) in [
        ("turn", Stage::Turn),
        ("attend", Stage::Attend),
        ("finish", Stage::Finish),
        ("sketch", Stage::Sketch),
        ("want", Stage::Want),
        ("list", Stage::List),
    ] {
        let alone = all.time_stage(steps, stage)?;
        write!(line, ", \"{name}_s\": {alone:.3e}")?;
        if stage == Stage::Sketch {
            let gb_s = (all.bytes[0] * all.of.heads()) as f64 / alone / 1e9;
            write!(line, ", \"sketch_gb_s\": {gb_s:.0}")?;
        }
    }
    Ok(())
}
