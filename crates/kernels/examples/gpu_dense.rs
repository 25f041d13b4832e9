//! How fast is what a model's pass on a GPU needs besides attention of a step: products, what lies between them, attention of prompts, copies?
//!
//! `gpu_dense` prints a line of JSON for each size, of the shapes of an 8B model: 32 query and 8 KV heads of 128 channels, hidden 4096,
//! feed-forward 14336, vocabulary 128256. `scripts/gpu_dense_baseline.py` has attention of prompts by PyTorch beside it. Times are medians of
//! launches of CUDA graphs, in which several calls over different weights follow each other.

use half::{bf16, f16};
use mosaickv_kernels::cuda::check::Random;
use mosaickv_kernels::cuda::dense::{self, Activation, Heads, Norm, Pairs, Rotations};
use mosaickv_kernels::cuda::driver::Driver;
use mosaickv_kernels::cuda::exact::{PAGE_TOKENS, Pool};
use mosaickv_kernels::cuda::gemm::{Into, Weights};
use mosaickv_kernels::cuda::prefill::{self, Limits, Places, Span, Tokens};
use mosaickv_kernels::cuda::{Buffer, Gpu, Pinned, aside};
use std::time::{Duration, Instant};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;
type Done = std::result::Result<(), mosaickv_kernels::cuda::Error>;

const HIDDEN: usize = 4096;
const FFN: usize = 14336;
const VOCAB: usize = 128_256;
const HEADS: usize = 32;
const KV_HEADS: usize = 8;

fn main() -> Result<()> {
    let driver = Driver::open(0)?;
    products(&driver)?;
    between(&driver)?;
    for (head_dim, past, new) in [
        (128, 0, 2048),
        (128, 0, 8192),
        (128, 0, 32768),
        (128, 28672, 4096),
        (128, 8192, 512),
        (64, 0, 8192),
        (64, 0, 32768),
    ] {
        attention(&driver, head_dim, (past, new))?;
    }
    copies(&driver)
}

