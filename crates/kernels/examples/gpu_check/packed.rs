//! The packed format's checks and times.

use super::{
    KNOWN, Result, fill, overlapped, report, report_failure, seconds, sequences, shape, show_exact, steps,
};
use half::f16;
use mosaickv_kernels::cuda::check::Random;
use mosaickv_kernels::cuda::check::packed::{Case, Outcome, encoding, packed, parts};
use mosaickv_kernels::cuda::driver::Driver;
use mosaickv_kernels::cuda::exact::{Exact, LEAST_PART as EXACT_LEAST_PART, Pool};
use mosaickv_kernels::cuda::packed::{LEAST_PART, Limits, Packed, Rotation, Segment, Stage};
use mosaickv_kernels::cuda::{Device, Gpu, PARTS, Shape};
use mosaickv_kernels::packed::{PAGE_TOKENS, PackedPage, PackedShape};
use std::fmt::Write as _;
use std::sync::Arc;

pub const CHECKS: [&str; 6] = [
    "packed-all",
    "packed-selected",
    "packed-long",
    "packed-encode",
    "packed-selected-overlapped",
    "packed-long-overlapped",
];

/// Shares of tokens that are read: the paper's default, and that of its speed.
const SELECTED: [(&str, f32); 2] = [("packed", 0.1), ("packed_sixteenth", 0.0625)];
/// What is timed by itself. Selection counts on what leaving sets to zero.
const STAGES: [(&str, &[Stage]); 6] = [
    ("turn", &[Stage::Turn]),
    ("score", &[Stage::Score]),
    ("select_and_leave", &[Stage::Want, Stage::Narrow, Stage::List, Stage::Leave]),
    ("attend", &[Stage::Attend]),
    ("leave", &[Stage::Leave]),
    ("finish", &[Stage::Finish]),
];
/// Tokens of a segment.
const SEGMENT: usize = 65536;
/// Pages that are made anew; more are copies of them.
const DISTINCT: usize = 64;

/// Prints a line for each case.
pub fn check(gpu: &Gpu, seed: u64, name: &str) -> Result<()> {
    if name == "packed-encode" {
        for d in [64, 128] {
            let of = parts(&[1040, 96, 64, 16, 4000, 48, 560, 16]);
            let outcome = encoding(gpu, seed, d, &of).map(|()| 0.0);
            show_exact(name, shape(1, 1, 1, d), outcome);
        }
        return Ok(());
    }
    for case in cases(name)? {
        let tokens: Vec<usize> =
            case.segments.iter().map(|of| of.iter().map(|part| part.tokens).sum()).collect();
        let of = format!("{} rows of {}, {tokens:?} tokens", case.shape.rows, case.shape.head_dim);
        match packed(gpu, seed, &case) {
            Ok(Outcome { error, blocks }) => {
                let more = format!(", \"read\": {}, \"blocks\": {}", blocks.0, blocks.1);
                report(name, &of, error, 1e-3, &more);
            }
            Err(e) => report_failure(name, &of, &e),
        }
    }
    Ok(())
}

fn cases(name: &str) -> Result<Vec<Case>> {
    Ok(match name {
        "packed-all" => [(4, 128), (1, 64), (3, 64), (8, 128)]
            .into_iter()
            .map(|(rows, d)| {
                let segments = vec![parts(&[560, 16, 1024, 48, 64, 16, 32, 80]), parts(&[16])];
                Case { known: vec![70, 5], ..Case::whole(shape(2, 2, rows, d), segments) }
            })
            .collect(),
        "packed-selected" => [0.1, 0.0625, 0.5]
            .into_iter()
            .enumerate()
            .map(|(i, selected)| {
                let segments = vec![parts(&[2048, 528, 64, 320]), vec![], parts(&[1408, 16])];
                let whole = Case::whole(shape(3, 1, [4, 1, 8][i], [128, 64, 128][i]), segments);
                Case { selected, known: vec![10, 0, 90], spread: [3.0, 8.0, 0.5][i], ..whole }
            })
            .collect(),
        "packed-long" => {
            let segments = vec![parts(&[20_480, 16_384, 7_200])];
            let long = Case::whole(shape(1, 2, 4, 128), segments);
            let chosen = Case { selected: 0.1, known: vec![68], spread: 5.0, ..long };
            vec![chosen.clone(), Case { spread: 0.0, ..chosen }]
        }
        _ => return Err(format!("no check {name}; there are {CHECKS:?}").into()),
    })
}

