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
