//! `--device`: does a model compute on the CPU or on a GPU?

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};
use mosaickv_kernels::cuda::Gpu;
use mosaickv_kv::device::Mirror;
use mosaickv_kv::{ByteCount, KvFormat};
use mosaickv_model::Model;

/// What is left of a GPU's memory to libraries and to others, unless `--gpu-memory` says otherwise.
const RESERVE: usize = 1 << 30;

/// Where a model computes.
#[derive(Args, Clone)]
pub struct DeviceArgs {
    /// Where the model computes: on the CPU, on an NVIDIA GPU (cuda: caches in the formats exact, layered and packed), or on a GPU if there is one
    /// that can (auto)
    #[arg(long, env = "MOSAICKV_DEVICE", value_enum, value_name = "WHERE", default_value_t = Where::Cpu)]
    device: Where,
    #[command(flatten)]
    memory: MemoryArgs,
}

/// How much of a GPU may be taken.
#[derive(Args, Clone)]
pub struct MemoryArgs {
    /// Bytes of the GPU's memory that model, caches and passes may take together: 40GiB [default: what is free, less 1 GiB]
    #[arg(long, env = "MOSAICKV_GPU_MEMORY", value_name = "BYTES")]
    gpu_memory: Option<ByteCount>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Where {
    Cpu,
    Cuda,
    Auto,
}

impl DeviceArgs {
    /// Has the model compute there, with caches in these formats.
    pub fn place(&self, model: &mut Model, formats: &[KvFormat]) -> Result<()> {
        match self.device {
            Where::Cpu => Ok(()),
            Where::Cuda => self.to_gpu(model, formats),
            Where::Auto => {
                if let Err(error) = self.to_gpu(model, formats) {
                    eprintln!("computing on the CPU: {error:#}");
                }
                Ok(())
            }
        }
    }

    fn to_gpu(&self, model: &mut Model, formats: &[KvFormat]) -> Result<()> {
        formats.iter().try_for_each(|format| Mirror::check(*format))?;
        model.to_device(&self.memory.gpu()?).context("cannot have the model on the GPU")
    }
}

/// Whether a GPU that has the model has room for caches of so many bytes beside it.
pub fn ensure_room(model: &Model, kv_memory: ByteCount) -> Result<()> {
    let left = model.device.as_ref().map_or(usize::MAX, |device| device.left());
    ensure!(
        kv_memory.0 <= left,
        "--kv-memory {kv_memory}: beside the model the GPU has room for {}; ask for less, or allow more with --gpu-memory",
        ByteCount(left)
    );
    Ok(())
}

impl MemoryArgs {
    /// The GPU, of whose memory no more than that is taken.
    pub fn gpu(&self) -> Result<Gpu> {
        let gpu = open()?;
        let (free, _) = gpu.memory()?;
        let budget = match self.gpu_memory {
            Some(ByteCount(bytes)) => bytes,
            None => free.saturating_sub(RESERVE),
        };
        ensure!(
            budget <= free,
            "--gpu-memory {}: the GPU has {} free; ask for less, or end who has the rest",
            ByteCount(budget),
            ByteCount(free)
        );
        Ok(gpu.with_budget(budget))
    }
}

#[cfg(feature = "cuda")]
fn open() -> Result<Gpu> {
    let driver = mosaickv_kernels::cuda::driver::Driver::open(0);
    let driver = driver.context("cannot use a GPU; --device cpu computes without")?;
    driver.overlap(true);
    Ok(driver.gpu())
}

#[cfg(not(feature = "cuda"))]
fn open() -> Result<Gpu> {
    anyhow::bail!(
        "this program was built without CUDA; build it with `scripts/cuda-toolchain && cargo build --release --features cuda`, or use --device cpu"
    )
}