/// Pages whose tokens are noise to the queries, but for a few that one of them wants.
fn synthetic(
    random: &mut Random,
    queries: &[f16],
    (of, block): (PackedShape, usize),
    count: usize,
) -> Vec<PackedPage> {
    let (d, c) = (of.head_dim(), of.channels());
    let page = |page: usize| {
        let (mut keys, values) = (random.normals(PAGE_TOKENS * c), random.normals(PAGE_TOKENS * c));
        if page % 8 == 3 {
            // Along a query, so that its score is 16 octaves over the others'.
            let query: Vec<f32> = queries[random.below(4) * d..][..c].iter().map(|q| q.to_f32()).collect();
            let square: f32 = query.iter().map(|q| q * q).sum();
            let token = random.below(PAGE_TOKENS);
            let along = 16.0 / std::f32::consts::LOG2_E * (d as f32).sqrt() / square;
            keys[token * c..][..c].iter_mut().zip(&query).for_each(|(k, q)| *k = *k * 0.5 + q * along);
        }
        PackedPage::encode(of, block, &keys, &values)
    };
    (0..count).map(page).collect()
}

/// Heads of steps: of each set `[B * G]` lists of segments.
struct Heads {
    sets: Vec<Vec<Vec<Segment>>>,
    /// Bytes of pages and rotations of a set, those that scores read, and those of a block.
    stored: usize,
    scored: usize,
    block: usize,
}

fn heads(driver: &Driver, of: Shape, context: usize, queries: &[f16]) -> Result<Heads> {
    let (gpu, d) = (driver.gpu(), of.head_dim);
    let strategy = PackedShape::with_rate(d, 0.75, 1).map_err(|e| e.to_string())?;
    let c = strategy.channels();
    // Channels are those of the queries: rotations that change nothing.
    let part_of_identity = |n: usize, w: usize| -> Vec<f16> {
        (0..n * w).map(|i| f16::from_f32(f32::from(u8::from(i / w == i % w)))).collect()
    };
    let rotation = || -> Result<Arc<Rotation>> {
        Ok(Arc::new(Rotation::new(&gpu, &part_of_identity(d, c), &part_of_identity(c, d), d)?))
    };
    let tokens = SEGMENT.min(context);
    let distinct = synthetic(&mut Random::new(5), queries, (strategy, 8), DISTINCT.min(tokens / PAGE_TOKENS));
    let first = Segment::repeated(&gpu, &rotation()?, (&distinct, tokens / PAGE_TOKENS / distinct.len()))?;
    let (of_keys, block) = first.bytes_read();
    let segments = of.heads() * (context / tokens);
    let stored = segments * (first.bytes() + 4 * d * c);
    let wanted = steps(driver, segments * of_keys);
    let (free, _) = driver.memory()?;
    if wanted * stored + (2 << 30) > free {
        return Err(format!("{} GB wanted, {} GB are free", (wanted * stored) >> 30, free >> 30).into());
    }
    let head = || -> Result<Vec<Segment>> {
        (0..context / tokens).map(|_| Ok(first.copied(&rotation()?)?)).collect()
    };
    let set = || -> Result<Vec<Vec<Segment>>> { (0..of.heads()).map(|_| head()).collect() };
    let sets: Result<Vec<_>> = (0..wanted).map(|_| set()).collect();
    Ok(Heads { sets: sets?, stored, scored: segments * of_keys, block })
}

