//! Every block type, instruction set and odd size against a dequantizer and a product in f64.

use super::*;
use half::{bf16, f16};

const TYPES: [BlockType; 11] = [
    BlockType::F32,
    BlockType::F16,
    BlockType::Bf16,
    BlockType::Q4_0,
    BlockType::Q4_1,
    BlockType::Q5_0,
    BlockType::Q5_1,
    BlockType::Q8_0,
    BlockType::Q4K,
    BlockType::Q5K,
    BlockType::Q6K,
];

/// Numbers that look random and are the same every time (splitmix64).
struct Numbers(u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ self.0 >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// In -1..1.
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 23) as f32 - 1.0
    }

    fn activations(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.unit() * if self.next().is_multiple_of(37) { 20.0 } else { 1.0 }).collect()
    }
}

/// Where a quantized block keeps its f16 numbers.
fn half_offsets(ty: BlockType) -> &'static [usize] {
    match ty {
        BlockType::F32 | BlockType::F16 | BlockType::Bf16 => &[],
        BlockType::Q4_0 | BlockType::Q5_0 | BlockType::Q8_0 => &[0],
        BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[0, 2],
        BlockType::Q6K => &[208],
    }
}

/// Any bytes are codes; only the floats are chosen.
fn random_block(ty: BlockType, numbers: &mut Numbers) -> Vec<u8> {
    match ty {
        BlockType::F32 => numbers.unit().to_le_bytes().to_vec(),
        BlockType::F16 => f16::from_f32(numbers.unit()).to_le_bytes().to_vec(),
        BlockType::Bf16 => bf16::from_f32(numbers.unit()).to_le_bytes().to_vec(),
        _ => {
            let mut bytes: Vec<u8> = (0..ty.block_bytes()).map(|_| numbers.next() as u8).collect();
            for &at in half_offsets(ty) {
                bytes[at..at + 2].copy_from_slice(&f16::from_f32(0.1 * numbers.unit()).to_le_bytes());
            }
            bytes
        }
    }
}

fn random_blocks(ty: BlockType, rows: usize, cols: usize, numbers: &mut Numbers) -> Vec<u8> {
    (0..rows * cols / ty.block_elements()).flat_map(|_| random_block(ty, numbers)).collect()
}

fn half(b: &[u8], at: usize) -> f64 {
    f16::from_le_bytes([b[at], b[at + 1]]).to_f64()
}

/// ggml's `get_scale_min_k4`.
fn scale_min(j: usize, q: &[u8]) -> (f64, f64) {
    if j < 4 {
        (f64::from(q[j] & 63), f64::from(q[j + 4] & 63))
    } else {
        (
            f64::from((q[j + 4] & 0xf) | ((q[j - 4] >> 6) << 4)),
            f64::from((q[j + 4] >> 4) | ((q[j] >> 6) << 4)),
        )
    }
}

