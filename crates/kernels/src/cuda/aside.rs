//! How does data come and go while the device works? Page-locked memory of the host, and copies on a stream of their own.
//!
//! A copy begins when all that the device was asked for before is done, and runs beside what it is asked for later. Until it is done its
//! [`Pending`] owns the host's memory. What is asked for later and needs the copy done, as it reads what was sent or overwrites what is
//! fetched, comes after [`Pending::follow`].

use super::device::{Buffer, Error, Gpu, Piece};
use bytemuck::{AnyBitPattern, NoUninit};
use std::fmt;

/// A copy's end.
pub trait Copied: fmt::Debug + Send + Sync {
    /// Whether it has come.
    fn is_done(&self) -> Result<bool, Error>;
    /// Waits for it.
    fn wait(&self) -> Result<(), Error>;
    /// Has what the device is asked for from now on wait for it.
    fn follow(&self) -> Result<(), Error>;
}

/// Page-locked memory of the host; given back when dropped. Both wait for the device to be idle: keep it and use it again.
pub struct Pinned {
    gpu: Gpu,
    address: u64,
    bytes: usize,
}

impl fmt::Debug for Pinned {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Pinned({} bytes)", self.bytes)
    }
}

impl Pinned {
    /// At least `bytes` bytes of zeros.
    pub fn new(gpu: &Gpu, bytes: usize) -> Result<Pinned, Error> {
        let bytes = bytes.max(1).next_multiple_of(16);
        let address = gpu.device().pin(bytes)?;
        // SAFETY: so many bytes were allocated.
        unsafe { (address as *mut u8).write_bytes(0, bytes) };
        Ok(Pinned { gpu: gpu.clone(), address, bytes })
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it is.
    pub(super) fn address(&self) -> u64 {
        self.address
    }

    /// `count` numbers from byte `at` on, which is a multiple of their size.
    pub fn numbers<T: NoUninit + AnyBitPattern>(&self, at: usize, count: usize) -> &[T] {
        // SAFETY: so many bytes are allocated and were written by `new`; no copy is under way, since it would own this.
        let all = unsafe { std::slice::from_raw_parts(self.address as *const u8, self.bytes) };
        bytemuck::cast_slice(&all[at..at + count * size_of::<T>()])
    }

    /// The same, to be written.
    pub fn numbers_mut<T: NoUninit + AnyBitPattern>(&mut self, at: usize, count: usize) -> &mut [T] {
        // SAFETY: as above, and nobody else has a reference.
        let all = unsafe { std::slice::from_raw_parts_mut(self.address as *mut u8, self.bytes) };
        bytemuck::cast_slice_mut(&mut all[at..at + count * size_of::<T>()])
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        // SAFETY: it was allocated there; no copy is under way, since it would own this. For launches that read it the driver waits.
        unsafe { self.gpu.device().unpin(self.address, self.bytes) }
    }
}

/// A part of a buffer: where it begins and how long it is, in bytes.
pub type Part<'a> = (&'a Buffer, usize, usize);

/// Copies parts of the device's memory to `to`, one after the other from its beginning on.
pub fn fetch(parts: &[Part], to: Pinned) -> Result<Pending, Error> {
    let pieces = pieces(parts, &to, |device, host, bytes| Piece { to: host, from: device, bytes });
    // SAFETY: the pieces lie within what they are parts of. `Pending` owns the host's memory until they are copied; freeing a buffer
    // waits for copies.
    let copied = unsafe { to.gpu.device().fetch(&pieces) }?;
    Ok(Pending { copied, pinned: Some(to) })
}

/// Copies what `from` holds, from its beginning on, to parts of the device's memory.
pub fn send(from: Pinned, parts: &[Part]) -> Result<Pending, Error> {
    let pieces = pieces(parts, &from, |device, host, bytes| Piece { to: device, from: host, bytes });
    // SAFETY: as above.
    let copied = unsafe { from.gpu.device().send(&pieces) }?;
    Ok(Pending { copied, pinned: Some(from) })
}

fn pieces(parts: &[Part], host: &Pinned, piece: impl Fn(u64, u64, usize) -> Piece) -> Vec<Piece> {
    let mut at = 0;
    let mut one = |&(buffer, first, bytes): &Part| {
        buffer.holds("a part to copy", first, bytes);
        buffer.check_order();
        assert!(at + bytes <= host.bytes, "{bytes} bytes at {at} of {} page-locked ones", host.bytes);
        let piece = piece(buffer.address() + first as u64, host.address + at as u64, bytes);
        at += bytes;
        piece
    };
    parts.iter().map(&mut one).collect()
}

/// A copy that may be under way, and the host's memory that it copies to or from. Dropped, it waits.
#[derive(Debug)]
pub struct Pending {
    copied: Box<dyn Copied>,
    /// `None` once it was given out.
    pinned: Option<Pinned>,
}

impl Pending {
    /// Whether it is done.
    pub fn is_done(&self) -> Result<bool, Error> {
        self.copied.is_done()
    }

    /// Waits until it is done; the host's memory.
    pub fn wait(mut self) -> Result<Pinned, Error> {
        self.copied.wait()?;
        Ok(self.pinned.take().expect("nobody took it before"))
    }

    /// Has what the device is asked for from now on wait for it.
    pub fn follow(&self) -> Result<(), Error> {
        self.copied.follow()
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        if self.pinned.is_some() && self.copied.wait().is_err() {
            // Nobody knows whether it is still written to.
            std::mem::forget(self.pinned.take());
        }
    }
}
