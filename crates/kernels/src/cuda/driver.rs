//! The kernels on a GPU, through CUDA's driver, which is loaded at run time: a binary with this starts where there is none.

mod aside;
mod blas;

use super::aside::Copied;
use super::device::{Device, Error, Gpu, Kernel, Piece, aligned};
use super::gemm::Product;
use super::graph::{Asked, Captured, Tape};
use blas::Blas;
use cudarc::driver::result::{self, DriverError, ctx, device, event, graph, module, primary_ctx, stream};
use cudarc::driver::sys;
use std::collections::HashMap;
use std::ffi::{CString, c_void};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

/// What the compiler said of the kernels: registers, spills, shared memory.
pub const RESOURCES: &str = include_str!(concat!(env!("OUT_DIR"), "/resources.txt"));

static MODULE: &Aligned<[u8]> = &Aligned(*include_bytes!(concat!(env!("OUT_DIR"), "/kernels.fatbin")));

/// The driver reads headers of the module in place.
#[repr(C, align(64))]
struct Aligned<T: ?Sized>(T);

/// An open device, one stream of work on it, and the kernels.
#[derive(Clone)]
pub struct Driver(Arc<Inner>);

struct Inner {
    device: sys::CUdevice,
    context: sys::CUcontext,
    module: sys::CUmodule,
    stream: sys::CUstream,
    /// Copies beside that.
    side: sys::CUstream,
    /// Where graphs are made, one at a time. Nothing runs there.
    capturing: Mutex<Stream>,
    /// Open once a product was asked for.
    products: Mutex<Option<Blas>>,
    /// Whether launches may begin before the one before has ended.
    overlap: AtomicBool,
    /// Loaded so far, with the shared memory that they may have.
    functions: Mutex<HashMap<&'static str, (usize, usize)>>,
    /// Blocks of a kernel with so much shared memory that a multiprocessor holds. A step asks at each launch, and the driver takes its time.
    resident: Mutex<HashMap<(&'static str, usize), usize>>,
}

struct Stream(sys::CUstream);

// SAFETY: the driver's handles may be used by any thread whose current context is theirs, which every call here sees to.
unsafe impl Send for Stream {}

// SAFETY: as above.
unsafe impl Send for Inner {}
// SAFETY: as above; the driver locks what it shares.
unsafe impl Sync for Inner {}

impl fmt::Debug for Driver {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Driver({})", self.name())
    }
}

fn failed(call: &str) -> impl Fn(DriverError) -> Error + '_ {
    move |e| Error::Call { call: call.into(), why: words(e) }
}

fn words(e: DriverError) -> String {
    let text = e.error_string().ok().and_then(|s| s.to_str().ok());
    format!("{} ({:?})", text.unwrap_or("an unknown error"), e.0)
}

