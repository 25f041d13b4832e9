//! What is a GPU to those who use it? Memory, launches, products of matrices, and copies beside them.

use super::aside::Copied;
use super::gemm::Product;
use super::graph::{self, Captured, Tape};
use bytemuck::{AnyBitPattern, NoUninit};
use std::fmt;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// What went wrong on the way to or on the device.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// There is no driver, or no device.
    #[error("no CUDA device: {0}")]
    NoDevice(String),
    /// The device's memory is full.
    #[error("{wanted} bytes of GPU memory can't be had: {why}")]
    Memory {
        /// Bytes.
        wanted: usize,
        /// The driver's words.
        why: String,
    },
    /// It would be more than a budget allows.
    #[error(
        "{wanted} bytes of GPU memory do not fit in a budget of {limit} bytes, of which {used} are taken: raise the budget or ask for less"
    )]
    Budget {
        /// Bytes.
        wanted: usize,
        /// Bytes taken.
        used: usize,
        /// Bytes in all.
        limit: usize,
    },
    /// A library that a pass needs is not there.
    #[error("{0}")]
    NoLibrary(String),
    /// A call of the driver failed.
    #[error("CUDA: {call}: {why}")]
    Call {
        /// What was asked for.
        call: String,
        /// The driver's words.
        why: String,
    },
}

/// A kernel of the module, and how it is launched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kernel {
    /// Its name.
    pub name: &'static str,
    /// Threads of a block.
    pub threads: usize,
}

/// A copy between page-locked memory of the host and the device's memory.
#[derive(Clone, Copy, Debug)]
pub struct Piece {
    /// Where it goes.
    pub to: u64,
    /// Where it comes from.
    pub from: u64,
    /// How much it is.
    pub bytes: usize,
}

/// Memory and launches: the driver's, or emulated ones.
///
/// Work is done in the order in which it is asked for, but for [`Device::fetch`] and [`Device::send`].
pub trait Device: fmt::Debug + Send + Sync {
    /// What it is called.
    fn name(&self) -> String;
    /// The same device with an order of work of its own, which goes on beside this one's.
    fn beside(&self) -> Result<Arc<dyn Device>, Error>;
    /// Multiprocessors.
    fn multiprocessors(&self) -> usize;
    /// Bytes of memory that are free, and all.
    fn memory(&self) -> Result<(usize, usize), Error>;
    /// Address of `bytes` bytes, a multiple of 16, aligned to 16 at least.
    fn alloc(&self, bytes: usize) -> Result<u64, Error>;
    /// Gives them back, when copies beside other work are done.
    ///
    /// # Safety
    /// `address` comes from `alloc`, and nothing but such copies uses the memory any more.
    unsafe fn free(&self, address: u64, bytes: usize);
    /// Copies bytes to the device.
    ///
    /// # Safety
    /// So many bytes are allocated at `to`.
    unsafe fn write(&self, to: u64, from: &[u8]) -> Result<(), Error>;
    /// Copies bytes from the device, after all that was asked for before.
    ///
    /// # Safety
    /// So many bytes are allocated at `from`.
    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Error>;
    /// Copies bytes on the device.
    ///
    /// # Safety
    /// So many bytes are allocated at both, and they do not overlap.
    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error>;
    /// Fills memory with one byte.
    ///
    /// # Safety
    /// So many bytes are allocated at `to`.
    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<(), Error>;
    /// How many blocks of a kernel a multiprocessor holds, at least 1.
    fn resident(&self, kernel: Kernel, shared: usize) -> Result<usize, Error>;
    /// Launches a kernel.
    ///
    /// # Safety
    /// `parameters` are the bytes of its structure, and whatever it finds there is allocated and as the kernel wants it.
    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: usize,
        shared: usize,
        parameters: &[u8],
    ) -> Result<(), Error>;
    /// Opens the library that multiplies matrices; an error if there is none.
    fn open_products(&self) -> Result<(), Error>;
    /// Multiplies matrices.
    ///
    /// # Safety
    /// The matrices of the product are allocated, and its output overlaps no other.
    unsafe fn multiply(&self, product: &Product) -> Result<(), Error>;
    /// Makes what is on a tape one graph. Each of its launches and products has been asked for before.
    ///
    /// # Safety
    /// Each may be asked for.
    unsafe fn graph(&self, tape: &Tape) -> Result<Box<dyn Captured>, Error>;
    /// Address of page-locked memory of the host, aligned to 16 at least. The device reads it at the same address.
    fn pin(&self, bytes: usize) -> Result<u64, Error>;
    /// Gives it back.
    ///
    /// # Safety
    /// `address` comes from `pin`, and nothing uses the memory any more.
    unsafe fn unpin(&self, address: u64, bytes: usize);
    /// Copies to page-locked memory after all that was asked for before, beside what is asked for from now on. If it fails, nothing is
    /// under way.
    ///
    /// # Safety
    /// The pieces are allocated until they are copied, and nobody touches those of the host.
    unsafe fn fetch(&self, pieces: &[Piece]) -> Result<Box<dyn Copied>, Error>;
    /// The same from page-locked memory to the device's.
    ///
    /// # Safety
    /// As there.
    unsafe fn send(&self, pieces: &[Piece]) -> Result<Box<dyn Copied>, Error>;
}

