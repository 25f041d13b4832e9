//! What the layered format must know of a model: learnt from a few documents, and kept in a file beside the model.

use crate::forward::Forward;
use crate::sequence::ForwardError;
use crate::weights::{Layer, Model};
use half::f16;
use mosaickv_kernels::matrix::Precision;
use mosaickv_kernels::rotate::gram;
use mosaickv_kernels::{Isa, Pool};
use mosaickv_kv::{Calibration, HeadCalibration, KvCache, KvFormat, KvShape, Moments};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use sha2::{Digest, Sha256};
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::path::Path;

/// What the file's numbers mean: changes when files of before can't be used any more.
const CODEC: &str = "mosaickv-layered-1";

/// Queries of a document that are counted: every so many-th.
const QUERY_STRIDE: usize = 4;

/// Tokens of a document that say nothing of the others.
const FIRST: usize = 8;

/// Changes when the same documents give other numbers for another reason than one of the constants here.
const LEARNING: u32 = 1;

/// What the numbers depend on beside model and documents, as a text that changes with it.
pub fn recipe() -> String {
    let ridge = Calibration::RIDGE;
    format!("{CODEC} {LEARNING}: one query in {QUERY_STRIDE} from token {FIRST} on, ridge {ridge}")
}

/// Learns from documents of tokens, each of at most the model's context. `progress` is called with layers done and layers in all.
pub fn calibrate(
    model: &Model,
    pool: &Pool,
    documents: &[Vec<u32>],
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Calibration, ForwardError> {
    let shape = model.kv_shape();
    let mut moments = vec![Moments::new(shape.head_dim); shape.layers * shape.kv_heads];
    let mut squares = vec![Vec::new(); shape.layers];
    let pass = Forward { model, pool, isa: Isa::current(), precision: Precision::EightBits };
    for (i, tokens) in documents.iter().enumerate() {
        let mut cache = KvCache::new(shape, KvFormat::Exact)?;
        pass.layers(tokens, 0..tokens.len(), &mut |l, projected, out| {
            cache.append(pool, l, &projected.keys, &projected.values)?;
            cache.attend(pool, l, &projected.queries, out);
            let rows = projected.residual.chunks_exact(model.config.hidden).skip(FIRST);
            squares[l].extend(rows.map(|row| row.iter().map(|x| x * x).sum::<f32>()));
            let of_layer = &mut moments[l * shape.kv_heads..][..shape.kv_heads];
            pool.for_each(of_layer, |g, moments| {
                let head = KvHead { shape, g };
                let keys = head.rows(&projected.keys, (shape.kv_heads, 1), 1);
                let values = head.rows(&projected.values, (shape.kv_heads, 1), 1);
                let queries = head.rows(&projected.queries, (shape.heads, shape.group()), QUERY_STRIDE);
                moments.add(&keys, &values, &queries);
            });
            progress(i * shape.layers + l + 1, documents.len() * shape.layers);
            Ok(())
        })?;
    }
    let mut heads = vec![None; moments.len()];
    pool.for_each(&mut heads, |i, head| {
        let metric = output_metric(shape, &model.layers[i / shape.kv_heads], i % shape.kv_heads);
        *head = Some(moments[i].learn(&metric));
    });
    let weights: Vec<f32> = squares.iter_mut().map(|squares| 1.0 / median(squares)).collect();
    let mean = weights.iter().sum::<f32>() / weights.len() as f32;
    Ok(Calibration {
        heads: heads.into_iter().flatten().collect(),
        layer_weights: weights.iter().map(|w| w / mean).collect(),
    })
}

struct KvHead {
    shape: KvShape,
    g: usize,
}

impl KvHead {
    /// Its vectors `[N, D]` of `x` `[T, heads, D]`, of which it has `group`, of every `stride`-th token from the ninth on.
    fn rows(&self, x: &[f32], (heads, group): (usize, usize), stride: usize) -> Vec<f32> {
        let d = self.shape.head_dim;
        let rows = x.chunks_exact(heads * d).skip(FIRST).step_by(stride);
        rows.flat_map(|row| &row[self.g * group * d..][..group * d]).copied().collect()
    }
}

/// The mean over the group's heads of W_o^T W_o, `[D, D]`.
fn output_metric(shape: KvShape, layer: &Layer, g: usize) -> Vec<f64> {
    let (d, group) = (shape.head_dim, shape.group());
    let mut row = vec![0.0; shape.heads * d];
    let mut rows = Vec::with_capacity(layer.wo.rows() * group * d);
    for r in 0..layer.wo.rows() {
        layer.wo.row(r, &mut row);
        rows.extend_from_slice(&row[g * group * d..][..group * d]);
    }
    gram(&rows, d).into_iter().map(|x| f64::from(x) / group as f64).collect()
}

fn median(x: &mut [f32]) -> f32 {
    let middle = x.len() / 2;
    if x.is_empty() { 1.0 } else { x.select_nth_unstable_by(middle, f32::total_cmp).1.max(f32::MIN_POSITIVE) }
}

/// Why a calibration file can't be used, or not be written.
#[derive(Debug, thiserror::Error)]
pub enum CalibrationError {
    /// No such file, or no access.
    #[error("cannot {doing} the calibration {path}: {source}")]
    Io {
        /// Reading or writing.
        doing: &'static str,
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// It is none, or damaged, or of another model or version.
    #[error(
        "the calibration {path} cannot be used: {got}, wanted {wanted}; make one with `mosaickv calibrate`"
    )]
    Unusable {
        /// Which file.
        path: String,
        /// What is there.
        got: String,
        /// What should be.
        wanted: String,
    },
    /// One that nobody could use is not written.
    #[error(
        "the calibration {path} is not written: it has numbers that are not finite, or weights of layers not above 0; learn \
         from other texts, or check the model"
    )]
    NotFinite {
        /// Which file.
        path: String,
    },
}