impl Driver {
    /// Opens device `ordinal`.
    pub fn open(ordinal: usize) -> Result<Driver, Error> {
        // SAFETY: libraries are looked for by the driver's names; what loading them runs is the driver's.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoDevice("the driver (libcuda.so) is not installed".into()));
        }
        let none = |e: DriverError| Error::NoDevice(words(e));
        result::init().map_err(none)?;
        let count = device::get_count().map_err(none)?;
        if ordinal >= count as usize {
            return Err(Error::NoDevice(format!("device {ordinal} of {count}")));
        }
        let device = device::get(ordinal as i32).map_err(none)?;
        // SAFETY: the device exists. The context is kept to the process's end.
        let context = unsafe { primary_ctx::retain(device) }.map_err(failed("retain the context"))?;
        // SAFETY: it was just retained.
        unsafe { ctx::set_current(context) }.map_err(failed("set the context"))?;
        // SAFETY: the image is a module as nvcc writes it, with its own length.
        let module =
            unsafe { module::load_data(MODULE.0.as_ptr().cast()) }.map_err(failed("load the kernels"))?;
        // It waits for copies of the default stream, and they for it.
        let stream = stream::create(stream::StreamKind::Default).map_err(failed("create a stream"))?;
        let beside = || stream::create(stream::StreamKind::NonBlocking).map_err(failed("create a stream"));
        Ok(Driver::on(device, context, module, (stream, beside()?, beside()?)))
    }

    /// Whose work, copies and graphs go to these streams.
    fn on(
        device: sys::CUdevice,
        context: sys::CUcontext,
        module: sys::CUmodule,
        (stream, side, capturing): (sys::CUstream, sys::CUstream, sys::CUstream),
    ) -> Driver {
        let (products, overlap, functions, resident) = Default::default();
        let capturing = Mutex::new(Stream(capturing));
        Driver(Arc::new(Inner {
            device,
            context,
            module,
            stream,
            side,
            capturing,
            products,
            overlap,
            functions,
            resident,
        }))
    }

    /// Lets each launch from now on begin while the one before ends (programmatic dependent launch), on GPUs that can. Kernels
    /// wait for what they read.
    pub fn overlap(&self, overlap: bool) {
        let major = self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR);
        self.0.overlap.store(overlap && major >= 9, Ordering::Relaxed);
    }

    /// As what kernels are run on.
    pub fn gpu(&self) -> Gpu {
        Gpu::new(self.clone())
    }

    fn enter(&self) -> Result<(), Error> {
        // SAFETY: the context is never released.
        unsafe { ctx::set_current(self.0.context) }.map_err(failed("set the context"))
    }

    /// Waits for all work.
    pub fn synchronize(&self) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: the stream exists as long as this.
        unsafe { stream::synchronize(self.0.stream) }.map_err(failed("wait for the device"))
    }

    /// Has `work` use the library of products, opened if need be.
    fn with_products(&self, work: impl FnOnce(&mut Blas) -> Result<(), Error>) -> Result<(), Error> {
        self.enter()?;
        let mut products = self.0.products.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if products.is_none() {
            *products = Some(Blas::open()?);
        }
        work(products.as_mut().expect("it was just opened"))
    }

    /// Bytes of the second cache.
    pub fn cache(&self) -> usize {
        self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE)
    }

    fn attribute(&self, which: sys::CUdevice_attribute) -> usize {
        // SAFETY: the device exists.
        unsafe { device::get_attribute(self.0.device, which) }.map_or(0, |x| x.max(0) as usize)
    }

    /// What `work` launches, to be launched again and again. It may allocate nothing and read nothing back.
    pub fn capture(&self, work: impl FnOnce() -> Result<(), Error>) -> Result<Graph, Error> {
        // SAFETY: the stream exists as long as this.
        unsafe { self.captured(self.0.stream, work) }
    }

    /// What `work` launches on a stream.
    ///
    /// # Safety
    /// The stream exists, and nobody else uses it meanwhile.
    unsafe fn captured(
        &self,
        stream: sys::CUstream,
        work: impl FnOnce() -> Result<(), Error>,
    ) -> Result<Graph, Error> {
        self.enter()?;
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: by the caller's promise.
        unsafe { stream::begin_capture(stream, mode) }.map_err(failed("begin a graph"))?;
        let worked = work();
        // SAFETY: capture was begun on this stream.
        let graph = unsafe { stream::end_capture(stream) }.map_err(failed("end a graph"));
        worked?;
        let graph = graph?;
        let flags = sys::CUgraphInstantiate_flags::CUDA_GRAPH_INSTANTIATE_FLAG_AUTO_FREE_ON_LAUNCH;
        // SAFETY: the graph was just made.
        let exec = unsafe { graph::instantiate(graph, flags) }.map_err(failed("make a graph executable"))?;
        Ok(Graph { driver: self.clone(), graph, exec })
    }

    /// An event after what was launched so far.
    pub fn event(&self) -> Result<Event, Error> {
        self.enter()?;
        let made = event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("create an event"))?;
        let event = Event(made);
        // SAFETY: event and stream exist.
        unsafe { event::record(event.0, self.0.stream) }.map_err(failed("record an event"))?;
        Ok(event)
    }

    /// The function of a kernel, allowed `shared` bytes.
    fn function(&self, kernel: Kernel, shared: usize) -> Result<sys::CUfunction, Error> {
        self.enter()?;
        let mut functions = self.0.functions.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let known = functions.get(kernel.name).copied();
        let function = match known {
            Some((address, _)) => address as sys::CUfunction,
            None => {
                let name = CString::new(kernel.name).expect("names have no zeros");
                // SAFETY: the module is loaded.
                unsafe { module::get_function(self.0.module, name) }.map_err(failed(kernel.name))?
            }
        };
        let allowed = known.map_or(48 << 10, |(_, allowed)| allowed);
        if shared > allowed {
            let which = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is the module's.
            unsafe { result::function::set_function_attribute(function, which, shared as i32) }
                .map_err(failed(&format!("{}: {shared} bytes of shared memory", kernel.name)))?;
        }
        functions.insert(kernel.name, (function as usize, allowed.max(shared)));
        Ok(function)
    }

    /// Launches a kernel on a stream.
    ///
    /// # Safety
    /// As [`Device::launch`], and the stream exists.
    unsafe fn launch_on(
        &self,
        stream: sys::CUstream,
        kernel: Kernel,
        (blocks, shared): (usize, usize),
        parameters: &[u8],
    ) -> Result<(), Error> {
        let function = self.function(kernel, shared)?;
        let mut words = aligned(parameters);
        let mut pointers = [words.as_mut_ptr().cast::<c_void>()];
        let mut attribute = sys::CUlaunchAttribute {
            id: sys::CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
            pad: [0; 4],
            value: sys::CUlaunchAttributeValue { programmaticStreamSerializationAllowed: 1 },
        };
        let config = sys::CUlaunchConfig {
            gridDimX: blocks as u32,
            gridDimY: 1,
            gridDimZ: 1,
            blockDimX: kernel.threads as u32,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shared as u32,
            hStream: stream,
            attrs: &raw mut attribute,
            numAttrs: u32::from(self.0.overlap.load(Ordering::Relaxed)),
        };
        // SAFETY: the function is the module's and takes one structure, whose bytes these are by the caller's promise; the driver
        // copies them, and the configuration, before it returns.
        let launched = unsafe {
            sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), std::ptr::null_mut())
        };
        launched.result().map_err(failed(kernel.name))
    }
}