/// One block as ggml's `dequantize_row_*` reads it, in f64.
fn dequantize(ty: BlockType, b: &[u8]) -> Vec<f64> {
    let mut y = vec![0.0; ty.block_elements()];
    match ty {
        BlockType::F32 => y[0] = f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])),
        BlockType::F16 => y[0] = half(b, 0),
        BlockType::Bf16 => y[0] = f64::from(f32::from_bits(u32::from(b[1]) << 24 | u32::from(b[0]) << 16)),
        BlockType::Q4_0 => {
            for j in 0..16 {
                y[j] = (f64::from(b[2 + j] & 0xf) - 8.0) * half(b, 0);
                y[j + 16] = (f64::from(b[2 + j] >> 4) - 8.0) * half(b, 0);
            }
        }
        BlockType::Q4_1 => {
            for j in 0..16 {
                y[j] = f64::from(b[4 + j] & 0xf) * half(b, 0) + half(b, 2);
                y[j + 16] = f64::from(b[4 + j] >> 4) * half(b, 0) + half(b, 2);
            }
        }
        BlockType::Q5_0 | BlockType::Q5_1 => {
            let at = if ty == BlockType::Q5_0 { 2 } else { 4 };
            let qh = u32::from_le_bytes([b[at], b[at + 1], b[at + 2], b[at + 3]]);
            for j in 0..16 {
                let q = b[at + 4 + j];
                let low = u32::from(q & 0xf) | ((qh >> j) << 4) & 0x10;
                let high = u32::from(q >> 4) | (qh >> (j + 12)) & 0x10;
                for (i, code) in [(j, low), (j + 16, high)] {
                    y[i] = if ty == BlockType::Q5_0 {
                        (f64::from(code) - 16.0) * half(b, 0)
                    } else {
                        f64::from(code) * half(b, 0) + half(b, 2)
                    };
                }
            }
        }
        BlockType::Q8_0 => {
            for j in 0..32 {
                y[j] = f64::from(b[2 + j] as i8) * half(b, 0);
            }
        }
        BlockType::Q4K | BlockType::Q5K => {
            let (d, min, scales) = (half(b, 0), half(b, 2), &b[4..16]);
            let five = ty == BlockType::Q5K;
            let qs = if five { &b[48..] } else { &b[16..] };
            for j in 0..4 {
                let ((s1, m1), (s2, m2)) = (scale_min(2 * j, scales), scale_min(2 * j + 1, scales));
                for l in 0..32 {
                    let fifth = |mask: u8| if five && b[16 + l] & mask != 0 { 16.0 } else { 0.0 };
                    let low = f64::from(qs[32 * j + l] & 0xf) + fifth(1 << (2 * j));
                    let high = f64::from(qs[32 * j + l] >> 4) + fifth(2 << (2 * j));
                    y[64 * j + l] = d * s1 * low - min * m1;
                    y[64 * j + 32 + l] = d * s2 * high - min * m2;
                }
            }
        }
        BlockType::Q6K => {
            for n in 0..2 {
                let (ql, qh, sc) = (&b[64 * n..], &b[128 + 32 * n..], &b[192 + 8 * n..]);
                for l in 0..32 {
                    let codes = [
                        (ql[l] & 0xf) | ((qh[l] & 3) << 4),
                        (ql[l + 32] & 0xf) | (((qh[l] >> 2) & 3) << 4),
                        (ql[l] >> 4) | (((qh[l] >> 4) & 3) << 4),
                        (ql[l + 32] >> 4) | (((qh[l] >> 6) & 3) << 4),
                    ];
                    for (i, code) in codes.into_iter().enumerate() {
                        let scale = half(b, 208) * f64::from(sc[l / 16 + 2 * i] as i8);
                        y[128 * n + 32 * i + l] = scale * (f64::from(code) - 32.0);
                    }
                }
            }
        }
    }
    y
}

fn dequantize_all(ty: BlockType, bytes: &[u8]) -> Vec<f64> {
    bytes.chunks_exact(ty.block_bytes()).flat_map(|b| dequantize(ty, b)).collect()
}

/// What the activations of a quantized product are: 8 bits by spans of 32.
fn eight_bits(x: &[f32]) -> Vec<f64> {
    x.chunks(32)
        .flat_map(|span| {
            let peak = span.iter().fold(0.0f32, |m, x| m.max(x.abs()));
            span.iter().map(move |x| {
                if peak == 0.0 {
                    0.0
                } else {
                    f64::from((x * (127.0 / peak)).round_ties_even() * (peak / 127.0))
                }
            })
        })
        .collect()
}

/// For one row and one token: the product, and the sum of the absolute products.
fn product(w: &[f64], x: &[f64]) -> (f64, f64) {
    w.iter().zip(x).fold((0.0, 0.0), |(sum, size), (w, x)| (sum + w * x, size + (w * x).abs()))
}