/// Names of the tensors, each `[L * G, D, D]`.
const NAMES: [&str; 4] = ["keys", "queries", "values", "outputs"];

/// The bytes of the tensors `NAMES`, and of the layers' weights.
fn parts(calibration: &Calibration) -> Vec<Vec<u8>> {
    let of_heads =
        |i: usize| calibration.heads.iter().flat_map(move |head: &HeadCalibration| head.matrices()[i]);
    let mut parts: Vec<Vec<u8>> =
        (0..NAMES.len()).map(|i| of_heads(i).flat_map(|x| x.to_le_bytes()).collect()).collect();
    parts.push(calibration.layer_weights.iter().flat_map(|x| x.to_le_bytes()).collect());
    parts
}

/// The SHA-256 of a calibration's numbers, in hexadecimal: what its file says too.
pub fn digest(calibration: &Calibration) -> String {
    checksum(&parts(calibration))
}

/// Writes a calibration as safetensors, with the codec's name and a checksum of the numbers in its metadata.
pub fn save(calibration: &Calibration, path: &Path) -> Result<(), CalibrationError> {
    let name = || path.display().to_string();
    if !calibration.is_finite() {
        return Err(CalibrationError::NotFinite { path: name() });
    }
    let count = calibration.heads.len();
    let d = calibration.head_dim().unwrap_or(0);
    let parts = parts(calibration);
    let shape = vec![count, d, d];
    let weights = vec![calibration.layer_weights.len()];
    let views = parts.iter().enumerate().map(|(i, bytes)| match NAMES.get(i) {
        Some(name) => (*name, TensorView::new(Dtype::F16, shape.clone(), bytes)),
        None => ("layer_weights", TensorView::new(Dtype::F32, weights.clone(), bytes)),
    });
    let views: Vec<_> = views.map(|(name, view)| (name, view.expect("bytes of the shape"))).collect();
    let metadata =
        HashMap::from([("codec".to_owned(), CODEC.to_owned()), ("sha256".to_owned(), checksum(&parts))]);
    let bytes =
        safetensors::serialize(views, Some(metadata)).expect("tensors of one file have different names");
    let io = |source| CalibrationError::Io { doing: "write", path: name(), source };
    std::fs::write(path, bytes).map_err(io)
}

