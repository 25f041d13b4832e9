//! Products by cuBLASLt, which is loaded at the first one: a binary with this starts where there is none.
//!
//! How to compute a product of a size is asked for once and kept. All products share one workspace: they follow each other on one stream.

use super::failed;
use crate::cuda::device::Error;
use crate::cuda::gemm::{Into, Product};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::result as driver;
use cudarc::driver::sys::{CUdeviceptr, CUstream};
use std::collections::HashMap;
use std::ffi::c_void;

/// Bytes of the workspace, as NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// `CUBLAS_OP_T` of cuBLAS.
static TRANSPOSED: i32 = 1;

/// An open library.
pub(super) struct Blas {
    handle: sys::cublasLtHandle_t,
    workspace: CUdeviceptr,
    plans: HashMap<((usize, usize, usize), Into), Plan>,
}

// SAFETY: its handles may be used by any thread, one at a time: whoever has it has it alone.
unsafe impl Send for Blas {}

/// How a product of a size is computed. Kept to the end of the process, as the driver's context is.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    weights: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

fn refused(call: &str) -> impl Fn(result::CublasError) -> Error + '_ {
    move |e| Error::Call { call: format!("cuBLASLt: {call}"), why: format!("{:?}", e.0) }
}

impl Blas {
    /// Loads the library; a context is current.
    pub(super) fn open() -> Result<Blas, Error> {
        // SAFETY: libraries are looked for by cuBLASLt's names; what loading them runs is its own.
        if !unsafe { sys::is_culib_present() } {
            return Err(Error::NoLibrary(
                "no library cuBLASLt (libcublasLt.so.13): a model's products on a GPU need it; install CUDA's libraries, or put the folder that has \
                 it into LD_LIBRARY_PATH"
                    .into(),
            ));
        }
        let handle = result::create_handle().map_err(refused("open"))?;
        // SAFETY: a context is current; nobody relies on what the memory holds.
        let workspace =
            unsafe { driver::malloc_sync(WORKSPACE) }.map_err(failed("a workspace of products"))?;
        Ok(Blas { handle, workspace, plans: HashMap::new() })
    }

    /// Launches a product on the stream.
    ///
    /// # Safety
    /// Its matrices are allocated, and its output overlaps no other.
    pub(super) unsafe fn multiply(&mut self, product: &Product, stream: CUstream) -> Result<(), Error> {
        let key = (product.size, product.into);
        if !self.plans.contains_key(&key) {
            let plan = plan(self.handle, product)?;
            self.plans.insert(key, plan);
        }
        let plan = &self.plans[&key];
        let one = 1f32;
        let kept = if product.into == Into::AddF32 { 1f32 } else { 0f32 };
        // SAFETY: the plan is of this size; the matrices are allocated, by the caller's promise, as is the workspace; factors are read
        // before the call returns.
        let done = unsafe {
            result::matmul(
                self.handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const kept).cast(),
                product.weights as *const c_void,
                plan.weights,
                product.x as *const c_void,
                plan.x,
                product.out as *const c_void,
                plan.out,
                product.out as *mut c_void,
                plan.out,
                &raw const plan.algorithm,
                self.workspace as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        };
        done.map_err(refused("multiply"))
    }
}

/// Rows of ours are columns of its: `out^T[rows, T] = (W^T)^T x^T`, with leading dimensions `cols`, `cols` and `rows`.
fn plan(handle: sys::cublasLtHandle_t, product: &Product) -> Result<Plan, Error> {
    let (tokens, rows, cols) = product.size;
    let bf16 = sys::cudaDataType_t::CUDA_R_16BF;
    let f32 = sys::cudaDataType_t::CUDA_R_32F;
    let of_out = if product.into == Into::Bf16 { bf16 } else { f32 };
    let layout = |kind, columns: usize, rows: usize| {
        result::create_matrix_layout(kind, columns as u64, rows as u64, columns as i64)
            .map_err(refused("describe a matrix"))
    };
    let (weights, x, out) =
        (layout(bf16, cols, rows)?, layout(bf16, cols, tokens)?, layout(of_out, rows, tokens)?);
    let of = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, f32)
        .map_err(refused("describe a product"))?;
    let workspace = WORKSPACE;
    // Parts of sums are added as f32, never as what comes out.
    let reduction = sys::cublasLtReductionScheme_t::CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE as u32;
    let preference = result::create_matmul_pref().map_err(refused("prefer"))?;
    // SAFETY: descriptions were just made; attributes have the types that they are documented with, and are copied.
    let found = unsafe {
        result::set_matmul_desc_attribute(
            of,
            sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_TRANSA,
            (&raw const TRANSPOSED).cast(),
            size_of_val(&TRANSPOSED),
        )
        .and_then(|()| {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
                (&raw const workspace).cast(),
                size_of_val(&workspace),
            )
        })
        .and_then(|()| {
            result::set_matmul_pref_attribute(
                preference,
                sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK,
                (&raw const reduction).cast(),
                size_of_val(&reduction),
            )
        })
        .and_then(|()| result::get_matmul_algo_heuristic(handle, of, weights, x, out, out, preference))
    };
    // SAFETY: it was just made, and is used no more.
    let _ = unsafe { result::destroy_matmul_pref(preference) };
    let (size, into) = (product.size, product.into);
    let algorithm = found.map_err(refused(&format!("a product of {size:?} into {into:?}")))?.algo;
    Ok(Plan { product: of, weights, x, out, algorithm })
}