impl Device for Driver {
    fn name(&self) -> String {
        device::get_name(self.0.device).unwrap_or_else(|_| "a CUDA device".into())
    }

    fn beside(&self) -> Result<Arc<dyn Device>, Error> {
        self.enter()?;
        // The default stream, whose copies wait for what the other streams were asked for, is not waited for here.
        let stream = || stream::create(stream::StreamKind::NonBlocking).map_err(failed("create a stream"));
        let (work, capturing) = (stream()?, stream()?);
        let Inner { device, context, module, .. } = *self.0;
        Ok(Arc::new(Driver::on(device, context, module, (work, work, capturing))))
    }

    fn multiprocessors(&self) -> usize {
        self.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT).max(1)
    }

    fn memory(&self) -> Result<(usize, usize), Error> {
        self.enter()?;
        result::mem_get_info().map_err(failed("ask for free memory"))
    }

    fn alloc(&self, bytes: usize) -> Result<u64, Error> {
        self.enter()?;
        // SAFETY: a context is current; nobody relies on what the memory holds.
        unsafe { result::malloc_sync(bytes) }.map_err(|e| Error::Memory { wanted: bytes, why: words(e) })
    }

    unsafe fn free(&self, address: u64, _: usize) {
        if self.enter().is_ok() {
            // SAFETY: the stream exists; what else uses the memory, the caller promises. What fails leaks, and shows in the next call.
            let _ = unsafe { stream::synchronize(self.0.side).and_then(|()| result::free_sync(address)) };
        }
    }

    unsafe fn write(&self, to: u64, from: &[u8]) -> Result<(), Error> {
        self.enter()?;
        let copied = if self.0.stream == self.0.side {
            // SAFETY: by the caller's promise. Of memory that is not page-locked the driver has a copy when this returns; of other memory it
            // would not, so it is waited for.
            unsafe { result::memcpy_htod_async(to, from, self.0.stream) }
                // SAFETY: the stream exists.
                .and_then(|()| unsafe { stream::synchronize(self.0.stream) })
        } else {
            // SAFETY: by the caller's promise.
            unsafe { result::memcpy_htod_sync(to, from) }
        };
        copied.map_err(failed("copy to the device"))
    }

    unsafe fn read(&self, from: u64, to: &mut [u8]) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: by the caller's promise; `to` is there until it is done.
        unsafe {
            result::memcpy_dtoh_async(to, from, self.0.stream)
                .and_then(|()| stream::synchronize(self.0.stream))
        }
        .map_err(failed("copy from the device"))
    }

    unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: by the caller's promise.
        unsafe { result::memcpy_dtod_async(to, from, bytes, self.0.stream) }
            .map_err(failed("copy on the device"))
    }

    unsafe fn fill(&self, to: u64, byte: u8, bytes: usize) -> Result<(), Error> {
        self.enter()?;
        // SAFETY: by the caller's promise.
        unsafe { result::memset_d8_async(to, byte, bytes, self.0.stream) }.map_err(failed("fill memory"))
    }

    fn resident(&self, kernel: Kernel, shared: usize) -> Result<usize, Error> {
        let mut resident = self.0.resident.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        if let Some(count) = resident.get(&(kernel.name, shared)) {
            return Ok(*count);
        }
        let function = self.function(kernel, shared)?;
        let threads = kernel.threads as i32;
        // SAFETY: the function is the module's.
        let count =
            unsafe { result::occupancy::max_active_block_per_multiprocessor(function, threads, shared) };
        let count = count.map_err(failed(kernel.name))?;
        if count < 1 {
            let why = format!("a multiprocessor has no room for {threads} threads and {shared} bytes");
            return Err(Error::Call { call: kernel.name.into(), why });
        }
        resident.insert((kernel.name, shared), count as usize);
        Ok(count as usize)
    }

    unsafe fn launch(
        &self,
        kernel: Kernel,
        blocks: usize,
        shared: usize,
        parameters: &[u8],
    ) -> Result<(), Error> {
        // SAFETY: by the caller's promise; the stream exists.
        unsafe { self.launch_on(self.0.stream, kernel, (blocks, shared), parameters) }
    }

    fn open_products(&self) -> Result<(), Error> {
        self.with_products(|_| Ok(()))
    }

    unsafe fn multiply(&self, product: &Product) -> Result<(), Error> {
        // SAFETY: by the caller's promise.
        self.with_products(|products| unsafe { products.multiply(product, self.0.stream) })
    }

    unsafe fn graph(&self, tape: &Tape) -> Result<Box<dyn Captured>, Error> {
        let capturing = self.0.capturing.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let stream = capturing.0;
        let ask = |asked: Asked| match asked {
            // SAFETY: by the caller's promise; the stream exists.
            Asked::Launch(kernel, blocks, shared, parameters) => unsafe {
                self.launch_on(stream, kernel, (blocks, shared), parameters)
            },
            Asked::Multiply(product) => {
                // SAFETY: as above.
                self.with_products(|products| unsafe { products.multiply(product, stream) })
            }
        };
        // SAFETY: the stream exists, and who has locked it has it alone.
        let graph = unsafe { self.captured(stream, || tape.asked().try_for_each(ask)) }?;
        Ok(Box::new(graph))
    }

    fn pin(&self, bytes: usize) -> Result<u64, Error> {
        self.enter()?;
        aside::pin(bytes)
    }

    unsafe fn unpin(&self, address: u64, _: usize) {
        if self.enter().is_ok() {
            // SAFETY: by the caller's promise it comes from `pin`. What fails leaks.
            let _ = unsafe { result::free_host(address as *mut c_void) };
        }
    }

    unsafe fn fetch(&self, pieces: &[Piece]) -> Result<Box<dyn Copied>, Error> {
        // SAFETY: by the caller's promise.
        unsafe { self.copy_aside(pieces, aside::to_host) }
    }

    unsafe fn send(&self, pieces: &[Piece]) -> Result<Box<dyn Copied>, Error> {
        // SAFETY: by the caller's promise.
        unsafe { self.copy_aside(pieces, aside::to_device) }
    }
}

