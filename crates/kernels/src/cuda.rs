//! The same formats on a GPU: attention for one token of each of some sequences, and pages out of vectors; and what the rest of a model's pass
//! needs: products ([`gemm`]), what lies between them ([`dense`]), attention of prompts ([`prefill`]), copies beside the device's work
//! ([`aside`]).
//!
//! The kernels are CUDA C++ in this crate's folder `cuda`. With feature `cuda` they are compiled for GPUs and loaded through the driver at run time
//! (`driver`), with `cuda-emulated` for the host, where tests run them thread by thread (`emulated`). A [`Gpu`] is one or the
//! other; what works with one knows no more of it. What a kernel relies on is checked here, before its launch.
//!
//! A step is a sequence of launches with fixed grids: lengths, tables and counts are read from the device's memory, so that a [`Graph`] asks
//! for it as a whole for every token.

pub mod aside;
pub mod check;
pub mod dense;
mod device;
#[cfg(feature = "cuda")]
pub mod driver;
#[cfg(emulated)]
mod emulated;
pub mod encode;
pub mod exact;
pub mod gemm;
mod graph;
pub mod layered;
pub mod packed;
pub(crate) mod parameters;
pub mod prefill;

pub use aside::{Pending, Pinned};
pub use device::{Buffer, Device, Error, Gpu, Kernel, Piece};
pub use graph::{Asked, Captured, Graph, Tape};

/// An emulated GPU of so many multiprocessors, for tests; `None` where kernels are not compiled for the host, as the build says.
#[cfg(feature = "cuda-emulated")]
pub fn emulated(multiprocessors: usize) -> Option<Gpu> {
    #[cfg(emulated)]
    return Some(emulated::Emulated::gpu(multiprocessors));
    #[cfg(not(emulated))]
    {
        eprintln!(
            "SKIPPED: no GPU of {multiprocessors} multiprocessors: that takes x86-64, Linux and a C++ compiler"
        );
        None
    }
}

/// Most query heads of a KV head.
pub const MOST_ROWS: usize = 8;

/// Most KV heads of all sequences of a step.
pub const MOST_HEADS: usize = 512;

/// Parts that a head is cut into, at most: with 8 KV heads about two for each block that an H100 holds.
pub const PARTS: usize = 198;

/// The sizes of a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Shape {
    /// `B`
    pub sequences: usize,
    /// `G`
    pub kv_heads: usize,
    /// `R`, query heads of a KV head; 1 to 8.
    pub rows: usize,
    /// `D`, 64 or 128.
    pub head_dim: usize,
}

impl Shape {
    /// `B * G`
    pub fn heads(&self) -> usize {
        self.sequences * self.kv_heads
    }

    /// Query heads of all sequences, `B * G * R`.
    pub fn queries(&self) -> usize {
        self.heads() * self.rows
    }

    fn check(&self) {
        assert!(
            (1..=MOST_ROWS).contains(&self.rows) && (1..=MOST_HEADS).contains(&self.heads()),
            "{self:?}: wanted 1 to {MOST_ROWS} rows and at most {MOST_HEADS} KV heads of all sequences"
        );
        assert!(matches!(self.head_dim, 64 | 128), "head_dim {}, wanted 64 or 128", self.head_dim);
    }

    /// One of two kernels.
    fn pick(&self, of_64: Kernel, of_128: Kernel) -> Kernel {
        of_width([of_64, of_128], self.head_dim)
    }

    /// Panics where `queries` are not `[B, G, R, D]` as f16.
    fn check_queries(&self, queries: &Buffer) {
        let wanted = self.queries() * self.head_dim * 2;
        assert!(queries.bytes() >= wanted, "{} bytes of queries, wanted {wanted}", queries.bytes());
    }

    /// Panics where `out` has no room for `[B, G, R, D]` as f32.
    fn check_outputs(&self, out: &Buffer) {
        let wanted = self.queries() * self.head_dim * 4;
        assert!(out.bytes() >= wanted, "{} bytes of outputs, wanted {wanted}", out.bytes());
    }
}

/// That of two kernels which is for heads of 64 channels, or of 128.
fn of_width(kernels: [Kernel; 2], head_dim: usize) -> Kernel {
    match head_dim {
        64 => kernels[0],
        128 => kernels[1],
        _ => panic!("head_dim {head_dim}, wanted 64 or 128"),
    }
}

/// Attention states of parts of heads, in the device's memory.
#[derive(Debug)]
pub struct States {
    max: Buffer,
    sum: Buffer,
    accumulated: Buffer,
    slots: usize,
}

impl States {
    /// For up to `slots` parts of each head.
    pub fn new(gpu: &Gpu, shape: Shape, slots: usize) -> Result<States, Error> {
        let count = shape.queries() * slots;
        Ok(States {
            max: gpu.alloc(count * 4)?,
            sum: gpu.alloc(count * 4)?,
            accumulated: gpu.alloc(count * 4 * shape.head_dim)?,
            slots,
        })
    }

    fn parameters(&self) -> parameters::States {
        parameters::States {
            max: self.max.address(),
            sum: self.sum.address(),
            accumulated: self.accumulated.address(),
            slots: self.slots as i32,
            unused: 0,
        }
    }

    /// Fills them with what is no number: what a step does not write shows.
    pub fn poison(&self) -> Result<(), Error> {
        [&self.max, &self.sum, &self.accumulated].into_iter().try_for_each(Buffer::poison)
    }
}
