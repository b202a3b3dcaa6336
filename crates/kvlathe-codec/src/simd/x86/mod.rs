//! AVX2, AVX-512 and AVX-512 with VNNI.

mod floats;
mod multiply;
mod registers;
mod sums;
mod tiles_256;
mod tiles_512;
mod unpack_codes;