/// Launches that were captured. What they use must live as long.
pub struct Graph {
    driver: Driver,
    graph: sys::CUgraph,
    exec: sys::CUgraphExec,
}

impl Graph {
    /// All of them, in order.
    ///
    /// # Safety
    /// Whatever the captured launches use is still allocated.
    pub unsafe fn launch(&self) -> Result<(), Error> {
        self.driver.enter()?;
        // SAFETY: graph and stream exist.
        unsafe { graph::launch(self.exec, self.driver.0.stream) }.map_err(failed("launch a graph"))
    }
}

// SAFETY: the driver's handles may be used by any thread whose current context is theirs, which every call here sees to; the driver locks what
// it shares.
unsafe impl Send for Graph {}
// SAFETY: as above.
unsafe impl Sync for Graph {}

impl fmt::Debug for Graph {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "Graph({:?})", self.exec)
    }
}

impl Captured for Graph {
    unsafe fn launch(&self) -> Result<(), Error> {
        // SAFETY: by the caller's promise.
        unsafe { Graph::launch(self) }
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: both were made by `capture` and are used nowhere else; the driver waits for launches.
        unsafe {
            let _ = graph::exec_destroy(self.exec);
            let _ = graph::destroy(self.graph);
        }
    }
}

/// A moment in the device's work.
pub struct Event(sys::CUevent);

