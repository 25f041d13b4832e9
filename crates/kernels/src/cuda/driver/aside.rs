//! Copies beside the device's other work: a stream of their own, ordered by events.

use super::{Driver, failed};
use crate::cuda::aside::Copied;
use crate::cuda::device::{Error, Piece};
use cudarc::driver::result::{self, DriverError, event, stream};
use cudarc::driver::sys::{self, CUevent, CUevent_flags, CUstream};
use std::fmt;

/// The end of copies on the side stream.
struct End {
    driver: Driver,
    event: CUevent,
}

// SAFETY: the driver's events may be used by any thread whose current context is theirs, which every call here sees to.
unsafe impl Send for End {}
// SAFETY: as above; the driver locks what it shares.
unsafe impl Sync for End {}

impl fmt::Debug for End {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        write!(f, "End({:?})", self.event)
    }
}

impl Driver {
    /// Has `each` copy the pieces on the side stream, after all that was launched before.
    ///
    /// # Safety
    /// As [`crate::cuda::Device::fetch`].
    pub(super) unsafe fn copy_aside(
        &self,
        pieces: &[Piece],
        each: unsafe fn(Piece, CUstream) -> Result<(), DriverError>,
    ) -> Result<Box<dyn Copied>, Error> {
        let before = self.mark(self.0.stream)?;
        let side = self.0.side;
        // SAFETY: stream and event exist.
        unsafe { stream::wait_event(side, before.event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT) }
            .map_err(failed("wait for an event"))?;
        for piece in pieces {
            // SAFETY: by the caller's promise.
            if let Err(e) = unsafe { each(*piece, side) } {
                // SAFETY: the stream exists.
                let _ = unsafe { stream::synchronize(side) };
                return Err(failed("copy beside other work")(e));
            }
        }
        self.mark(side).map(|end| Box::new(end) as Box<dyn Copied>).inspect_err(|_| {
            // SAFETY: the stream exists.
            let _ = unsafe { stream::synchronize(side) };
        })
    }

    /// An event after what a stream was asked for so far.
    fn mark(&self, of: CUstream) -> Result<End, Error> {
        self.enter()?;
        let made =
            event::create(CUevent_flags::CU_EVENT_DISABLE_TIMING).map_err(failed("create an event"))?;
        let end = End { driver: self.clone(), event: made };
        // SAFETY: event and stream exist.
        unsafe { event::record(made, of) }.map_err(failed("record an event"))?;
        Ok(end)
    }
}

/// From the device to page-locked memory.
///
/// # Safety
/// As [`crate::cuda::Device::fetch`].
pub(super) unsafe fn to_host(piece: Piece, on: CUstream) -> Result<(), DriverError> {
    // SAFETY: by the caller's promise.
    unsafe { sys::cuMemcpyDtoHAsync_v2(piece.to as *mut _, piece.from, piece.bytes, on) }.result()
}

/// From page-locked memory to the device.
///
/// # Safety
/// As [`crate::cuda::Device::send`].
pub(super) unsafe fn to_device(piece: Piece, on: CUstream) -> Result<(), DriverError> {
    // SAFETY: by the caller's promise.
    unsafe { sys::cuMemcpyHtoDAsync_v2(piece.to, piece.from as *const _, piece.bytes, on) }.result()
}

impl Copied for End {
    fn is_done(&self) -> Result<bool, Error> {
        self.driver.enter()?;
        // SAFETY: the event exists.
        match unsafe { event::query(self.event) } {
            Ok(()) => Ok(true),
            Err(DriverError(sys::CUresult::CUDA_ERROR_NOT_READY)) => Ok(false),
            Err(e) => Err(failed("ask for an event")(e)),
        }
    }

    fn wait(&self) -> Result<(), Error> {
        self.driver.enter()?;
        // SAFETY: the event exists.
        unsafe { event::synchronize(self.event) }.map_err(failed("wait for a copy"))
    }

    fn follow(&self) -> Result<(), Error> {
        self.driver.enter()?;
        let default = sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT;
        // SAFETY: stream and event exist.
        unsafe { stream::wait_event(self.driver.0.stream, self.event, default) }
            .map_err(failed("wait for an event"))
    }
}

impl Drop for End {
    fn drop(&mut self) {
        // SAFETY: it was made by `mark` and is used nowhere else; the driver keeps what waits for it.
        let _ = unsafe { event::destroy(self.event) };
    }
}

/// Page-locked memory.
pub(super) fn pin(bytes: usize) -> Result<u64, Error> {
    // SAFETY: a context is current; nobody relies on what the memory holds.
    let at = unsafe { result::malloc_host(bytes, 0) };
    let full = |e| Error::Call { call: format!("{bytes} bytes of page-locked memory"), why: super::words(e) };
    Ok(at.map_err(full)? as u64)
}
