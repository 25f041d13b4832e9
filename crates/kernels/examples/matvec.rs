//! How fast are a model's matrix products, next to what the memory could deliver?
//!
//! `cargo run --release -p mosaickv-kernels --example matvec -- [threads] [rounds]`; `MOSAICKV_ISA` picks the
//! instruction set. Every matrix of the model exists, so that weights come from memory as they do in a model.

use mosaickv_kernels::matrix::{BlockType, Matrix, Precision, multiply_each};
use mosaickv_kernels::{Isa, Pool};
use std::hint::black_box;
use std::time::Instant;

/// Sizes of a Llama-like model.
struct Shape {
    name: &'static str,
    layers: usize,
    hidden: usize,
    kv: usize,
    inner: usize,
    /// Rows of the output matrix; 0 to leave it out.
    vocabulary: usize,
}

static SMOLLM2_135M: Shape =
    Shape { name: "SmolLM2-135M", layers: 30, hidden: 576, kv: 192, inner: 1536, vocabulary: 49152 };
/// Two layers of an 8B model: as much as the caches of most CPUs cannot hold.
static LLAMA_8B: Shape =
    Shape { name: "2 layers of Llama 8B", layers: 2, hidden: 4096, kv: 1024, inner: 14336, vocabulary: 0 };

/// The matrices of a layer, in the order of the products.
struct Layer {
    qkv: [Matrix; 3],
    o: Matrix,
    gate_up: [Matrix; 2],
    down: Matrix,
}

struct Model {
    layers: Vec<Layer>,
    head: Option<Matrix>,
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|a| a.parse::<usize>().expect("a number"));
    let pool = Pool::new(arguments.next().unwrap_or(2));
    let rounds = arguments.next().unwrap_or(5);
    let isa = Isa::current();
    println!("{} threads, {}, stream {:.1} GB/s", pool.threads(), isa.name(), stream(&pool));
    decode(isa, &pool, &SMOLLM2_135M, &[BlockType::Q4_1], rounds);
    let types = [BlockType::Q4_0, BlockType::Q5_0, BlockType::Q8_0, BlockType::F16];
    decode(isa, &pool, &SMOLLM2_135M, &types, rounds);
    decode(isa, &pool, &LLAMA_8B, &[BlockType::Q4K, BlockType::Q5K, BlockType::Q6K], rounds);
    for tokens in [2, 4, 8, 9, 12, 16, 32, 128, 512] {
        prefill(isa, &pool, &SMOLLM2_135M, tokens, rounds);
    }
    prefill(isa, &pool, &LLAMA_8B, 512, 1);
}

/// Bytes per second (in 1e9) at which all threads together read memory.
fn stream(pool: &Pool) -> f64 {
    let data = vec![1u64; 32 << 20];
    let chunk = data.len() / 64;
    let seconds = best(5, || {
        pool.run(64, |i| {
            black_box(data[i * chunk..][..chunk].iter().fold(0, |a: u64, b| a.wrapping_add(*b)));
        });
    });
    8.0 * data.len() as f64 / seconds / 1e9
}

fn decode(isa: Isa, pool: &Pool, shape: &Shape, types: &[BlockType], rounds: usize) {
    for &ty in types {
        let model = Model::new(shape, ty);
        let x = model.activations(1);
        let seconds = best(4 * rounds, || model.forward(Precision::EightBits, isa, pool, &x));
        let bytes = model.bytes() as f64;
        println!(
            "{} {ty:?} decode: {:.2} ms, {:.1} MB, {:.1} GB/s",
            shape.name,
            seconds * 1e3,
            bytes / 1e6,
            bytes / seconds / 1e9
        );
    }
}

fn prefill(isa: Isa, pool: &Pool, shape: &Shape, tokens: usize, rounds: usize) {
    let model = Model::new(shape, BlockType::Q4_1);
    let x = model.activations(tokens);
    let flop = 2.0 * tokens as f64 * model.layer_elements() as f64;
    for precision in [Precision::EightBits, Precision::Full] {
        let seconds = best(rounds, || model.forward(precision, isa, pool, &x));
        println!(
            "{} Q4_1 layers, {tokens} tokens, {precision:?}: {:.1} ms, {:.0} tok/s, {:.0} GFLOP/s",
            shape.name,
            seconds * 1e3,
            tokens as f64 / seconds,
            flop / seconds / 1e9
        );
    }
}

fn best(rounds: usize, mut job: impl FnMut()) -> f64 {
    job();
    (0..rounds)
        .map(|_| {
            let start = Instant::now();
            job();
            start.elapsed().as_secs_f64()
        })
        .fold(f64::INFINITY, f64::min)
}

impl Model {
    fn new(shape: &Shape, ty: BlockType) -> Model {
        let (hidden, kv, inner) = (shape.hidden, shape.kv, shape.inner);
        let layers = (0..shape.layers)
            .map(|_| Layer {
                qkv: [hidden, kv, kv].map(|rows| matrix(ty, rows, hidden)),
                o: matrix(ty, hidden, hidden),
                gate_up: [inner, inner].map(|rows| matrix(ty, rows, hidden)),
                down: matrix(ty, hidden, inner),
            })
            .collect();
        let head = (shape.vocabulary > 0).then(|| matrix(ty, shape.vocabulary, hidden));
        Model { layers, head }
    }

    fn matrices(&self) -> impl Iterator<Item = &Matrix> {
        let layers = self.layers.iter();
        layers.flat_map(|l| l.qkv.iter().chain([&l.o, &l.down]).chain(&l.gate_up)).chain(&self.head)
    }

    fn bytes(&self) -> usize {
        self.matrices().map(Matrix::bytes).sum()
    }

    /// Multiplications for each token, the output matrix left out.
    fn layer_elements(&self) -> usize {
        let head = self.head.as_ref().map_or(0, |m| m.rows() * m.cols());
        self.matrices().map(|m| m.rows() * m.cols()).sum::<usize>() - head
    }

    /// `[T, inner]`
    fn activations(&self, tokens: usize) -> Vec<f32> {
        let inner = self.layers[0].down.cols();
        (0..tokens * inner).map(|i| (i % 251) as f32 / 125.0 - 1.0).collect()
    }

    /// All products of one step; the output matrix takes the last token only.
    fn forward(&self, precision: Precision, isa: Isa, pool: &Pool, x: &[f32]) {
        let hidden = self.layers[0].down.rows();
        let narrow = &x[..x.len() / self.layers[0].down.cols() * hidden];
        for layer in &self.layers {
            black_box(multiply_each(precision, isa, pool, narrow, layer.qkv.each_ref()));
            black_box(multiply_each(precision, isa, pool, narrow, [&layer.o]));
            black_box(multiply_each(precision, isa, pool, narrow, layer.gate_up.each_ref()));
            black_box(multiply_each(precision, isa, pool, x, [&layer.down]));
        }
        if let Some(head) = &self.head {
            black_box(multiply_each(precision, isa, pool, &x[..hidden], [head]));
        }
    }
}

/// Weights of any value: bytes below 0x3c are finite halves and floats wherever they stand.
fn matrix(ty: BlockType, rows: usize, cols: usize) -> Matrix {
    let n = rows * cols / ty.block_elements() * ty.block_bytes();
    let bytes: Vec<u8> = (0..n).map(|i| ((i * 2_654_435_761) >> 7) as u8 & 0x3b).collect();
    Matrix::from_blocks(ty, rows, cols, &bytes).expect("bytes of this shape")
}