/// Rows and columns to try.
fn shapes(ty: BlockType) -> Vec<(usize, usize)> {
    match ty.block_elements() {
        1 => vec![(1, 1), (17, 33), (40, 100), (150, 40)],
        32 => vec![(1, 32), (17, 96), (40, 160), (150, 1120)],
        _ => vec![(1, 256), (17, 768), (150, 1280)],
    }
}

#[test]
fn rows_are_what_the_format_says() {
    let mut numbers = Numbers(1);
    for ty in TYPES {
        for (rows, cols) in shapes(ty) {
            let bytes = random_blocks(ty, rows, cols, &mut numbers);
            let matrix = Matrix::from_blocks(ty, rows, cols, &bytes).unwrap();
            assert_eq!((matrix.rows(), matrix.cols(), matrix.block_type()), (rows, cols, ty));
            let want = dequantize_all(ty, &bytes);
            let mut row = vec![0.0; cols];
            for (r, want) in want.chunks_exact(cols).enumerate() {
                matrix.row(r, &mut row);
                for (c, (got, want)) in row.iter().zip(want).enumerate() {
                    assert_eq!(*got, *want as f32, "{ty:?} {rows}x{cols} at [{r}, {c}]");
                }
            }
        }
    }
}

fn check_products(ty: BlockType, rows: usize, cols: usize, tokens: usize, numbers: &mut Numbers) {
    for precision in [Precision::EightBits, Precision::Full] {
        check_precision(precision, ty, (rows, cols, tokens), numbers);
    }
}

fn check_precision(
    precision: Precision,
    ty: BlockType,
    (rows, cols, tokens): (usize, usize, usize),
    numbers: &mut Numbers,
) {
    let bytes = random_blocks(ty, rows, cols, numbers);
    let matrix = Matrix::from_blocks(ty, rows, cols, &bytes).unwrap();
    let w = dequantize_all(ty, &bytes);
    let x = numbers.activations(tokens * cols);
    let exact: Vec<f64> = x.iter().map(|&x| f64::from(x)).collect();
    let quantized = precision == Precision::EightBits && ty.block_elements() > 1;
    let used = if quantized { x.chunks(cols).flat_map(eight_bits).collect() } else { exact.clone() };
    let pool = Pool::new(2);
    for &isa in Isa::available() {
        let [out] = multiply_each(precision, isa, &pool, &x, [&matrix]);
        assert_eq!(out.len(), tokens * rows, "{precision:?} {ty:?} {rows}x{cols}");
        for (i, got) in out.iter().enumerate() {
            let (t, r) = (i / rows, i % rows);
            let (w, at) = (&w[r * cols..][..cols], t * cols..(t + 1) * cols);
            let what =
                format!("{precision:?} {ty:?} {rows}x{cols}, {} at [{t} of {tokens}, {r}]", isa.name());
            // Codes above zero and minima below it cancel: rounding goes with their sizes, not the weights'.
            let (want, size) = product(w, &used[at.clone()]);
            let off = (f64::from(*got) - want).abs();
            assert!(off <= 1e-5 * (size + 1.0), "{what}: {got}, not {want}");
            // The stated bound: half a step of each activation.
            let (want, size) = product(w, &exact[at.clone()]);
            let bound: f64 = if quantized { activation_bound(w, &x[at]) } else { 0.0 };
            let off = (f64::from(*got) - want).abs();
            assert!(off <= bound * 1.0001 + 1e-5 * (size + 1.0), "{what}: {off} over the bound {bound}");
        }
    }
}

fn activation_bound(w: &[f64], x: &[f32]) -> f64 {
    let spans = w.chunks(32).zip(x.chunks(32));
    spans
        .map(|(w, x)| {
            let peak = f64::from(x.iter().fold(0.0f32, |m, x| m.max(x.abs())));
            w.iter().map(|w| w.abs()).sum::<f64>() * peak / 254.0
        })
        .sum()
}

