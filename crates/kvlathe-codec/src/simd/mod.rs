//! What instruction sets can do, as traits, and one folder for each family of them.
//!
//! Kernels are written over [`multiply::Multiply`], which brings the other traits along, and compiled for each type of
//! [`isa`].

pub(crate) mod floats;
pub(crate) mod isa;
pub(crate) mod multiply;
pub(crate) mod multiply_codes;
#[cfg(target_arch = "aarch64")]
mod neon;
mod portable;
#[cfg(test)]
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tests;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod tiles;
pub(crate) mod unpack_codes;
#[cfg(target_arch = "x86_64")]
mod x86;