impl Event {
    /// Seconds from this to a later one, for which it waits.
    pub fn seconds_to(&self, later: &Event) -> Result<f64, Error> {
        // SAFETY: both exist and were recorded on the same stream.
        let ms = unsafe { event::synchronize(later.0).and_then(|()| event::elapsed(self.0, later.0)) };
        Ok(f64::from(ms.map_err(failed("time between events"))?) / 1e3)
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: it was made by `event` and is used nowhere else.
        let _ = unsafe { event::destroy(self.0) };
    }
}

/// What the compiler reserved for a kernel on one architecture.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Resources {
    /// The kernel's name.
    pub kernel: String,
    /// As `sm_90a`.
    pub architecture: String,
    /// A thread's.
    pub registers: usize,
    /// Bytes a thread that do not fit in registers.
    pub spilled: usize,
}

/// Of all kernels, out of [`RESOURCES`].
pub fn resources() -> Vec<Resources> {
    let number_before = |line: &str, word: &str| -> Option<usize> {
        line.split(word).next()?.split_whitespace().last()?.parse().ok()
    };
    let mut all: Vec<Resources> = vec![];
    for line in RESOURCES.lines() {
        if let Some((_, rest)) = line.split_once("Compiling entry function '") {
            let mut quoted = rest.split('\'');
            let (kernel, architecture) = (quoted.next(), quoted.nth(1));
            let [kernel, architecture] = [kernel, architecture].map(|name| name.unwrap_or("?").to_owned());
            all.push(Resources { kernel, architecture, registers: 0, spilled: 0 });
        }
        if let Some(last) = all.last_mut() {
            if line.contains("bytes spill stores") {
                last.spilled = number_before(line, " bytes spill stores").unwrap_or(usize::MAX);
            }
            if let Some((_, used)) = line.split_once("Used ") {
                last.registers = number_before(used, " registers").unwrap_or(usize::MAX);
            }
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hot_kernels_do_not_spill() {
        let all = resources();
        assert!(all.len() >= 2 * 35, "{} kernels in {RESOURCES}", all.len());
        for of in &all {
            println!(
                "{}: {} registers, {} bytes spilled, {}",
                of.kernel, of.registers, of.spilled, of.architecture
            );
            assert!(of.registers > 0 && of.spilled == 0, "{of:?}");
        }
    }

    #[test]
    fn without_a_driver_there_is_a_clear_error() {
        // SAFETY: as in `open`.
        if unsafe { sys::is_culib_present() } {
            return;
        }
        let error = Driver::open(0).unwrap_err().to_string();
        assert!(error.contains("no CUDA device") && error.contains("driver"), "{error}");
    }

    #[test]
    fn without_the_library_of_products_there_is_a_clear_error() {
        // SAFETY: as in `Blas::open`.
        if unsafe { cudarc::cublaslt::sys::is_culib_present() } {
            return;
        }
        let error = Blas::open().err().expect("there is none").to_string();
        assert!(error.contains("cuBLASLt") && error.contains("LD_LIBRARY_PATH"), "{error}");
    }
}
