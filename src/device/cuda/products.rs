//! Products with weights, by cuBLASLt: what it chose for a size is chosen once and kept.

#![allow(unsafe_code)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;
use cudarc::driver::CudaStream;

use super::memory::CudaMemory;
use crate::gpu::driver::{Fault, Product};
use crate::gpu::launch::{Float, Memory};

/// Bytes of scratch memory that a product may use: what NVIDIA advises for Hopper.
const WORKSPACE: usize = 32 << 20;

/// Plans that are kept. A model has a few for each size of batch, and sizes come in buckets; beyond this many something else is
/// wrong, and all are forgotten.
const PLANS_MAX: usize = 4096;

/// One executor's.
pub(super) struct Products {
    handle: sys::cublasLtHandle_t,
    stream: Arc<CudaStream>,
    workspace: CudaMemory,
    plans: HashMap<Size, Plan>,
}

// SAFETY: the handle is used by one thread at a time, whichever owns this value; cuBLASLt ties handles to no thread.
unsafe impl Send for Products {}

#[derive(Clone, Copy, PartialEq, Eq, Hash)]
struct Size {
    tokens: usize,
    inputs: usize,
    outputs: usize,
    float: u8,
    bias: bool,
}

/// Descriptions of the matrices, and the algorithm that was chosen for them.
struct Plan {
    product: sys::cublasLtMatmulDesc_t,
    weights: sys::cublasLtMatrixLayout_t,
    x: sys::cublasLtMatrixLayout_t,
    y: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Plan {
    fn drop(&mut self) {
        // SAFETY: each was made in `Plan::new`, or is null there and skipped; none is used after this.
        unsafe {
            if !self.product.is_null() {
                let _ = result::destroy_matmul_desc(self.product);
            }
            for layout in [self.weights, self.x, self.y] {
                if !layout.is_null() {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
        }
    }
}

fn refused(error: CublasError) -> Fault {
    use sys::cublasStatus_t::{
        CUBLAS_STATUS_ALLOC_FAILED, CUBLAS_STATUS_EXECUTION_FAILED, CUBLAS_STATUS_MAPPING_ERROR,
    };
    match error.0 {
        CUBLAS_STATUS_ALLOC_FAILED => Fault::OutOfMemory { bytes: WORKSPACE },
        CUBLAS_STATUS_EXECUTION_FAILED | CUBLAS_STATUS_MAPPING_ERROR => Fault::Lost(format!("cuBLASLt: {:?}", error.0)),
        other => Fault::Refused(format!("cuBLASLt: {other:?}")),
    }
}

impl Products {
    pub(super) fn new(stream: &Arc<CudaStream>) -> Result<Products, Fault> {
        let workspace = CudaMemory::new(stream, WORKSPACE)?;
        let handle = result::create_handle().map_err(refused)?;
        Ok(Products { handle, stream: Arc::clone(stream), workspace, plans: HashMap::new() })
    }

    /// On the stream. The spans were compared with the sizes.
    pub(super) fn ask(&mut self, product: &Product<'_, CudaMemory>) -> Result<(), Fault> {
        let Product { tokens, inputs, outputs, float, .. } = *product;
        if tokens == 0 {
            return Ok(());
        }
        let size = Size { tokens, inputs, outputs, float: float as u8, bias: product.bias.is_some() };
        if !self.plans.contains_key(&size) {
            if self.plans.len() >= PLANS_MAX {
                self.plans.clear();
            }
            let plan = Plan::new(self.handle, size, float).map_err(refused)?;
            self.plans.insert(size, plan);
        }
        let plan = &self.plans[&size];
        let address = |span: &crate::gpu::launch::Span<'_, CudaMemory>| span.memory.address + span.at as u64;
        if let Some(bias) = &product.bias {
            let attribute = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            set(plan.product, attribute, &address(bias)).map_err(refused)?;
        }
        let (one, zero) = (1.0_f32, 0.0_f32);
        let y = address(&product.y) as *mut c_void;
        // SAFETY: the descriptions are of these sizes and live in `plans`; the addresses are of memory that large (`check`), and of
        // a workspace that nothing else on this stream uses at the same time, since a stream is in order.
        unsafe {
            result::matmul(
                self.handle,
                plan.product,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                address(&product.weights) as *const c_void,
                plan.weights,
                address(&product.x) as *const c_void,
                plan.x,
                y,
                plan.y,
                y,
                plan.y,
                &raw const plan.algorithm,
                self.workspace.address as *mut c_void,
                self.workspace.bytes(),
                self.stream.cu_stream().cast(),
            )
            .map_err(refused)
        }
    }
}

impl Drop for Products {
    fn drop(&mut self) {
        self.plans.clear();
        // SAFETY: made in `new`, destroyed once; its plans are gone.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}

fn set<T>(
    product: sys::cublasLtMatmulDesc_t,
    attribute: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), CublasError> {
    // SAFETY: the description exists, and the value has the size that is said.
    unsafe { result::set_matmul_desc_attribute(product, attribute, std::ptr::from_ref(value).cast(), size_of::<T>()) }
}

impl Plan {
    /// cuBLASLt's matrices stand on columns: ours, on rows, are their transposes. So `y = x · wᵀ` is `yᵀ = w · xᵀ`, and `w` is the
    /// one that it must transpose.
    fn new(handle: sys::cublasLtHandle_t, size: Size, float: Float) -> Result<Plan, CublasError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let kind = match float {
            Float::F32 => sys::cudaDataType_t::CUDA_R_32F,
            Float::F16 => sys::cudaDataType_t::CUDA_R_16F,
            Float::BF16 => sys::cudaDataType_t::CUDA_R_16BF,
        };
        let sums = sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
        let (t, i, o) = (size.tokens as u64, size.inputs as u64, size.outputs as u64);
        let null = std::ptr::null_mut();
        // Filled one by one, so that what was made is destroyed when the next is refused.
        let mut plan = Plan {
            product: result::create_matmul_desc(sums, sys::cudaDataType_t::CUDA_R_32F)?,
            weights: null,
            x: null,
            y: null,
            algorithm: sys::cublasLtMatmulAlgo_t { data: [0; 8] },
        };
        plan.weights = result::create_matrix_layout(kind, i, o, i as i64)?;
        plan.x = result::create_matrix_layout(kind, i, t, i as i64)?;
        plan.y = result::create_matrix_layout(kind, o, t, o as i64)?;
        let transposed = 1_i32;
        set(plan.product, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &transposed)?;
        if size.bias {
            let epilogue = sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS;
            set(plan.product, Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE, &epilogue)?;
        }
        let preference = Preference(result::create_matmul_pref()?);
        let most = sys::cublasLtMatmulPreferenceAttributes_t::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
        let workspace = WORKSPACE;
        // SAFETY: the preference and the descriptions were just made; the attribute is a size.
        let chosen = unsafe {
            let value = (&raw const workspace).cast();
            result::set_matmul_pref_attribute(preference.0, most, value, size_of::<usize>())?;
            let Plan { product, weights, x, y, .. } = plan;
            result::get_matmul_algo_heuristic(handle, product, weights, x, y, y, preference.0)?
        };
        plan.algorithm = chosen.algo;
        Ok(plan)
    }
}

struct Preference(sys::cublasLtMatmulPreference_t);

impl Drop for Preference {
    fn drop(&mut self) {
        // SAFETY: made where this is, destroyed once.
        let _ = unsafe { result::destroy_matmul_pref(self.0) };
    }
}
