//! How do tokens become logits on a GPU? The pass of `forward.rs` again, over weights in bf16 and residuals in f32.
//!
//! What a layer remembers is the caches' business: keys and values of new tokens go to the pages of a [`Store`], and to the host.

mod pass;
mod step;
mod synthetic;
mod weights;

use crate::config::ModelConfig;
use crate::rope::Rope;
use crate::weights::Model;
use mosaickv_kernels::cuda::Gpu;
use mosaickv_kv::KvError;
use mosaickv_kv::device::{Mirror, Store};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

pub(crate) use pass::Prompt;
use pass::Work;
use step::Ready;
pub(crate) use step::Step;
pub use synthetic::Pages;
use weights::Weights;

/// A model in a GPU's memory, and what its sequences have there.
pub struct Device {
    /// One pass at a time.
    inner: Mutex<OnDevice>,
    name: String,
}

pub(crate) struct OnDevice {
    gpu: Gpu,
    config: ModelConfig,
    rope: Rope,
    weights: Weights,
    pub(crate) store: Store,
    /// What the last step worked with.
    step: Option<Ready>,
    /// What the last prompt worked with.
    prompt: Option<Work>,
    times: StepTimes,
}

/// Bytes in a GPU's memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceBytes {
    /// The model's.
    pub weights: usize,
    /// Pages of exact tokens that sequences have.
    pub exact: usize,
    /// Pages of exact tokens for which there is room.
    pub room: usize,
}

/// Time that steps took so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StepTimes {
    /// Until mirrors were in line with their caches, of what was not done beside the step before.
    pub update: Duration,
    /// From then on until the logits were there.
    pub device: Duration,
    /// Within that, beside the device's last product: until the caches had stored what was computed, and mirrors were in line with them.
    pub store: Duration,
}

impl Model {
    /// Has passes computed on a GPU from now on: its matrices are copied there as bf16. Memory that passes and sequences need
    /// is taken from what `gpu` may take.
    pub fn to_device(&mut self, gpu: &Gpu) -> Result<(), KvError> {
        let store = Store::new(gpu, self.kv_shape())?;
        let weights = Weights::of(gpu, self)?;
        self.device = Some(Device::new(gpu, (self.config.clone(), self.rope.clone()), weights, store));
        Ok(())
    }
}

impl Device {
    fn new(gpu: &Gpu, (config, rope): (ModelConfig, Rope), weights: Weights, store: Store) -> Device {
        let on_device = OnDevice {
            gpu: gpu.clone(),
            config,
            rope,
            weights,
            store,
            step: None,
            prompt: None,
            times: StepTimes::default(),
        };
        Device { inner: Mutex::new(on_device), name: gpu.name() }
    }

    /// What it is called.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// What is in its memory, but for compressed pages and working memory.
    pub fn bytes(&self) -> DeviceBytes {
        let inner = self.lock();
        let (exact, free) = inner.store.bytes();
        DeviceBytes { weights: inner.weights.bytes(), exact, room: exact + free }
    }

    /// Time that steps took so far.
    pub fn times(&self) -> StepTimes {
        self.lock().times
    }

    /// How often the layers of steps of as many sequences as the last one became a graph, in a row of such steps.
    pub fn graphs(&self) -> usize {
        self.lock().step.as_ref().map_or(0, Ready::graphs)
    }

    /// Bytes of its memory that are taken: by the model, what is remembered, and what passes work with.
    pub fn used(&self) -> usize {
        self.lock().gpu.used().0
    }

    /// Bytes that may be taken besides.
    pub fn left(&self) -> usize {
        let (used, limit) = self.lock().gpu.used();
        limit.saturating_sub(used)
    }

    /// Has room for so many pages of exact tokens at once: growing to them takes more memory for a while.
    pub fn reserve(&self, pages: usize) -> Result<(), KvError> {
        self.lock().store.reserve(pages)
    }

    /// Of an empty cache.
    pub(crate) fn mirror(&self) -> Mirror {
        Mirror::new(&self.lock().store)
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, OnDevice> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
