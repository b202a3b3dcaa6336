//! Torch tensors on the CPU, by pointer.
//!
//! The GIL is released while Rust reads them, so a slice made here must not outlive the call that holds the tensor.

use half::{bf16, f16};
use kvlathe::cache::TensorView;
use kvlathe::codec::Element;
use pyo3::intern;
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::error::{exception, to_python};

/// The number formats that the native code takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Dtype {
    const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::F16];

    /// As torch names it, without `torch.`.
    const fn name(self) -> &'static str {
        match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
            Self::F16 => "float16",
        }
    }

    pub(crate) fn from_name(name: &str) -> PyResult<Self> {
        let name = name.trim_start_matches("torch.");
        Self::ALL.into_iter().find(|dtype| dtype.name() == name).ok_or_else(|| {
            let message =
                format!("dtype {name} cannot be compressed; load the model in float32, bfloat16 or float16");
            exception("DtypeError", message)
        })
    }

    /// The torch object is one per dtype: comparing addresses is enough, and much faster than its name.
    fn of(dtype: &Bound<'_, PyAny>) -> PyResult<Option<Self>> {
        static OBJECTS: PyOnceLock<[Py<PyAny>; 3]> = PyOnceLock::new();
        let objects = OBJECTS.get_or_try_init(dtype.py(), || {
            let torch = dtype.py().import("torch")?;
            let object = |dtype: Self| Ok::<_, PyErr>(torch.getattr(dtype.name())?.unbind());
            Ok::<_, PyErr>([object(Self::F32)?, object(Self::Bf16)?, object(Self::F16)?])
        })?;
        Ok(Self::ALL.into_iter().zip(objects).find(|(_, object)| object.is(dtype)).map(|(dtype, _)| dtype))
    }
}

/// What Python prints for it. An error, Ctrl-C being one, is handed on: `to_string` would swallow it.
fn name_of(object: &Bound<'_, PyAny>) -> PyResult<String> {
    Ok(object.str()?.to_string_lossy().into_owned())
}

/// A torch tensor's memory, valid while the Python object that it was taken from is alive.
pub(crate) struct RawTensor<'py> {
    address: usize,
    pub(crate) shape: Vec<usize>,
    strides: Vec<usize>,
    dtype: Bound<'py, PyAny>,
}

impl<'py> RawTensor<'py> {
    /// Reads pointer, shape, strides and dtype of a CPU tensor with `n_dims` dimensions.
    pub(crate) fn new(tensor: &Bound<'py, PyAny>, what: &str, n_dims: usize) -> PyResult<Self> {
        let py = tensor.py();
        if !tensor.getattr(intern!(py, "is_cpu"))?.extract::<bool>()? {
            let device = name_of(&tensor.getattr(intern!(py, "device"))?)?;
            return Err(exception(
                "DeviceError",
                format!("{what} are on {device}, the native code works on the cpu"),
            ));
        }
        let shape: Vec<usize> = tensor.getattr(intern!(py, "shape"))?.extract()?;
        if shape.len() != n_dims {
            let message = format!("{what} have the shape {shape:?}, expected {n_dims} dimensions");
            return Err(exception("ShapeError", message));
        }
        let strides: Vec<usize> = tensor.call_method0(intern!(py, "stride"))?.extract()?;
        if strides.last().is_some_and(|&s| s != 1) && shape.last().is_some_and(|&n| n > 1) {
            return Err(exception("ShapeError", format!("the last dimension of {what} must be contiguous")));
        }
        let address: usize = tensor.call_method0(intern!(py, "data_ptr"))?.extract()?;
        if address == 0 && !shape.contains(&0) {
            let message = format!(
                "{what} have no memory of their own, as in torch.func's transforms; pass ordinary tensors"
            );
            return Err(exception("DeviceError", message));
        }
        let dtype = tensor.getattr(intern!(py, "dtype"))?;
        Ok(Self { address, shape, strides, dtype })
    }

    /// Where the first element lies.
    pub(crate) fn address(&self) -> usize {
        self.address
    }

    pub(crate) fn dtype(&self) -> PyResult<Dtype> {
        match Dtype::of(&self.dtype)? {
            Some(dtype) => Ok(dtype),
            None => Dtype::from_name(&name_of(&self.dtype)?),
        }
    }

