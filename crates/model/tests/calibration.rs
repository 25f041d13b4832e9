//! Calibration files: what is written is read back, and what is none is refused.

use half::f16;
use mosaickv_kv::{Calibration, HeadCalibration, KvShape};
use mosaickv_model::calibrate::{CalibrationError, digest, load, save};
use safetensors::SafeTensors;
use sha2::{Digest, Sha256};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

const SHAPE: KvShape = KvShape { layers: 2, heads: 6, kv_heads: 3, head_dim: 16, window: None };

/// A folder, and the file in it.
fn file() -> (TempDir, PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.calibration.safetensors");
    (folder, path)
}

fn calibration() -> Calibration {
    let matrix = |seed: usize| -> Box<[f16]> {
        (0..16 * 16).map(|i| f16::from_f32(((i * 37 + seed * 11) % 97) as f32 / 32.0 - 1.5)).collect()
    };
    let head = |h: usize| HeadCalibration {
        keys: matrix(4 * h),
        queries: matrix(4 * h + 1),
        values: matrix(4 * h + 2),
        outputs: matrix(4 * h + 3),
    };
    Calibration { heads: (0..6).map(head).collect(), layer_weights: vec![0.75, 1.25] }
}

/// Why the file can't be used, which nothing but that says.
fn refused(path: &Path, shape: KvShape, says: &[&str]) {
    let error = load(path, shape).unwrap_err();
    assert!(matches!(error, CalibrationError::Unusable { .. }), "{error}");
    let error = error.to_string();
    for word in says {
        assert!(error.contains(word), "no `{word}` in: {error}");
    }
}

/// The same file with some bytes changed wherever they are.
fn changed(bytes: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    assert_eq!(from.len(), to.len());
    let mut bytes = bytes.to_vec();
    let at = bytes.windows(from.len()).position(|window| window == from).expect("what is to be changed");
    bytes[at..at + to.len()].copy_from_slice(to);
    bytes
}

#[test]
fn what_is_saved_is_loaded() {
    let ((_folder, path), want) = (file(), calibration());
    save(&want, &path).unwrap();
    let got = load(&path, SHAPE).unwrap();
    assert_eq!(got, want);
    assert_eq!(digest(&got), digest(&want));
    let mut other = want;
    other.layer_weights[1] = 1.26;
    assert_ne!(digest(&got), digest(&other));
}

#[test]
fn a_file_that_is_no_calibration_of_this_model_is_refused() {
    let (_folder, path) = file();
    save(&calibration(), &path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    refused(&path, KvShape { layers: 3, ..SHAPE }, &["[6, 16, 16]", "[9, 16, 16]", "of this model"]);
    refused(&path, KvShape { kv_heads: 6, ..SHAPE }, &["[12, 16, 16]"]);
    refused(&path, KvShape { head_dim: 32, ..SHAPE }, &["[6, 32, 32]"]);

    let written = |bytes: &[u8], says: &[&str]| {
        std::fs::write(&path, bytes).unwrap();
        refused(&path, SHAPE, &[&["model.calibration.safetensors", "make one with"], says].concat());
    };
    written(&changed(&whole, b"mosaickv-layered-1", b"mosaickv-layered-9"), &["layered-9", "layered-1"]);
    let last = whole.len() - 1;
    let mut damaged = whole.clone();
    damaged[last] ^= 1;
    written(&damaged, &["SHA-256", "damaged"]);
    for length in [0, 7, 100, whole.len() / 2, last] {
        written(&whole[..length], &["a safetensors file"]);
    }
    written(&changed(&whole, b"outputs", b"putouts"), &["outputs", "all five tensors"]);
    written(b"this is no calibration, however long", &["a safetensors file"]);
    // A header of more bytes than there are.
    written(&[&u64::MAX.to_le_bytes()[..], &whole[8..]].concat(), &["a safetensors file"]);
    written(&[&(1u64 << 40).to_le_bytes()[..], &whole[8..]].concat(), &["a safetensors file"]);
}

#[test]
fn numbers_that_are_not_finite_are_neither_saved_nor_loaded() {
    let (_folder, path) = file();
    let mut none = calibration();
    none.heads[4].values[17] = f16::INFINITY;
    let error = save(&none, &path).unwrap_err();
    assert!(matches!(error, CalibrationError::NotFinite { .. }) && !path.exists(), "{error}");
    none = calibration();
    none.layer_weights[0] = 0.0;
    assert!(save(&none, &path).is_err() && !path.exists());

    // With a checksum that is right.
    save(&calibration(), &path).unwrap();
    let whole = std::fs::read(&path).unwrap();
    let file = SafeTensors::deserialize(&whole).unwrap();
    let mut hash = Sha256::new();
    for name in ["keys", "queries", "values", "outputs"] {
        hash.update(file.tensor(name).unwrap().data());
    }
    hash.update([f32::NAN.to_le_bytes(), 1.25f32.to_le_bytes()].concat());
    let hex = |digest: &[u8]| digest.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let sum = hex(&hash.finalize());
    let bytes = changed(&whole, digest(&calibration()).as_bytes(), sum.as_bytes());
    let weights = [0.75f32.to_le_bytes(), 1.25f32.to_le_bytes()].concat();
    let none = [f32::NAN.to_le_bytes(), 1.25f32.to_le_bytes()].concat();
    std::fs::write(&path, changed(&bytes, &weights, &none)).unwrap();
    refused(&path, SHAPE, &["not finite"]);
}

#[test]
fn no_more_is_read_than_a_calibration_has() {
    let (folder, path) = file();
    save(&calibration(), &path).unwrap();
    // A terabyte without blocks.
    std::fs::OpenOptions::new().write(true).open(&path).unwrap().set_len(1 << 40).unwrap();
    refused(&path, SHAPE, &["more than"]);
    refused(folder.path(), SHAPE, &["no regular file"]);
    let missing = load(&folder.path().join("none"), SHAPE).unwrap_err();
    assert!(matches!(missing, CalibrationError::Io { doing: "read", .. }), "{missing}");
    if cfg!(unix) {
        refused(Path::new("/dev/zero"), SHAPE, &["no regular file"]);
        let pipe = folder.path().join("pipe");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        if made.is_ok_and(|status| status.success()) {
            refused(&pipe, SHAPE, &["no regular file"]);
        }
    }
}