#[test]
fn products_match_the_oracle_for_one_token() {
    let mut numbers = Numbers(2);
    for ty in TYPES {
        for (rows, cols) in shapes(ty) {
            check_products(ty, rows, cols, 1, &mut numbers);
        }
    }
}

#[test]
fn products_match_the_oracle_for_few_and_many_tokens() {
    let mut numbers = Numbers(3);
    for ty in TYPES {
        for (rows, cols) in shapes(ty) {
            for tokens in [2, 5, 7, 9, 40] {
                check_products(ty, rows, cols, tokens, &mut numbers);
            }
        }
        let (rows, cols) = shapes(ty)[1];
        check_products(ty, rows, cols, 130, &mut numbers);
    }
}

#[test]
fn extreme_codes_do_not_overflow() {
    for ty in TYPES.into_iter().filter(|ty| ty.block_elements() > 1) {
        for fill in [0x00, 0x7f, 0x80, 0xff] {
            let mut block = vec![fill; ty.block_bytes()];
            for &at in half_offsets(ty) {
                block[at..at + 2].copy_from_slice(&f16::ONE.to_le_bytes());
            }
            let matrix = Matrix::from_blocks(ty, 1, ty.block_elements(), &block).unwrap();
            let w = dequantize(ty, &block);
            for sign in [1.0, -1.0] {
                let x = vec![sign; w.len()];
                let want = sign * w.iter().sum::<f64>() as f32;
                for &isa in Isa::available() {
                    let out = multiply(&matrix, isa, 1, &x);
                    let scale = w.iter().map(|w| w.abs()).sum::<f64>() as f32;
                    assert!(
                        (out[0] - want).abs() <= 1e-5 * scale,
                        "{ty:?} {fill:#x} {}: {out:?}",
                        isa.name()
                    );
                }
            }
        }
    }
}

fn multiply(matrix: &Matrix, isa: Isa, threads: usize, x: &[f32]) -> Vec<f32> {
    let [out] = multiply_each(Precision::EightBits, isa, &Pool::new(threads), x, [matrix]);
    out
}

#[test]
fn neither_threads_nor_company_change_a_result() {
    let mut numbers = Numbers(4);
    for ty in TYPES {
        let (rows, cols) = (200, 512);
        let matrix =
            Matrix::from_blocks(ty, rows, cols, &random_blocks(ty, rows, cols, &mut numbers)).unwrap();
        for &isa in Isa::available() {
            for tokens in [0, 1, 2, 4, 7, 33] {
                let x = numbers.activations(tokens * cols);
                let (one, three) = (multiply(&matrix, isa, 1, &x), multiply(&matrix, isa, 3, &x));
                assert_eq!(one, three, "{ty:?} {} {tokens} tokens", isa.name());
                let [a, b] = multiply_each(Precision::EightBits, isa, &Pool::new(3), &x, [&matrix; 2]);
                assert!(a == one && b == one, "{ty:?} {} {tokens} tokens in company", isa.name());
                // Plain floats in larger numbers go through `gemm`, which adds in another order.
                if tokens <= FEW_DOTS || ty.block_elements() > 1 {
                    for (x, want) in x.chunks(cols).zip(one.chunks(rows)) {
                        let alone = multiply(&matrix, isa, 1, x);
                        assert_eq!(alone, want, "{ty:?} {} a token alone", isa.name());
                    }
                }
            }
        }
    }
}

#[test]
fn matrices_of_several_types_share_activations() {
    let mut numbers = Numbers(5);
    let mut rows = 3;
    let matrices = TYPES.map(|ty| {
        rows += 20;
        Matrix::from_blocks(ty, rows, 256, &random_blocks(ty, rows, 256, &mut numbers)).unwrap()
    });
    for tokens in [1, 20] {
        let x = numbers.activations(tokens * 256);
        let outs =
            multiply_each(Precision::EightBits, Isa::current(), &Pool::new(2), &x, matrices.each_ref());
        for (matrix, got) in matrices.iter().zip(outs) {
            assert_eq!(got.len(), tokens * matrix.rows(), "{:?}", matrix.block_type());
            assert_eq!(got, multiply(matrix, Isa::current(), 1, &x), "{:?}", matrix.block_type());
        }
    }
}