    /// Refuses every dtype but `name` (as torch prints it, without `torch.`).
    pub(crate) fn expect_dtype(&self, what: &str, name: &str) -> PyResult<()> {
        let given = name_of(&self.dtype)?;
        if given.trim_start_matches("torch.") == name {
            return Ok(());
        }
        Err(exception("DtypeError", format!("{what} are {given}, expected torch.{name}")))
    }

    /// Elements from the first to the last, gaps included.
    fn span(&self) -> usize {
        if self.shape.contains(&0) {
            return 0;
        }
        self.shape.iter().zip(&self.strides).map(|(n, s)| (n - 1) * s).sum::<usize>() + 1
    }

    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        for (n, s) in self.shape.iter().zip(&self.strides).rev() {
            if *n != 1 && *s != expected {
                return false;
            }
            expected *= n;
        }
        true
    }

    /// How many elements of type `T` lie at the address.
    fn elements<T>(&self, what: &str) -> PyResult<usize> {
        let n = self.span();
        if n > 0 && !self.address.is_multiple_of(align_of::<T>()) {
            let message =
                format!("{what} do not begin at a multiple of their elements' size; pass a clone() of them");
            return Err(exception("ShapeError", message));
        }
        Ok(n)
    }

    /// The elements from the first to the last, gaps included.
    ///
    /// # Safety
    /// `T` must be the tensor's element type; the tensor must stay alive and un-resized, and nobody may write to it,
    /// while the slice is used.
    unsafe fn slice<T>(&self, what: &str) -> PyResult<&[T]> {
        let n = self.elements::<T>(what)?;
        if n == 0 {
            return Ok(&[]);
        }
        // SAFETY: torch guarantees `span` elements from data_ptr on, aligned as checked; the rest is the caller's promise.
        Ok(unsafe { std::slice::from_raw_parts(self.address as *const T, n) })
    }

    /// The elements of a contiguous tensor.
    ///
    /// # Safety
    /// As [`RawTensor::slice`].
    pub(crate) unsafe fn contiguous<T>(&self, what: &str) -> PyResult<&[T]> {
        self.check_contiguous(what)?;
        // SAFETY: the caller's promise.
        unsafe { self.slice(what) }
    }

    pub(crate) fn check_contiguous(&self, what: &str) -> PyResult<()> {
        if self.is_contiguous() {
            return Ok(());
        }
        Err(exception("ShapeError", format!("{what} must be contiguous")))
    }

    /// The elements of a contiguous tensor, to be written.
    ///
    /// # Safety
    /// As [`RawTensor::slice`], and nobody else may read the tensor meanwhile, either.
    #[expect(clippy::mut_from_ref, reason = "the memory is torch's; self only describes it")]
    pub(crate) unsafe fn slice_mut<T>(&self, what: &str) -> PyResult<&mut [T]> {
        self.check_contiguous(what)?;
        let n = self.elements::<T>(what)?;
        if n == 0 {
            return Ok(&mut []);
        }
        // SAFETY: as in `slice`; exclusivity is the caller's promise.
        Ok(unsafe { std::slice::from_raw_parts_mut(self.address as *mut T, n) })
    }

    /// A view `[batch, heads, tokens, head_dim]`.
    ///
    /// # Safety
    /// As [`RawTensor::slice`].
    pub(crate) unsafe fn view<E: Element>(&self) -> PyResult<TensorView<'_, E>> {
        // SAFETY: the caller's promise.
        let data = unsafe { self.slice::<E>("tensors")? };
        let shape = [self.shape[0], self.shape[1], self.shape[2], self.shape[3]];
        TensorView::new(data, shape, [self.strides[0], self.strides[1], self.strides[2]]).map_err(to_python)
    }
}

/// Runs `$body` with `$element` bound to the Rust type of `$dtype`.
macro_rules! with_element {
    ($dtype:expr, $element:ident => $body:expr) => {
        match $dtype {
            $crate::tensor::Dtype::F32 => {
                type $element = f32;
                $body
            }
            $crate::tensor::Dtype::Bf16 => {
                type $element = ::half::bf16;
                $body
            }
            $crate::tensor::Dtype::F16 => {
                type $element = ::half::f16;
                $body
            }
        }
    };
}
pub(crate) use with_element;

// The element types named in the macro must be the ones the codec knows.
const _: fn() = || {
    fn element<E: Element>() {}
    element::<bf16>();
    element::<f16>();
};
