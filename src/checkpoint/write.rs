//! Tensors to one safetensors file, or to the bytes of one.

use std::collections::HashMap;

use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensorError};

use crate::error::{Error, Result};

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTensor {
    /// Its name in the file.
    pub name: String,
    /// Element type.
    pub dtype: Dtype,
    /// Shape, row-major.
    pub shape: Vec<usize>,
    /// Little-endian elements.
    pub bytes: Vec<u8>,
}

impl NamedTensor {
    /// From `f32` values.
    pub fn f32(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), dtype: Dtype::F32, shape: shape.into(), bytes }
    }

    /// From `i32` values.
    pub(crate) fn i32(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: &[i32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), dtype: Dtype::I32, shape: shape.into(), bytes }
    }

    /// From `u32` values.
    pub(crate) fn u32(name: impl Into<String>, shape: impl Into<Vec<usize>>, values: &[u32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { name: name.into(), dtype: Dtype::U32, shape: shape.into(), bytes }
    }
}

/// The bytes of a safetensors file of tensors and free-form metadata.
///
/// # Errors
/// [`Error::Checkpoint`] for a tensor whose bytes do not fill its shape.
pub fn tensor_bytes(tensors: &[NamedTensor], metadata: Option<HashMap<String, String>>) -> Result<Vec<u8>> {
    let wrong = |name: &str, error: SafeTensorError| Error::Checkpoint {
        file: "tensors to be written".into(),
        detail: format!("tensor `{name}`: {error}"),
    };
    let mut views = Vec::with_capacity(tensors.len());
    for NamedTensor { name, dtype, shape, bytes } in tensors {
        let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(|error| wrong(name, error))?;
        views.push((name.as_str(), view));
    }
    safetensors::serialize(views, metadata).map_err(|error| wrong("*", error))
}