#[test]
fn damaged_tensors_are_errors() {
    for ty in TYPES {
        let (rows, cols) = (3, 2 * ty.block_elements());
        let good = random_blocks(ty, rows, cols, &mut Numbers(6));
        let result = |rows, cols, bytes: &[u8]| Matrix::from_blocks(ty, rows, cols, bytes).map(|_| ());
        assert_eq!(result(rows, cols, &good), Ok(()));
        let (wanted, got) = (good.len(), good.len() - 1);
        assert_eq!(result(rows, cols, &good[1..]), Err(MatrixError::Bytes { ty, rows, cols, wanted, got }));
        assert_eq!(result(0, cols, &[]), Err(MatrixError::Shape { rows: 0, cols }));
        assert_eq!(result(rows, 0, &[]), Err(MatrixError::Shape { rows, cols: 0 }));
        assert!(matches!(result(usize::MAX, cols, &good), Err(MatrixError::Shape { .. })));
        if ty.block_elements() > 1 {
            assert!(matches!(result(rows, cols - 1, &good), Err(MatrixError::Columns { .. })));
        }
        let floats: Vec<(usize, Vec<u8>)> = match ty {
            BlockType::F32 => vec![(0, f32::NAN.to_le_bytes().to_vec())],
            BlockType::Bf16 => vec![(0, bf16::INFINITY.to_le_bytes().to_vec())],
            BlockType::F16 => vec![(0, f16::NAN.to_le_bytes().to_vec())],
            _ => half_offsets(ty).iter().map(|&at| (at, f16::INFINITY.to_le_bytes().to_vec())).collect(),
        };
        for (at, float) in floats {
            let mut bad = good.clone();
            let at = 2 * 2 * ty.block_bytes() + at; // the first block of row 2
            bad[at..at + float.len()].copy_from_slice(&float);
            assert_eq!(result(rows, cols, &bad), Err(MatrixError::NotFinite { row: 2 }), "{ty:?}");
        }
    }
}

#[test]
fn bad_activations_show_in_every_product() {
    let mut numbers = Numbers(7);
    for ty in TYPES {
        let matrix = Matrix::from_blocks(ty, 5, 256, &random_blocks(ty, 5, 256, &mut numbers)).unwrap();
        for bad in [f32::NAN, f32::INFINITY] {
            for &isa in Isa::available() {
                let mut x = numbers.activations(256);
                x[77] = bad;
                let out = multiply(&matrix, isa, 1, &x);
                assert_eq!(out.len(), 5);
                assert!(out.iter().all(|y| !y.is_finite()), "{ty:?} {} {bad}: {out:?}", isa.name());
            }
        }
    }
}

#[test]
fn the_packed_bytes_are_the_files() {
    for (ty, percent) in [
        (BlockType::Q4_0, 0),
        (BlockType::Q4_1, 0),
        (BlockType::Q5_0, 0),
        (BlockType::Q5_1, 0),
        (BlockType::Q8_0, 0),
        (BlockType::Q4K, 3),
        (BlockType::Q5K, 3),
        (BlockType::Q6K, 0),
        (BlockType::F16, 0),
    ] {
        let bytes = random_blocks(ty, 64, 512, &mut Numbers(8));
        let matrix = Matrix::from_blocks(ty, 64, 512, &bytes).unwrap();
        let more = matrix.bytes() as f64 / bytes.len() as f64 - 1.0;
        assert!((0.0..=f64::from(percent) / 100.0).contains(&more), "{ty:?}: {more} more than the file");
    }
}