/// Reads what [`save`] wrote, for a model of this shape.
pub fn load(path: &Path, shape: KvShape) -> Result<Calibration, CalibrationError> {
    let name = || path.display().to_string();
    let unusable =
        |got: String, wanted: &str| CalibrationError::Unusable { path: name(), got, wanted: wanted.into() };
    let (heads, d) = (shape.layers * shape.kv_heads, shape.head_dim);
    // The numbers and a header: nothing larger is read.
    let most = (heads * d * d * 2 * NAMES.len() + shape.layers * 4 + (1 << 16)) as u64;
    let io = |source| CalibrationError::Io { doing: "read", path: name(), source };
    // Before it is opened: that of a pipe would wait for a writer.
    if !std::fs::metadata(path).map_err(io)?.is_file() {
        return Err(unusable("no regular file".into(), "a safetensors file"));
    }
    let mut bytes = vec![];
    File::open(path).and_then(|file| file.take(most + 1).read_to_end(&mut bytes)).map_err(io)?;
    if bytes.len() as u64 > most {
        return Err(unusable(format!("more than {most} bytes"), "no more than this model needs"));
    }
    let (_, metadata) =
        SafeTensors::read_metadata(&bytes).map_err(|e| unusable(e.to_string(), "a safetensors file"))?;
    let metadata = metadata.metadata().clone().unwrap_or_default();
    if metadata.get("codec").map(String::as_str) != Some(CODEC) {
        return Err(unusable(format!("codec {:?}", metadata.get("codec")), CODEC));
    }
    let file = SafeTensors::deserialize(&bytes).map_err(|e| unusable(e.to_string(), "a safetensors file"))?;
    let tensor = |name: &str, wanted: &[usize], dtype: Dtype| {
        let tensor = file.tensor(name).map_err(|e| unusable(e.to_string(), "all five tensors"))?;
        if tensor.shape() != wanted || tensor.dtype() != dtype {
            let got = format!("{name} {:?} {:?}", tensor.dtype(), tensor.shape());
            return Err(unusable(got, &format!("{dtype:?} {wanted:?}, of this model")));
        }
        Ok(tensor.data().to_vec())
    };
    let mut parts = Vec::with_capacity(NAMES.len() + 1);
    for name in NAMES {
        parts.push(tensor(name, &[heads, d, d], Dtype::F16)?);
    }
    parts.push(tensor("layer_weights", &[shape.layers], Dtype::F32)?);
    let sum = checksum(&parts);
    if metadata.get("sha256") != Some(&sum) {
        return Err(unusable(
            format!("numbers with the SHA-256 {sum}"),
            "those of its metadata: the file is damaged",
        ));
    }
    let halves =
        |part: &[u8]| part.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]])).collect::<Vec<_>>();
    let of: Vec<Vec<f16>> = parts[..NAMES.len()].iter().map(|part| halves(part)).collect();
    let weights = parts[NAMES.len()].chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]]));
    let layer_weights: Vec<f32> = weights.collect();
    let matrix = |i: usize, h: usize| of[i][h * d * d..][..d * d].into();
    let head = |h| HeadCalibration {
        keys: matrix(0, h),
        queries: matrix(1, h),
        values: matrix(2, h),
        outputs: matrix(3, h),
    };
    let calibration = Calibration { heads: (0..heads).map(head).collect(), layer_weights };
    if !calibration.is_finite() {
        return Err(unusable("numbers that are not finite, or weights not above 0".into(), "a calibration"));
    }
    Ok(calibration)
}

fn checksum(parts: &[Vec<u8>]) -> String {
    let mut hash = Sha256::new();
    parts.iter().for_each(|part| hash.update(part));
    hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
}
