//! NEON.

mod floats;
mod multiply;
mod registers;
mod tiles;
mod unpack_codes;
