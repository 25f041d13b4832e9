//! KV-cache formats and attention over them, as plain functions over slices.
//!
//! The only crate of the workspace with `unsafe` and CPU features. It knows no model, no request and no cache
//! policy. Shape letters: `H` query heads, `G` KV heads, `T` tokens, `D` head_dim; `[T, D]` is row-major.

pub mod activation;
pub mod cuda;
pub mod exact;
pub mod isa;
pub mod layered;
pub mod matrix;
pub mod oracle;
pub mod packed;
pub mod pool;
pub mod rotate;
pub mod rows;
pub mod saved;
pub mod select;
pub mod state;
pub mod stream;

mod simd;

pub use isa::Isa;
pub use pool::Pool;
pub use state::AttnState;

/// Whether no number is NaN or infinite.
pub fn all_finite(x: &[f32]) -> bool {
    // Counted piece by piece, which a CPU does side by side.
    x.chunks(1024).all(|some| some.iter().fold(0u32, |not, x| not + u32::from(!x.is_finite())) == 0)
}

#[test]
fn one_number_that_is_not_finite_is_found_anywhere() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        for place in [0, 1023, 1024, 2050] {
            let mut x = vec![1.0; 2051];
            assert!(all_finite(&x));
            x[place] = bad;
            assert!(!all_finite(&x), "{bad} at {place}");
        }
    }
    assert!(all_finite(&[]));
}
