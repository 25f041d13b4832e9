//! The kernels, compiled for the host and run thread by thread, for tests.
//!
//! What that cannot catch, `cuda/emulation.h` says: races, the order of memory accesses, and speed.

use super::device::{Device, Error, Gpu, Kernel, aligned};
use std::ffi::{CString, c_char, c_int, c_void};
use std::sync::Mutex;

/// A device of this many multiprocessors, each of which holds one block.
#[derive(Debug)]
pub struct Emulated {
    multiprocessors: usize,
}

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

    fn multiprocessors(&self) -> usize {
        self.multiprocessors
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
}
