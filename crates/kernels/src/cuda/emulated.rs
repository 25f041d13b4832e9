//! The kernels, compiled for the host and run thread by thread, for tests.
//!
//! What that cannot catch, `cuda/emulation.h` says: races, the order of memory accesses, and speed.

use super::aside::Copied;
use super::device::{Device, Error, Gpu, Kernel, Piece, aligned};
use super::gemm::{Into, Product};
use super::graph::{Captured, Tape};
use half::bf16;
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::{Arc, Mutex};

/// A device of this many multiprocessors, each of which holds one block.
#[derive(Clone, Debug)]
pub struct Emulated {
    multiprocessors: usize,
}

/// Bytes that it says it has.
const MEMORY: usize = 16 << 30;

/// The emulation has one state for the whole process.
static LAUNCHES: Mutex<()> = Mutex::new(());

unsafe extern "C" {
    fn mosaickv_emulated_launch(
        name: *const c_char,
        blocks: c_int,
        threads: c_int,
        shared_bytes: usize,
        parameters: *const c_void,
    ) -> c_int;
    fn mosaickv_emulated_alloc(bytes: usize) -> *mut u8;
    fn mosaickv_emulated_free(at: *mut u8, bytes: usize);
}

impl Emulated {
    /// With a grid of `multiprocessors` blocks where a kernel wants to fill the device.
    pub fn gpu(multiprocessors: usize) -> Gpu {
        assert!(multiprocessors > 0, "a device without multiprocessors");
        Gpu::new(Emulated { multiprocessors })
    }
}

impl Device for Emulated {
    fn name(&self) -> String {
        "emulated".into()
    }

    fn beside(&self) -> Result<Arc<dyn Device>, Error> {
        Ok(Arc::new(Emulated { multiprocessors: self.multiprocessors }))
    }

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
    }

    fn memory(&self) -> Result<(usize, usize), Error> {
        Ok((MEMORY, MEMORY))
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        // SAFETY: it only allocates.
        let at = unsafe { mosaickv_emulated_alloc(bytes) };
        if at.is_null() {
            return Err(Error::Memory { wanted: bytes, why: "the system has none".into() });
        }
        // SAFETY: so many bytes were allocated. Nothing may rely on what they hold.
        unsafe { at.write_bytes(0xcd, bytes) };
        Ok(at as u64)
    }

    unsafe fn free(&self, address: u64, bytes: usize) {
        // SAFETY: by the caller's promise it comes from `alloc`.
        unsafe { mosaickv_emulated_free(address as *mut u8, bytes) }
    }

    unsafe fn write(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        // SAFETY: by the caller's promise.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from.as_ptr(), from.len()) };
        Ok(())
    }

    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Error> {
        // SAFETY: by the caller's promise.
        unsafe { to.as_mut_ptr().copy_from_nonoverlapping(from as *const u8, to.len()) };
        Ok(())
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        // SAFETY: by the caller's promise.
        unsafe { (to as *mut u8).copy_from_nonoverlapping(from as *const u8, bytes) };
        Ok(())
    }

    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<(), Error> {
        // SAFETY: by the caller's promise.
        unsafe { (to as *mut u8).write_bytes(byte, bytes) };
        Ok(())
    }

    fn resident(&self, _: Kernel, _: usize) -> Result<usize, Error> {
        Ok(1)
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: usize,
        shared: usize,
        parameters: &[u8],
    ) -> Result<(), Error> {
        let _one = LAUNCHES.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let name = CString::new(kernel.name).expect("names have no zeros");
        let (blocks, threads) = (blocks as c_int, kernel.threads as c_int);
        let words = aligned(parameters);
        // SAFETY: by the caller's promise, and one at a time.
        let rc = unsafe {
            mosaickv_emulated_launch(name.as_ptr(), blocks, threads, shared, words.as_ptr().cast())
        };
        assert_eq!(rc, 0, "no kernel {}", kernel.name);
        Ok(())
    }

    fn open_products(&self) -> Result<(), Error> {
        Ok(())
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), Error> {
        let (tokens, rows, cols) = product.size;
        // SAFETY: by the caller's promise; numbers of 16 bits have no values that are not allowed.
        let weights =
            widened(unsafe { std::slice::from_raw_parts(product.weights as *const bf16, rows * cols) });
        // SAFETY: as above.
        let x = widened(unsafe { std::slice::from_raw_parts(product.x as *const bf16, tokens * cols) });
        for (i, x) in x.chunks_exact(cols).enumerate() {
            for (j, weights) in weights.chunks_exact(cols).enumerate() {
                let (sum, at) = (dot(x, weights), i * rows + j);
                // SAFETY: the output has `tokens * rows` elements, by the caller's promise.
                unsafe {
                    match product.into {
                        Into::F32 => *(product.out as *mut f32).add(at) = sum,
                        Into::AddF32 => *(product.out as *mut f32).add(at) += sum,
                        Into::Bf16 => *(product.out as *mut bf16).add(at) = bf16::from_f32(sum),
                    }
                }
            }
        }
        Ok(())
    }

    unsafe fn graph(&self, tape: &Tape) -> Result<Box<dyn Captured>, Error> {
        Ok(Box::new(Again { device: self.clone(), tape: tape.clone() }))
    }

    fn pin(&self, bytes: usize) -> Result<u64, Error> {
        self.alloc(bytes)
    }

    unsafe fn unpin(&self, address: u64, bytes: usize) {
        // SAFETY: by the caller's promise it comes from `pin`.
        unsafe { self.free(address, bytes) }
    }

    unsafe fn fetch(&self, pieces: &[Piece]) -> Result<Box<dyn Copied>, Error> {
        for piece in pieces {
            // SAFETY: by the caller's promise; memory of host and device is not the same.
            unsafe { self.copy(piece.to, piece.from, piece.bytes) }?;
        }
        Ok(Box::new(Done))
    }

    unsafe fn send(&self, pieces: &[Piece]) -> Result<Box<dyn Copied>, Error> {
        // SAFETY: by the caller's promise.
        unsafe { self.fetch(pieces) }
    }
}

/// A graph is what it was made of, one after the other.
#[derive(Debug)]
struct Again {
    device: Emulated,
    tape: Tape,
}

impl Captured for Again {
    unsafe fn launch(&self) -> Result<(), Error> {
        // SAFETY: by the caller's promise.
        unsafe { self.tape.ask(&self.device) }
    }
}

fn widened(x: &[bf16]) -> Vec<f32> {
    x.iter().map(|x| x.to_f32()).collect()
}

/// Eight sums side by side; lengths are multiples of 8.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 8];
    for (a, b) in a.chunks_exact(8).zip(b.chunks_exact(8)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    sums.iter().sum()
}

/// Copies are done at once.
#[derive(Debug)]
struct Done;

impl Copied for Done {
    fn is_done(&self) -> Result<bool, Error> {
        Ok(true)
    }

    fn wait(&self) -> Result<(), Error> {
        Ok(())
    }

    fn follow(&self) -> Result<(), Error> {
        Ok(())
    }
}