/// The bytes of a structure, aligned as it is.
#[cfg(any(feature = "cuda", emulated))]
pub(super) fn aligned(parameters: &[u8]) -> Vec<u64> {
    let word = |bytes: &[u8]| u64::from_ne_bytes(std::array::from_fn(|i| bytes.get(i).copied().unwrap_or(0)));
    parameters.chunks(8).map(word).collect()
}

/// Bytes taken of those that may be.
#[derive(Debug)]
struct Budget {
    limit: usize,
    used: AtomicUsize,
}

impl Budget {
    fn new(limit: usize) -> Arc<Budget> {
        Arc::new(Budget { limit, used: AtomicUsize::new(0) })
    }

    fn take(&self, wanted: usize) -> Result<(), Error> {
        let more = |used: usize| used.checked_add(wanted).filter(|used| *used <= self.limit);
        match self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(()),
            Err(used) => Err(Error::Budget { wanted, used, limit: self.limit }),
        }
    }
}

/// Memory that is to be given back.
#[derive(Debug)]
struct Memory {
    address: u64,
    bytes: usize,
    budget: Arc<Budget>,
}

/// Memory that nobody has any more, but that what is being noted may still ask for.
#[derive(Debug, Default)]
struct Kept {
    /// Threads that note.
    noting: usize,
    memory: Vec<Memory>,
}

/// A device that many share.
#[derive(Clone, Debug)]
pub struct Gpu {
    device: Arc<dyn Device>,
    budget: Arc<Budget>,
    kept: Arc<Mutex<Kept>>,
}

impl Gpu {
    /// That is this device.
    pub fn new(device: impl Device + 'static) -> Gpu {
        Gpu { device: Arc::new(device), budget: Budget::new(usize::MAX), kept: Arc::default() }
    }

    /// The same device, of whose memory no more than `bytes` may be taken through this and its clones at any time.
    pub fn with_budget(&self, bytes: usize) -> Gpu {
        Gpu { budget: Budget::new(bytes), ..self.clone() }
    }

    /// The same device and budget, whose work goes on beside this one's: neither waits for the other, unless the host does. For as long as there
    /// is a process: ask once.
    pub fn beside(&self) -> Result<Gpu, Error> {
        Ok(Gpu { device: self.device.beside()?, budget: self.budget.clone(), kept: Arc::default() })
    }

    /// Bytes taken through this and its clones, and how many may be.
    pub fn used(&self) -> (usize, usize) {
        (self.budget.used.load(Ordering::Relaxed), self.budget.limit)
    }

    /// Bytes of the device's memory that are free, and all.
    pub fn memory(&self) -> Result<(usize, usize), Error> {
        self.device.memory()
    }

    pub(super) fn device(&self) -> &dyn Device {
        &*self.device
    }

