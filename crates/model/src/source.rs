//! Where do tensors come from? The two file formats behind one trait: a tensor by its role, as a [`Matrix`] or as
//! floats, one at a time, so that loading needs little more memory than the model itself.

use mosaickv_kernels::matrix::{BlockType, Matrix};

use crate::ModelError;

/// The role of a tensor; per-layer roles are asked for with the layer's index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Role {
    Embed,
    Norm,
    Head,
    AttnNorm,
    Q,
    K,
    V,
    QBias,
    KBias,
    VBias,
    QNorm,
    KNorm,
    O,
    PostAttnNorm,
    FfnNorm,
    Gate,
    Up,
    Down,
    PostFfnNorm,
}

/// The tensors of one checkpoint. Every tensor that is asked for is remembered, see [`Tensors::left_over`].
pub(crate) trait Tensors {
    /// The tensor's name in this format.
    fn name(&self, role: Role, layer: usize) -> String;
    fn contains(&self, name: &str) -> bool;
    fn matrix(&mut self, name: &str, rows: usize, cols: usize) -> Result<Matrix, ModelError>;
    fn vector(&mut self, name: &str, length: usize) -> Result<Vec<f32>, ModelError>;
    /// A tensor that nobody asked for and that is not known to be harmless.
    fn left_over(&self) -> Option<String>;
}

pub(crate) fn shaped(name: &str, got: &[usize], wanted: &[usize]) -> Result<(), ModelError> {
    if got == wanted {
        return Ok(());
    }
    Err(ModelError::Shape { name: name.to_owned(), got: got.to_vec(), wanted: wanted.to_vec() })
}

pub(crate) fn finite(name: &str, values: Vec<f32>) -> Result<Vec<f32>, ModelError> {
    match values.iter().position(|x| !x.is_finite()) {
        Some(index) => Err(ModelError::NotFinite { name: name.to_owned(), index, value: values[index] }),
        None => Ok(values),
    }
}

pub(crate) fn blocks(
    name: &str,
    kind: BlockType,
    shape: (usize, usize),
    bytes: &[u8],
) -> Result<Matrix, ModelError> {
    Matrix::from_blocks(kind, shape.0, shape.1, bytes)
        .map_err(|source| ModelError::Matrix { name: name.to_owned(), source })
}