/// Median seconds of a launch of `work` captured as a graph.
fn seconds(driver: &Driver, work: impl Fn() -> Done) -> Result<f64> {
    // Loads the kernels, and looks for the ways to multiply: not in a capture.
    work()?;
    driver.synchronize()?;
    let graph = driver.capture(&work)?;
    let launch = || -> Result<f64> {
        let before = driver.event()?;
        // SAFETY: what `work` uses is borrowed by it.
        unsafe { graph.launch() }?;
        Ok(before.seconds_to(&driver.event()?)?)
    };
    for _ in 0..2 {
        launch()?;
    }
    let (start, mut times) = (Instant::now(), vec![]);
    while times.len() < 5 || (times.len() < 101 && start.elapsed() < Duration::from_millis(150)) {
        times.push(launch()?);
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

fn bfloats(count: usize) -> Vec<bf16> {
    Random::new(1).normals(count).into_iter().map(bf16::from_f32).collect()
}

/// Random numbers, the first ones again and again.
fn filled(gpu: &Gpu, bytes: usize) -> Result<Buffer> {
    let buffer = gpu.alloc(bytes)?;
    let mut done = (4 << 20).min(buffer.bytes() / 2 / 16 * 16);
    buffer.write(0, &Random::new(2).halves(done / 2, 1.0))?;
    while done < buffer.bytes() {
        let more = done.min(buffer.bytes() - done);
        buffer.copy_from(done, (&buffer, 0), more)?;
        done += more;
    }
    Ok(buffer)
}

fn products(driver: &Driver) -> Result<()> {
    let gpu = driver.gpu();
    let numbers = bfloats(1 << 20);
    for (name, rows, cols, into) in [
        ("qkv", (HEADS + 2 * KV_HEADS) * 128, HIDDEN, Into::F32),
        ("wo", HIDDEN, HIDDEN, Into::AddF32),
        ("gate, up", 2 * FFN, HIDDEN, Into::F32),
        ("gate, up", 2 * FFN, HIDDEN, Into::Bf16),
        ("down", HIDDEN, FFN, Into::AddF32),
        ("head", VOCAB, HIDDEN, Into::F32),
    ] {
        // Together several times what the second cache holds.
        let copies = (4 * driver.cache().max(50 << 20)).div_ceil(rows * cols * 2).max(2);
        let weights: std::result::Result<Vec<_>, _> =
            (0..copies).map(|_| Weights::repeated(&gpu, (rows, cols), &numbers)).collect();
        let weights = weights?;
        for tokens in [1, 8, 64, 512, 4096] {
            if name == "head" && tokens > 64 {
                continue;
            }
            let (x, out) = (gpu.upload(&bfloats(tokens * cols))?, gpu.alloc(tokens * rows * 4)?);
            out.fill(0)?;
            let whole =
                seconds(driver, || weights.iter().try_for_each(|w| w.multiply(&x, tokens, &out, into)))?;
            let one = whole / copies as f64;
            let flops = 2.0 * (tokens * rows * cols) as f64;
            println!(
                "{{\"product\": \"{name}\", \"into\": \"{into:?}\", \"rows\": {rows}, \"cols\": {cols}, \"tokens\": {tokens}, \"us\": {:.1}, \"tflop_s\": {:.1}, \"weights_gb_s\": {:.0}}}",
                one * 1e6,
                flops / one / 1e12,
                (rows * cols * 2) as f64 / one / 1e9
            );
        }
    }
    Ok(())
}

fn show(name: &str, tokens: usize, seconds: f64, bytes: usize) {
    let gb_s = bytes as f64 / seconds / 1e9;
    println!(
        "{{\"between\": \"{name}\", \"tokens\": {tokens}, \"us\": {:.2}, \"gb_s\": {gb_s:.0}}}",
        seconds * 1e6
    );
}

/// What lies between products. Of one token four calls follow each other.
fn between(driver: &Driver) -> Result<()> {
    let gpu = driver.gpu();
    let all = (HEADS + 2 * KV_HEADS) * 128;
    for tokens in [1, 4096] {
        let calls = if tokens == 1 { 16 } else { 1 };
        let time = |name: &str, bytes: usize, work: &dyn Fn() -> Done| -> Result<()> {
            let whole = seconds(driver, || (0..calls).try_for_each(|_| work()))?;
            show(name, tokens, whole / calls as f64, bytes);
            Ok(())
        };
        let residual = filled(&gpu, tokens * HIDDEN * 4)?;
        let narrow = gpu.alloc(tokens * FFN * 2)?;
        let wide = filled(&gpu, tokens * 2 * FFN * 4)?;
        let norm = Norm::new(&gpu, &vec![1.0; HIDDEN], 1e-5)?;
        time("norm", tokens * HIDDEN * 6, &|| norm.apply(&residual, tokens, &narrow))?;
        time("norm, add", tokens * HIDDEN * 12, &|| norm.add(&wide, tokens, &residual))?;
        time("gate", tokens * FFN * 10, &|| {
            dense::gate(&gpu, Activation::Silu, &wide, (tokens, FFN), &narrow)
        })?;
        time("narrow", tokens * HIDDEN * 6, &|| dense::narrow(&gpu, &wide, tokens * HIDDEN, &narrow))?;
        let (pool, places) = placed(&gpu, 128, (0, tokens))?;
        let of = Heads {
            heads: HEADS,
            bias: None,
            query_norm: None,
            key_norm: None,
            eps: 1e-5,
            query_factor: 1.0,
        };
        let table = filled(&gpu, tokens * 128 * 4)?;
        let rotations = Rotations { table: &table, dims: 128, pairs: Pairs::Halves };
        let (queries, staged) = (gpu.alloc(tokens * HEADS * 256)?, gpu.alloc(tokens * KV_HEADS * 512)?);
        let kept = Tokens { pool: &pool, places: &places, layer: 0 };
        time("heads", tokens * (all * 4 + HEADS * 256 + KV_HEADS * 1024), &|| {
            of.apply(&wide, Some(rotations), &queries, &kept, Some((&staged, 0)))
        })?;
    }
    Ok(())
}

fn placed(gpu: &Gpu, head_dim: usize, (past, new): (usize, usize)) -> Result<(Pool, Places)> {
    let pages = (past + new).div_ceil(PAGE_TOKENS);
    let pool = Pool::new(gpu, pages, (KV_HEADS, head_dim))?;
    let mut places = Places::new(gpu, Limits { layers: 1, sequences: 1, pages, rows: new })?;
    places.set(&[Span { past, new }])?;
    places.set_pages(&[&(0..pages as u32).collect::<Vec<_>>()])?;
    Ok((pool, places))
}

fn attention(driver: &Driver, head_dim: usize, (past, new): (usize, usize)) -> Result<()> {
    let gpu = driver.gpu();
    let (pool, places) = placed(&gpu, head_dim, (past, new))?;
    let page = filled(&gpu, pool.data().bytes())?;
    pool.data().copy_from(0, (&page, 0), pool.data().bytes())?;
    let queries = gpu.upload(&Random::new(3).halves(new * HEADS * head_dim, 1.0))?;
    let out = gpu.alloc(new * HEADS * head_dim * size_of::<f16>())?;
    let tokens = Tokens { pool: &pool, places: &places, layer: 0 };
    let scale = (head_dim as f32).sqrt().recip();
    let one = seconds(driver, || prefill::attend(&tokens, &queries, HEADS, scale, &out))?;
    let pairs = new * past + new * (new + 1) / 2;
    let flops = 4.0 * (pairs * HEADS * head_dim) as f64;
    println!(
        "{{\"attention\": {head_dim}, \"past\": {past}, \"new\": {new}, \"us\": {:.1}, \"tflop_s\": {:.1}}}",
        one * 1e6,
        flops / one / 1e12
    );
    Ok(())
}

/// Copies to and from page-locked memory, alone and beside a product.
fn copies(driver: &Driver) -> Result<()> {
    let gpu = driver.gpu();
    let bytes = 256 << 20;
    let mut pinned = Pinned::new(&gpu, bytes)?;
    let buffer = filled(&gpu, bytes)?;
    let weights = Weights::repeated(&gpu, (2 * FFN, HIDDEN), &bfloats(1 << 20))?;
    let (x, out) = (gpu.upload(&bfloats(4096 * HIDDEN))?, gpu.alloc(4096 * 2 * FFN * 4)?);
    let mut time = |beside: usize, is_fetch: bool| -> Result<(f64, f64)> {
        driver.synchronize()?;
        let start = Instant::now();
        let taken = std::mem::replace(&mut pinned, Pinned::new(&gpu, 16)?);
        let pending = if is_fetch {
            aside::fetch(&[(&buffer, 0, bytes)], taken)?
        } else {
            aside::send(taken, &[(&buffer, 0, bytes)])?
        };
        for _ in 0..beside {
            weights.multiply(&x, 4096, &out, Into::F32)?;
        }
        let done = pending.wait()?;
        let copied = start.elapsed().as_secs_f64();
        pinned = done;
        driver.synchronize()?;
        Ok((copied, start.elapsed().as_secs_f64()))
    };
    for is_fetch in [true, false] {
        for beside in [0, 0, 20] {
            let (copied, all) = time(beside, is_fetch)?;
            println!(
                "{{\"copy\": \"{}\", \"products_beside\": {beside}, \"gb_s\": {:.1}, \"all_ms\": {:.2}}}",
                if is_fetch { "fetch" } else { "send" },
                bytes as f64 / copied / 1e9,
                all * 1e3
            );
        }
    }
    let start = Instant::now();
    for _ in 0..20 {
        weights.multiply(&x, 4096, &out, Into::F32)?;
    }
    driver.synchronize()?;
    println!(
        "{{\"copy\": \"none\", \"products_beside\": 20, \"all_ms\": {:.2}}}",
        start.elapsed().as_secs_f64() * 1e3
    );
    Ok(())
}