    /// Whether both are the same device.
    pub(super) fn is(&self, other: &Gpu) -> bool {
        Arc::ptr_eq(&self.kept, &other.kept)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on memory that is freed stays until [`let_go`](Gpu::let_go).
    pub(super) fn keep(&self) {
        self.kept().noting += 1;
    }

    /// Gives back what was freed, unless others note.
    pub(super) fn let_go(&self) {
        let mut kept = self.kept();
        kept.noting -= 1;
        if kept.noting == 0 {
            let memory = std::mem::take(&mut kept.memory);
            drop(kept);
            memory.into_iter().for_each(|memory| self.give_back(memory));
        }
    }

    /// Nobody has it any more.
    fn give_back(&self, Memory { address, bytes, budget }: Memory) {
        // SAFETY: it was allocated there, and launches that use it hold what owns it, or were asked for; work is done in order, and copies
        // beside it are waited for.
        unsafe { self.device.free(address, bytes) }
        budget.used.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// What it is called.
    pub fn name(&self) -> String {
        self.device.name()
    }

    /// Memory of at least one byte, which holds anything.
    pub fn alloc(&self, bytes: usize) -> Result<Buffer, Error> {
        let bytes = bytes.max(1).next_multiple_of(16);
        self.budget.take(bytes)?;
        match self.device.alloc(bytes) {
            Ok(address) => Ok(Buffer { address, gpu: self.clone(), bytes }),
            Err(e) => {
                self.budget.used.fetch_sub(bytes, Ordering::Relaxed);
                Err(e)
            }
        }
    }

    /// Memory that holds `numbers`.
    pub fn upload<T: NoUninit>(&self, numbers: &[T]) -> Result<Buffer, Error> {
        let buffer = self.alloc(size_of_val(numbers))?;
        buffer.write(0, numbers)?;
        Ok(buffer)
    }

    /// Blocks that fill the device with a kernel.
    pub(super) fn full_grid(&self, kernel: Kernel, shared: usize) -> Result<usize, Error> {
        Ok(self.device.multiprocessors() * self.device.resident(kernel, shared)?)
    }

    /// See [`Device::launch`].
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn launch<P: NoUninit>(
        &self,
        kernel: Kernel,
        (blocks, shared): (usize, usize),
        parameters: &P,
    ) -> Result<(), Error> {
        let bytes = bytemuck::bytes_of(parameters);
        if graph::note_launch(self, kernel, (blocks, shared), bytes) {
            return Ok(());
        }
        // SAFETY: by the caller's promise.
        unsafe { self.device.launch(kernel, blocks, shared, bytes) }
    }

    /// See [`Device::multiply`].
    ///
    /// # Safety
    /// As there.
    pub(super) unsafe fn multiply(&self, product: &Product) -> Result<(), Error> {
        if graph::note_product(self, product) {
            return Ok(());
        }
        // SAFETY: by the caller's promise.
        unsafe { self.device.multiply(product) }
    }
}

/// Memory of a device; given back when dropped.
#[derive(Debug)]
pub struct Buffer {
    gpu: Gpu,
    address: u64,
    bytes: usize,
}

impl Buffer {
    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Where it is.
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Panics unless it has room for `bytes` bytes from `at` on.
    pub(super) fn holds(&self, what: &str, at: usize, bytes: usize) {
        assert!(
            at.saturating_add(bytes) <= self.bytes,
            "{what}: {bytes} bytes at {at} of a buffer of {}",
            self.bytes
        );
    }

    /// Panics where what is done at once to the buffer would come before what is only noted.
    pub(super) fn check_order(&self) {
        graph::check_order(&self.gpu, self.address, self.bytes);
    }

    /// Is used in the order of another's work on the same device from now on, once all that it was used for is done.
    pub(super) fn pass_to(&mut self, gpu: &Gpu) {
        assert!(Arc::ptr_eq(&self.gpu.budget, &gpu.budget), "of another budget");
        self.gpu = gpu.clone();
    }

    /// Copies `numbers` to the place that begins `at` bytes into the buffer.
    pub fn write<T: NoUninit>(&self, at: usize, numbers: &[T]) -> Result<(), Error> {
        let bytes: &[u8] = bytemuck::cast_slice(numbers);
        assert!(
            at.saturating_add(bytes.len()) <= self.bytes,
            "{} bytes at {at} of {}",
            bytes.len(),
            self.bytes
        );
        if bytes.is_empty() {
            return Ok(());
        }
        let to = self.address + at as u64;
        if let Some(noted) = graph::note_write(&self.gpu, to, bytes) {
            return noted;
        }
        // SAFETY: they lie within the buffer.
        unsafe { self.gpu.device.write(to, bytes) }
    }

    /// The first `count` numbers, when all that was asked for before is done.
    pub fn read<T: NoUninit + AnyBitPattern>(&self, count: usize) -> Result<Vec<T>, Error> {
        let mut numbers = vec![T::zeroed(); count];
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(&mut numbers);
        assert!(bytes.len() <= self.bytes, "{} bytes of {}", bytes.len(), self.bytes);
        self.check_order();
        // SAFETY: they lie within the buffer.
        unsafe { self.gpu.device.read(self.address, bytes) }?;
        Ok(numbers)
    }

    /// Copies `bytes` bytes from `(buffer, at)` to `to`.
    pub fn copy_from(&self, to: usize, (from, at): (&Buffer, usize), bytes: usize) -> Result<(), Error> {
        assert!(to.saturating_add(bytes) <= self.bytes && at.saturating_add(bytes) <= from.bytes);
        assert!(self.address != from.address || to + bytes <= at || at + bytes <= to, "they overlap");
        self.check_order();
        from.check_order();
        // SAFETY: they lie within the buffers and do not overlap.
        unsafe { self.gpu.device.copy(self.address + to as u64, from.address + at as u64, bytes) }
    }

    /// Fills it with a byte.
    pub fn fill(&self, byte: u8) -> Result<(), Error> {
        self.check_order();
        // SAFETY: it is all of the buffer.
        unsafe { self.gpu.device.fill(self.address, byte, self.bytes) }
    }

    /// Fills it with what is no number as f32 and as f16.
    pub fn poison(&self) -> Result<(), Error> {
        self.fill(0xff)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let Buffer { gpu, address, bytes } = self;
        let memory = Memory { address: *address, bytes: *bytes, budget: gpu.budget.clone() };
        let mut kept = gpu.kept();
        if kept.noting > 0 {
            kept.memory.push(memory);
        } else {
            drop(kept);
            gpu.give_back(memory);
        }
    }
}