/// Prints a line of times: of exact attention, of steps that read shares of the tokens, of their launches, and of one that reads all.
pub fn time(context: usize, batch: usize) -> Result<()> {
    let driver = Driver::open(0)?;
    let (gpu, of) = (driver.gpu(), shape(batch, 8, 4, 128));
    let mut line = format!("{{\"packed_context\": {context}, \"batch\": {batch}");
    match super::time_exact(&driver, of, context, &[PARTS]) {
        Ok(times) => write!(line, ", \"exact_s\": {:.3e}", times[0].1)?,
        Err(e) => eprintln!("exact, {context} x {batch}: skipped: {e}"),
    }
    let one = Random::new(4).halves(of.rows * of.head_dim, 1.0);
    let heads = heads(&driver, of, context, &one)?;
    let queries = gpu.upload(&one.repeat(of.heads()))?;
    let out = gpu.alloc(of.queries() * of.head_dim * 4)?;
    let pool = Pool::new(&gpu, of.sequences * 2, (of.kv_heads, of.head_dim))?;
    fill(pool.data(), 6)?;
    let mut known = Exact::new(&gpu, of, 2, (2, EXACT_LEAST_PART))?;
    known.set(&sequences(of.sequences, KNOWN, 0))?;
    let blocks = context / 8;
    let limits = Limits { segments: context.div_ceil(SEGMENT), pages: context / PAGE_TOKENS, blocks };
    let steps_of = |selected: f32, least_part: usize| -> Result<Vec<Packed>> {
        let of_set = |set: &Vec<Vec<Segment>>| {
            let mut step = Packed::new(&gpu, of, limits, selected, (PARTS, least_part))?;
            step.set(&set.iter().map(|head| head.iter().collect()).collect::<Vec<_>>())?;
            Ok(step)
        };
        heads.sets.iter().map(of_set).collect()
    };
    let scale = (of.head_dim as f32).sqrt().recip();
    let count = heads.sets.len();
    let whole = |steps: &[Packed]| {
        seconds(&driver, count, || {
            steps.iter().try_for_each(|step| {
                known.attend(&pool, &queries, scale)?;
                step.step(&queries, scale, Some(&known), &out)
            })
        })
    };
    let a_token = |bytes: usize| bytes as f64 / (context * of.heads()) as f64;
    write!(line, ", \"steps\": {count}, \"bytes_a_token\": {:.2}", a_token(heads.stored))?;
    for (name, selected) in SELECTED {
        let steps = steps_of(selected, LEAST_PART)?;
        let apart = whole(&steps)?;
        let both = overlapped(&driver, || whole(&steps));
        write!(line, ", \"{name}_s\": {:.3e}, \"{name}_overlapped_s\": {both:.3e}", apart)?;
        if name != "packed" {
            continue;
        }
        let read: usize =
            steps[0].read_blocks()?.iter().map(|list| list.as_ref().map_or(blocks, Vec::len)).sum();
        write!(line, ", \"share\": {:.5}", read as f64 / (blocks * of.heads()) as f64)?;
        for (name, stages) in STAGES {
            let alone = seconds(&driver, count, || {
                let launch = |step: &Packed, stage| step.stage(stage, &queries, scale, Some(&known), &out);
                steps.iter().try_for_each(|step| stages.iter().try_for_each(|stage| launch(step, *stage)))
            })?;
            write!(line, ", \"{name}_s\": {alone:.3e}")?;
            let bytes = match name {
                "score" => heads.scored,
                "attend" => read * heads.block,
                _ => continue,
            };
            write!(line, ", \"{name}_gb_s\": {:.0}", bytes as f64 / alone / 1e9)?;
        }
    }
    for least_part in [64, 128, 512] {
        let tried = whole(&steps_of(SELECTED[0].1, least_part)?)?;
        write!(line, ", \"packed_{least_part}_s\": {tried:.3e}")?;
    }
    let all = whole(&steps_of(1.0, LEAST_PART)?)?;
    println!("{line}, \"all_s\": {all:.3e}, \"all_gb_s\": {:.0}}}", heads.stored as f64 / all / 1e9);
    Ok(())
}

pub fn table(rows: &mut [String]) -> String {
    let field = super::field;
    let mut out = "\npacked: a quarter of the elements, token blocks of 8, segments of 65,536 tokens; us a step; x: times faster than exact\n\
        | context | batch | exact | packed, all | x | a tenth | x | a sixteenth | x | score, GB/s | select | attend, GB/s | turn, leave, finish |\n\
        |---|---|---|---|---|---|---|---|---|---|---|---|---|\n"
        .to_owned();
    rows.sort_by_key(|line| {
        ["packed_context", "batch"].map(|name| field(line, name).unwrap_or(0.0) as usize)
    });
    for line in rows.iter() {
        let us = |name: &str| field(line, &format!("{name}_s")).unwrap_or(f64::NAN) * 1e6;
        let cell = |name: &str| format!("{:.0} | {:.1}", us(name), us("exact") / us(name));
        let with_rate = |name: &str| {
            format!("{:.0}, {:.0}", us(name), field(line, &format!("{name}_gb_s")).unwrap_or(f64::NAN))
        };
        let _ = writeln!(
            out,
            "| {} | {} | {:.0} | {} | {} | {} | {} | {:.0} | {} | {:.0} |",
            field(line, "packed_context").unwrap_or(0.0),
            field(line, "batch").unwrap_or(0.0),
            us("exact"),
            cell("all"),
            cell("packed"),
            cell("packed_sixteenth"),
            with_rate("score"),
            us("select_and_leave") - us("leave"),
            with_rate("attend"),
            us("turn") + us("leave") + us("finish"),
        );
    }
    out
}
